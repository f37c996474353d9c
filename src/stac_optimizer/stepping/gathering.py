"""What is remembered of parameters' state from step to step, so that gathering thousands of them costs little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from stac_optimizer.rule import Group, Rule

__all__ = ["Declared", "resolved", "states_of_kind", "take_at_once", "with_state"]


class Declared(NamedTuple):
    """What a rule declared of a parameter's state, remembered for as long as its group says the same.

    Args:
        param: the parameter.
        kind: which of the rule's keys its state has, as bits.
        keys: those, each after its place among the rule's.
        last: the key that is made last.
    """

    param: Tensor
    kind: int
    keys: Sequence[tuple[int, str]]
    last: str


def with_state(
    rule: Rule, param: Tensor, group: Group, state: dict[str, Tensor], made: list[tuple[Tensor, str]]
) -> Declared:
    """What the rule declares of a parameter, once all of it is in its state; what was not yet is told in ``made``."""
    tensors = rule.state(param, group)
    for tensor in tensors:
        if tensor.key not in state:
            state[tensor.key] = tensor.create(param, group)
            made.append((param, tensor.key))
    keys = [(rule.state_keys.index(tensor.key), tensor.key) for tensor in tensors]
    return Declared(param, sum(1 << place for place, _ in keys), keys, keys[-1][1])


def take_at_once(
    params: Sequence[Tensor],
    declared: Sequence[Declared | None],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    grads: list[Tensor],
    states: Sequence[list[Tensor]],
) -> int | None:
    """Gather gradients and state list by list, as in most steps can be done.

    Args:
        params: of a group.
        declared: what is remembered of each.
        state: of all parameters.
        grads: take the gradients.
        states: take the state, by the places of the rule's keys.

    Returns:
        Which keys all have. None, and nothing is taken, where a parameter has no gradient, or other state than the
        first, or some of it is to be made.
    """
    first = declared[0] if declared else None
    if first is None:
        return None
    kind = first.kind
    pairs = zip(params, declared, strict=True)
    are_alike = all(known is not None and known.param is param and known.kind == kind for param, known in pairs)
    given = [param.grad for param in params]
    if not are_alike or any(grad is None for grad in given):
        return None
    held = [state[param] for param in params]
    try:
        taken = [[each[key] for each in held] for _, key in first.keys]
    except KeyError:
        return None
    grads += cast("list[Tensor]", given)
    for (place, _), tensors in zip(first.keys, taken, strict=True):
        states[place].extend(tensors)
    return kind


def resolved(grads: list[Tensor]) -> list[Tensor]:
    """Gradients without the bit by which torch puts off to negate them, as of the imaginary parts of conjugates.

    What walks memory, as fused kernels do, would not see it. Nor does torch.compile, of anything.
    """
    if not torch.compiler.is_compiling() and any(map(Tensor.is_neg, grads)):
        return [grad.resolve_neg() for grad in grads]
    return grads


def states_of_kind(
    keys: Sequence[str], states: Sequence[list[Tensor]], kinds: Sequence[int], kind: int
) -> dict[str, list[Tensor]]:
    """By key the state of the parameters of one kind."""
    is_only = len(set(kinds)) == 1
    result = {}
    for place, (key, tensors) in enumerate(zip(keys, states, strict=True)):
        if kind >> place & 1:
            holders = [] if is_only else [other for other in kinds if other >> place & 1]
            result[key] = (
                tensors if is_only else [t for t, other in zip(tensors, holders, strict=True) if other == kind]
            )
    return result
