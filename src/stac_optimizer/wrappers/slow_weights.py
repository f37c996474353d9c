"""Slow weights beside those that a base optimizer moves: what Lookahead and Scout have in common."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.rule import Group
from stac_optimizer.stepping.ambient import neutral
from stac_optimizer.validation import Checker, count, real
from stac_optimizer.wrappers.base.parts import copy_all
from stac_optimizer.wrappers.base.refusals import refuse_own_operations
from stac_optimizer.wrappers.base.wrapper import Wrapper

__all__ = ["SlowWeights"]


def check_rate(name: str, value: Any) -> float:
    """A float from 0 to 1."""
    rate = real(name, value, "a number in [0, 1]")
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return rate


def check_period(name: str, value: Any) -> int:
    """An integer, 1 or more."""
    return count(name, value, least=1)


class Noted(NamedTuple):
    """What is noted before the base's step.

    Args:
        weights: by parameter a copy, where one is needed.
        is_first: whether the slow weights begin with this step.
        stepped: parameters with a gradient, which hooks of the base may take away.
    """

    weights: dict[Tensor, Tensor]
    is_first: bool
    stepped: frozenset[Tensor]


class SlowWeights(Wrapper):
    """A wrapper that now and then brings slow weights and those of the base together.

    Args:
        base: what moves the fast weights.
        sync_rate: how far the slow ones go towards them.
        sync_period: after how many steps.
    """

    hyperparameters: ClassVar[Mapping[str, Checker]] = {"sync_rate": check_rate, "sync_period": check_period}

    def __init__(self, base: Optimizer, sync_rate: float = 0.5, sync_period: int = 6) -> None:
        super().__init__(base, {"sync_rate": sync_rate, "sync_period": sync_period})

    @property
    def _slow_key(self) -> str:
        return self.own.weights[0]

    @property
    def _counter_key(self) -> str:
        return self.own.counter[0]

    @property
    def _steps(self) -> int:
        """How many steps the slow weights have seen."""
        counter = self._shared(self._counter_key)
        return 0 if counter is None else int(counter.item())

    def _before(self, *, may_get_gradients: bool, makes_state: bool) -> Noted:
        steps = self._steps
        is_first = steps == 0
        params = [p for p in self._params() if p.grad is not None or (may_get_gradients and p.requires_grad)]
        held = self._held(self._slow_key)
        fresh = [param for param in params if is_first or param not in held]
        refuse_own_operations(fresh, self.param_groups, type(self).__name__)
        copied = {*fresh, *self._watched(held, steps + 1)}
        # In the order of all parameters, for the memory of a step does not depend on what hash values are.
        stepped = frozenset(param for param in params if param.grad is not None)
        return Noted({p: p.detach().clone() for p in self._params() if p in copied}, is_first, stepped)

    def _watched(self, held: Mapping[Tensor, Tensor], step: int) -> Iterable[Tensor]:
        """Parameters whose weights from before this step are needed, besides those that get slow weights in it."""
        return ()

    def _after(self, noted: Noted, *, makes_state: bool) -> None:
        held = self._held(self._slow_key)
        stepped = [p for p in noted.weights if p in noted.stepped or p.grad is not None]
        fresh = [p for p in stepped if noted.is_first or p not in held]
        self._begin(fresh, noted.weights)
        counter = self._shared(self._counter_key)
        if counter is None or makes_state:
            return
        counter.add_(1)
        step = int(counter.item())
        self._look(noted.weights, step)
        due = [group for group in self.param_groups if step % group["sync_period"] == 0]
        if due:
            self._sync(due)

    def _begin(self, params: Sequence[Tensor], weights: Mapping[Tensor, Tensor] | None = None) -> None:
        counter = self._shared(self._counter_key)
        for param in params:
            counter = torch.zeros((), dtype=torch.float32, device="cpu") if counter is None else counter
            state = self.state[param]
            state[self._slow_key] = param.detach().clone() if weights is None else weights[param].clone()
            state[self._counter_key] = counter

    def _look(self, before: Mapping[Tensor, Tensor], step: int) -> None:
        """Take note of what the base has done in this step."""

    @abstractmethod
    def _sync(self, groups: Sequence[Group]) -> None:
        """Bring slow and fast weights of these groups together."""

    def _synced(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and slow weights of a group, but for those that are frozen by now."""
        held = self._held(self._slow_key, [param for param in group["params"] if param.requires_grad])
        return list(held), list(held.values())

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Within this context the model has the slow weights, to evaluate or save it; then its own to the bit again.

        Costs a copy of all weights for that time. Statistics of normalization layers are those of the fast weights, and
        so are weights that are frozen by now.

        Raises:
            RuntimeError: within itself; for a step, or a checkpoint to load, within it.
        """
        self._refuse_while_closed("enter slow_weights")
        held = self._held(self._slow_key, [p for p in self._params() if p.requires_grad]) if self._steps else {}
        params, slow = list(held), list(held.values())
        with neutral(self.param_groups), torch.no_grad():
            fast = [param.detach().clone() for param in params]
            copy_all(slow, params)
        self._why_closed = (
            "within slow_weights, where the model has other weights than it trains; leave the context first"
        )
        try:
            yield
        finally:
            self._why_closed = None
            with neutral(self.param_groups), torch.no_grad():
                copy_all(fast, params)
