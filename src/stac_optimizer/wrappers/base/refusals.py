"""What cannot be wrapped, and when a wrapper cannot step. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.model.names import name_of
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import Group
from stac_optimizer.tensors.kinds import has_own_operations

__all__ = ["chain", "is_closed_to_scalers", "refuse_base", "refuse_own_operations", "refuse_step", "votes"]


def chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and what it wraps."""
    while isinstance(optimizer, Optimizer):
        yield optimizer
        optimizer = getattr(optimizer, "base", None)


def _innermost(base: Any) -> RuleOptimizer | None:
    """What is wrapped in the end, where it is of this package."""
    *_, last = chain(base)
    return last if isinstance(last, RuleOptimizer) else None


def votes(base: Any) -> bool:
    """Whether ranks vote on its steps, on gradients of their own."""
    rules = _innermost(base)
    return rules is not None and rules._voters is not None


def is_closed_to_scalers(base: Any) -> bool:
    """Whether a GradScaler must not step it."""
    rules = _innermost(base)
    return rules is not None and (rules._release is not None or rules._voters is not None)


def refuse_base(base: Any, name: str) -> None:
    """Refuse what cannot be wrapped by a wrapper of this name.

    Raises:
        TypeError: no optimizer.
        ValueError: one whose steps are recorded.
    """
    if not isinstance(base, Optimizer):
        what = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(f"base must be an optimizer, got {what}; write {name}(SGD(model.parameters(), lr=0.1))")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            f"base has differentiable=True, and {name} changes weights outside of what is recorded; leave one of them "
            "out"
        )


def refuse_step(base: Any, name: str, *, is_scaled: bool) -> None:
    """Refuse a step.

    Args:
        base: what is wrapped.
        name: of the wrapper.
        is_scaled: whether a GradScaler steps that left gradients scaled.

    Raises:
        RuntimeError: why.
    """
    rules = _innermost(base)
    if rules is not None and rules._release is not None:
        raise RuntimeError(
            f"gradients of the base are released, so backward has moved its weights already, and {name} must see each "
            "whole step. Call remove() on what release_gradients returned, go back to the weights before this "
            "backward, and train with step() after backward"
        )
    if is_scaled:
        raise RuntimeError(
            "a GradScaler's scale follows the gradients of its own rank, and so would part ranks that vote; train in "
            "bfloat16 without a scaler (or with enabled=False). Nothing was changed"
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph captures this step, and a replay would not do what {name} does on the host; capture forward "
            "and backward alone. Nothing was changed"
        )


def refuse_own_operations(params: Iterable[Tensor], groups: Sequence[Group], name: str) -> None:
    """Refuse parameters of classes with few operations, such as quantized ones.

    Raises:
        RuntimeError: naming the first.
    """
    for param in params:
        sharded: Any = param
        local = sharded.to_local() if is_sharded(param) else param
        if has_own_operations(local):
            raise RuntimeError(
                f"{name_of(groups, param)!r} is of the class {type(local).__name__}, and {name} takes plain weights "
                "alone. Nothing was changed"
            )
