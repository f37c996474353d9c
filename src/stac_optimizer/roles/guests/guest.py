"""Guests: foreign optimizers that update a role of STAC. They share its very group dicts and its state.

So schedulers, ``state_dict``, distributed checkpoints and copies see one optimizer. A guest that keeps state elsewhere
is hosted by ``own_state.py``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.groups.foreign_state import tensors_in
from stac_optimizer.rule import Group, Rule, StateTensor
from stac_optimizer.rule.hyperparameters import EXCLUDED_FLAGS
from stac_optimizer.wrappers.base.wrapper import Wrapper

__all__ = ["MATRIX_CLASSES", "Guest", "GuestRule", "dry", "step_unseen", "without_data"]

# What STAC shares with a guest.
SHARED = frozenset({"param_groups", "state"})
# torch.optim.Muon takes matrices alone; it came with torch 2.9.
MATRIX_CLASSES = tuple(getattr(torch.optim, name) for name in ("Muon",) if hasattr(torch.optim, name))
# They choose the kernels of a step, and not its state; some ask for a device.
PATH_FLAGS = frozenset({"capturable", "foreach", "fused"})


class GuestRule(Rule):
    """What a guest's groups answer where rules are asked: it declares nothing, and is never stepped as a rule.

    Args:
        kind: the guest's class.
    """

    is_guest: ClassVar[bool] = True
    state_keys = ()

    def __init__(self, kind: type[Optimizer]) -> None:
        # The module within a package may move from release to release.
        self.name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"  # type: ignore[misc]  # one a guest
        self._kind = kind

    def takes(self, param: Tensor) -> bool:
        return not issubclass(self._kind, MATRIX_CLASSES) or param.ndim == 2

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return ()

    def parameter_problem(self, param: Tensor, group: Group) -> str | None:
        if not self.takes(param):
            return f"has {param.ndim} dimensions, and {self.name} takes matrices alone"
        flags = _excluded(group)
        return None if flags is None else f"is in a group with {flags}"

    def gradient_problem(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        if is_sharded(param) != is_sharded(grad):
            return "and its gradient are not both DTensors; distribute the gradient as the parameter is"
        return None

    def takes_plain(self, group: Group) -> bool:
        return True


class Guest:
    """A foreign optimizer that updates a role.

    Args:
        optimizer: it, over the role's parameters.
        role: the role.
    """

    shares_state: ClassVar[bool] = True
    """Whether all its state stands in the host's."""

    def __init__(self, optimizer: Optimizer, role: str) -> None:
        if isinstance(optimizer, Wrapper):
            raise TypeError(
                f"{role}_optimizer makes the wrapper {type(optimizer).__name__}, which goes around the whole: give its "
                f"base to STAC, and wrap STAC, as in Lookahead(STAC(model, {role}_optimizer=torch.optim.SGD))"
            )
        self.optimizer, self.role = optimizer, role
        self.rule = GuestRule(type(optimizer))
        # Of a class that makes state at once, as Adagrad. The host has none before its first step, as checkpoints of
        # torch.distributed want it, which make it by a step where there is none.
        self._first_state = dict(optimizer.state)
        self._remembered: tuple[object, dict[Tensor, Any]] | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The dicts that STAC takes for its own."""
        return self.optimizer.param_groups

    def tie(self, host: Optimizer) -> None:
        """Share the host's groups of the role, and its state.

        By assignment: a ``__setstate__``, such as Adagrad's, may look at the other role's state.
        """
        self.optimizer.param_groups = [group for group in host.param_groups if group["stac_role"] == self.role]
        self.optimizer.state = host.state

    @property
    def needs_closure(self) -> bool:
        """Whether it cannot step on gradients that are there, as LBFGS."""
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Let it step, on gradients that are there or by the closure's."""
        for param, state in self._first_state.items():
            if not self.optimizer.state.get(param):
                self.optimizer.state[param] = state
        self._first_state.clear()
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Let it complete a group, and take it.

        Raises:
            ValueError: flags that exclude each other, one of them its own. Nothing was added.
        """
        flags = _excluded({**self.optimizer.defaults, **group})
        if flags is not None:
            raise ValueError(f"group to add: with what {self.rule.name} begins with it has {flags}")
        self.optimizer.add_param_group(group)

    def bytes_by_parameter(self, state: Mapping[Tensor, Any]) -> dict[Tensor, int]:
        """Bytes of each parameter's state once it has stepped, found by a step of a twin without data."""
        params = [param for group in self.groups for param in group["params"]]
        held = {param: state.get(param) or self._first_state.get(param) for param in params}
        made = {} if all(held.values()) else self._made(params)
        return {param: sum(t.nbytes for t in tensors_in(held[param] or made.get(param))) for param in params}

    def check_state(self, loaded: Mapping[Any, Mapping[str, Any]]) -> None:
        """Refuse state that is to be loaded and is not what a step would make and find, where that is known.

        Raises:
            ValueError: naming what differs.
        """
        params = [param for group in self.groups for param in group["params"]]
        made = self._made(params) if any(loaded.get(param) for param in params) else {}
        for param, state in made.items():
            held = loaded.get(param, {})
            lacking = [key for key, value in state.items() if isinstance(value, Tensor) and key not in held]
            if held and lacking:
                raise ValueError(
                    f"the checkpoint's state of a parameter of shape {tuple(param.shape)} ({self.role}) lacks "
                    f"{lacking[0]!r}, which {self.rule.name} needs; load what it saved under the same hyper-parameters"
                )
            for key, value in held.items():
                expected = state.get(key)
                if isinstance(expected, Tensor) and value is not None:
                    shape = value.shape if isinstance(value, Tensor) else type(value).__name__
                    if shape != expected.shape:
                        raise ValueError(
                            f"the checkpoint's {key!r} of a parameter of shape {tuple(param.shape)} ({self.role}) has "
                            f"shape {shape}, which {self.rule.name} cannot use"
                        )

    def _made(self, params: Sequence[Tensor]) -> dict[Tensor, Any]:
        """By parameter the state, without data, that a step makes; nothing where that cannot be found out."""
        unread = {"params", "lr", "initial_lr"}
        told = repr([[(key, group[key]) for key in group if key not in unread] for group in self.groups])
        if self._remembered is None or self._remembered[0] != (told, len(params)):
            made: dict[Tensor, Any] = {}
            # What a foreign step cannot do without data shows in many ways.
            with contextlib.suppress(Exception), dry():
                made = self._dry_run(params)
            self._remembered = (told, len(params)), made
        return self._remembered[1]

    def _dry_run(self, params: Iterable[Tensor]) -> dict[Tensor, Any]:
        """By parameter the state that a step makes."""
        twins = dict(zip(params, without_data(params), strict=True))
        twin = object.__new__(type(self.optimizer))
        # Its lists and dicts are its own: a step may write to them.
        own = {key: copy.copy(value) for key, value in _attributes(self.optimizer).items()}
        Optimizer.__setstate__(twin, {**own, "state": {}, "param_groups": []})
        twin.state = type(self.optimizer.state)(dict)
        for group in self.groups:
            values = {key: False if key in PATH_FLAGS else value for key, value in group.items()}
            twin.param_groups.append({**values, "params": [twins[param] for param in group["params"]]})
        step_unseen(twin)
        return {param: twin.state[without] for param, without in twins.items()}

    def state_dict(self) -> dict[str, Any] | None:
        """What the host's own state dict does not hold."""
        return None

    def prepare_load(self, data: Mapping[str, Any] | None) -> Callable[[], None]:
        """Check what :meth:`state_dict` returned; the result loads it."""
        if data is not None:
            raise ValueError(f"the checkpoint has state of its own for the {self.role}, which {self.rule.name} has not")
        return lambda: None

    def __getstate__(self) -> dict[str, Any]:
        # Attributes that torch's __getstate__ would drop, such as those of LBFGS and lion-pytorch's Lion.
        return {
            "role": self.role,
            "kind": type(self.optimizer),
            "attributes": _attributes(self.optimizer),
            "first_state": self._first_state,
        }

    def __setstate__(self, held: dict[str, Any]) -> None:
        optimizer = object.__new__(held["kind"])
        Optimizer.__setstate__(optimizer, held["attributes"])
        self.optimizer, self.role, self.rule = optimizer, held["role"], GuestRule(held["kind"])
        self._first_state, self._remembered = held["first_state"], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Guest:
        twin = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _excluded(group: Mapping[str, Any]) -> str | None:
    """Flags of a group that exclude each other, which torch asks at construction and then in a step; or None."""
    for one, other in EXCLUDED_FLAGS:
        if group.get(one) and group.get(other):
            return f"{one}=True and {other}=True, which exclude each other; leave out one of them"
    return None


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in vars(optimizer).items() if key not in SHARED and not key.endswith("_hooks")}


def without_data(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters like these, with gradients, that take no memory and can be stepped for the state it makes."""
    result = [torch.nn.Parameter(torch.empty_like(param, device="meta")) for param in params]
    for param in result:
        param.grad = torch.empty_like(param)
    return list(result)


def step_unseen(optimizer: Optimizer) -> None:
    """A step that no global hook is told of."""
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    step(optimizer)


@contextlib.contextmanager
def dry() -> Iterator[None]:
    """For a step without data: without warnings, and without a trace in the generator that it may draw from."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _OnesWithoutData():
        warnings.simplefilter("ignore")
        yield


class _OnesWithoutData(TorchFunctionMode):
    """Lets a number be read from a tensor without data: it is 1."""

    READERS: ClassVar[dict[Any, Any]] = {
        Tensor.item: 1.0,
        Tensor.__float__: 1.0,
        Tensor.__int__: 1,
        Tensor.__bool__: True,
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.READERS and args[0].is_meta:
            return self.READERS[function]
        return function(*args, **(kwargs or {}))
