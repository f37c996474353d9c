"""Twins of one parameter: the float64 reference, or a torch class alone. They know what a step must leave.

A twin holds no more than one step of rounding: once a step was found within its bounds, the twin goes on from the very
bits that the step has left. So bounds need not grow, and all that is no step (loading, copying) is compared by bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests import reference
from tests.optim.comparisons import as_array
from tests.support import assert_same_bits

__all__ = ["Alone", "Reference", "Tally", "Twin", "assert_hyper"]

REFERENCES: Mapping[str, Callable[..., reference.Result]] = {
    "signum": reference.signum,
    "lion": reference.lion,
    "adamw": reference.adamw,
}
FLOAT32 = 2.0**-23
# The farthest apart that neighbouring values of a dtype are, by their size: what is rounded by chance may lie so far
# off, what is rounded to nearest half as far.
SPACING = {torch.float32: FLOAT32, torch.bfloat16: 2.0**-7}
# Of float32 operations on the way to a result, with room to spare.
ROUNDINGS = 8
# By how many codes an average in 8 bits may differ from the exact one, be it rounded to nearest or by chance: one, and
# what a rounding of the average is worth near zero, where codes are closest.
CODES = 1.2


@dataclass
class Tally:
    """How many weights were compared, and of how many the reference cannot tell the sign."""

    compared: int = 0
    left_out: int = 0


@dataclass
class Reference:
    """A parameter that a rule of this package updates, beside the float64 reference.

    Args:
        rule: its name.
        param: the parameter, and from then on what it must be.
        hyper: hyper-parameters, as the test has set them.
        is_coded: whether its averages are to be 8-bit codes.
        by_chance: whether weights, and averages of their dtype, are rounded by chance.
        is_captured: whether AdamW computes as in a captured or compiled step.
    """

    rule: str
    param: Tensor
    hyper: dict[str, Any]
    is_coded: bool = False
    by_chance: bool = False
    is_captured: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    _due: reference.Result | None = None
    _gradient: reference.Array | None = None

    def __post_init__(self) -> None:
        self.param = self.param.detach().clone()

    def align(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Go on from these bits."""
        self.param, self._due = param.detach().clone(), None
        self.state = {key: value.clone() for key, value in state.items()}

    def step(self, grad: Tensor) -> None:
        """A step that :meth:`check` will expect."""
        self._gradient = as_array(grad)
        self._due = REFERENCES[self.rule](as_array(self.param), self._gradient, self._held(), self.hyper)

    def loaded(self) -> None:
        """What loading leaves of the state: not what a hyper-parameter that was switched off has left."""
        if self.rule == "signum" and not self.hyper["momentum"]:
            for key in ("exp_avg", "exp_avg_scale"):
                self.state.pop(key, None)

    def check(self, param: Tensor, state: Mapping[str, Any], tally: Tally) -> None:
        """Assert that a parameter and its state are what they must be, and go on from their bits."""
        if self._due is None:
            assert_same_bits(param.detach(), self.param, "weights")
            assert_same_bits(_without_idle_counter(state), self.state, "state")
            return
        self._check_state(self._due, state)
        self._check_weights(self._due, param, tally)
        self.align(param, state)

    def _held(self) -> reference.State:
        held = {key: as_array(value) for key, value in self.state.items()}
        if "exp_avg_scale" in held:
            scales = held.pop("exp_avg_scale")
            held["exp_avg"] = reference.decoded(_matrix(held["exp_avg"]), scales).reshape(held["exp_avg"].shape)
        return {"step": np.zeros(()), **held}

    def _fine(self) -> reference.Array:
        """By how much an average computed in float32 may differ from the exact one."""
        assert self._gradient is not None
        held = self._held().get("exp_avg", np.zeros(()))
        fine: reference.Array = ROUNDINGS * FLOAT32 * (np.abs(held) + np.abs(self._gradient))
        return fine

    @property
    def _is_zero_exact(self) -> bool:
        """Whether float32 too finds 0 where the exact sum is 0: with factors that are few powers of two."""
        factor = self.hyper["betas"][0] if "betas" in self.hyper else self.hyper["momentum"]
        return bool(8 * factor % 1 == 0)

    def _slack_of_mask(self, signed: reference.Array, untold: int) -> float:
        """By how much a step may differ where these many elements may pass the mask or not."""
        assert self._gradient is not None
        g = -self._gradient if self.hyper["maximize"] else self._gradient
        least, most = (max((np.count_nonzero(signed * g > 0) + sign * untold) / signed.size, 1e-3) for sign in (-1, 1))
        return float(self.hyper["lr"] * (1 / least - 1 / most))

    def _slack_of_adamw(self, due: reference.Result) -> reference.Array:
        """By how much a step may differ: its average may be what is left of larger ones."""
        beta1, beta2 = self.hyper["betas"]
        t = self._held()["step"] + 1
        v = due.state.get("max_exp_avg_sq", due.state["exp_avg_sq"]) / (1 - beta2**t)
        fine = self._fine()
        if self.is_captured:  # 1 - beta2^t is a difference of float32 numbers then, under a root
            fine = fine + ROUNDINGS * FLOAT32 / (1 - beta2**t) * np.abs(due.state["exp_avg"])
        slack: reference.Array = self.hyper["lr"] * fine / (1 - beta1**t) / (np.sqrt(v) + self.hyper["eps"])
        return slack

    def _check_state(self, due: reference.Result, state: Mapping[str, Tensor]) -> None:
        is_coded = "exp_avg_scale" in self.state or (self.is_coded and "exp_avg" not in self.state)
        new = {*due.state, *(["exp_avg_scale"] if is_coded and due.state else [])}
        assert state.keys() == {"step", *self.state, *new}, f"keys {sorted(state)}"
        assert state["step"].dtype == torch.float32
        assert state["step"] == self._held()["step"] + 1, f"counter {state['step']}"
        for key in self.state.keys() - new - {"step"}:
            assert_same_bits(state[key], self.state[key], key)
        for key, exact in due.state.items():
            if key == "exp_avg" and is_coded:
                _check_codes(exact, state, self._fine())
                continue
            slack = self._fine() if key == "exp_avg" else ROUNDINGS * FLOAT32 * np.abs(exact)
            stored = SPACING[state[key].dtype] * np.abs(exact)
            _assert_within(state[key], exact, slack + stored, key)

    def _check_weights(self, due: reference.Result, param: Tensor, tally: Tally) -> None:
        before = as_array(self.param)
        tolerance = ROUNDINGS * FLOAT32 * (np.abs(before) + np.abs(due.p))
        if param.dtype != torch.float32:
            share = 1.0 if self.by_chance else 0.5
            tolerance += share * SPACING[param.dtype] * np.maximum(np.abs(due.p), np.abs(as_array(param)))
        if self.rule == "adamw":
            tolerance += self._slack_of_adamw(due)
        tells = np.ones(due.p.shape, dtype=bool)
        if due.signed is not None:
            fine = self._fine()
            tells = (np.abs(due.signed) > fine) | (fine == 0) | ((due.signed == 0) & self._is_zero_exact)
            if self.hyper.get("cautious"):
                tolerance += self._slack_of_mask(due.signed, int(np.count_nonzero(~tells)))
        tally.compared += tells.size
        tally.left_out += int(tells.size - tells.sum())
        _assert_within(param, np.where(tells, due.p, as_array(param)), tolerance, "weights")


class Alone:
    """A parameter beside a torch class that updates it alone, to the bit.

    Args:
        make: the class, or a partial of it.
        param: the parameter, which is copied.
        values: what its group begins with.
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer], param: Tensor, **values: Any) -> None:
        self.param = nn.Parameter(param.detach().clone())
        self._optimizer = make([self.param], **values)

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters, as the test sets them."""
        return self._optimizer.param_groups[0]

    @property
    def state(self) -> Mapping[str, Any]:
        """What the class keeps of the parameter."""
        held: Mapping[str, Any] = self._optimizer.state[self.param]
        return held

    def align(self, param: Tensor, state: Mapping[str, Any]) -> None:
        """Go on from these bits."""
        self.param.data.copy_(param.detach())
        self._optimizer.state[self.param] = {key: value.clone() for key, value in state.items()}

    def step(self, grad: Tensor) -> None:
        """A step, at once."""
        self.param.grad = grad.clone()
        self._optimizer.step()
        self.param.grad = None

    def loaded(self) -> None:
        """Loading leaves all."""

    def check(self, param: Tensor, state: Mapping[str, Any], tally: Tally) -> None:
        """Assert that a parameter and its state are the same to the bit."""
        tally.compared += param.numel()
        assert_same_bits(param.detach(), self.param.detach(), "weights")
        held = _without_idle_counter(state)
        if not held:  # a class such as Adagrad makes state before its first step
            assert not self.state.get("step", 0), f"state is missing: {self.state}"
            return
        assert_same_bits(dict(held), dict(self.state), "state")


Twin: TypeAlias = "Reference | Alone"


def _without_idle_counter(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state; that of a parameter that never had a gradient is its counter alone, and counts as none."""
    is_idle = state.keys() == {"step"} and not state["step"]
    return {} if is_idle else dict(state)


def _matrix(array: reference.Array) -> reference.Array:
    return array.reshape(array.shape[0], -1)


def _check_codes(exact: reference.Array, state: Mapping[str, Tensor], fine: reference.Array) -> None:
    """Assert that an average in 8-bit codes is the exact one within :data:`CODES` of them."""
    rows, codes, scales = _matrix(exact), _matrix(as_array(state["exp_avg"])), as_array(state["exp_avg_scale"])
    largest = reference.block_scales(rows)
    _assert_within(state["exp_avg_scale"], largest, reference.block_scales(_matrix(fine)), "scales")
    levels = np.sign(rows) * reference.exact_levels(rows, np.maximum(largest, scales))
    off = np.abs(levels - codes)
    assert (off <= CODES).all(), f"codes are off by {off.max()}"


def _assert_within(tensor: Tensor, exact: reference.Array, tolerance: NDArray[Any], what: str) -> None:
    actual = as_array(tensor)
    assert actual.shape == exact.shape, f"{what} have shape {actual.shape}, not {exact.shape}"
    fits = np.abs(actual - exact) <= tolerance
    assert fits.all(), (
        f"{what}: {np.count_nonzero(~fits)} of {fits.size} are off, the first {actual[~fits][:1]} in place of "
        f"{exact[~fits][:1]}, which may differ by {np.broadcast_to(tolerance, fits.shape)[~fits][:1]}"
    )


def assert_hyper(group: Mapping[str, Any], hyper: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Assert that a group holds what a twin does under these keys, where the twin has them."""
    for key in keys:
        if key in hyper:
            held, expected = group[key], hyper[key]
            is_same = float(held) == float(expected) if key in ("lr", "initial_lr") else held == expected
            assert is_same, f"group[{key!r}] is {held}, not {expected}"
