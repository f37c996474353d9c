"""What is remembered of parameters' state from step to step, so that gathering thousands of them costs little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stac_optimizer.rule import Group, Rule

__all__ = ["Declared", "states_of_kind", "with_state"]


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


def with_state(rule: Rule, param: Tensor, group: Group, state: dict[str, Tensor]) -> Declared:
    """What the rule declares of a parameter, once all of it is in its state."""
    tensors = rule.state(param, group)
    for tensor in tensors:
        if tensor.key not in state:
            state[tensor.key] = tensor.create(param, group)
    keys = [(rule.state_keys.index(tensor.key), tensor.key) for tensor in tensors]
    return Declared(param, sum(1 << place for place, _ in keys), keys, keys[-1][1])


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
