"""What a step hands to the rule of one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from stac_optimizer.distributed.vote import Voters
from stac_optimizer.rule.hyperparameters import Group

__all__ = ["StateLists", "StepInputs", "TensorList"]

TensorList: TypeAlias = list[Tensor]
"""Tensors of one device and dtype."""
StateLists: TypeAlias = Mapping[str, list[Tensor]]
"""By key of the state a list, in the order of the parameters."""


class StepInputs(NamedTuple):
    """Parameters of one group that have a gradient, at least one, and that all have state under the same keys.

    Args:
        group: the group.
        params: as the optimizer holds them: DTensors and complex ones whole.
        grads: their gradients, read-only.
        states: for each key of their state a list, the counters under "step".
        grad_scale: what a GradScaler left the gradients multiplied by.
        positions: for each parameter its place among all of the optimizer.
        found_inf: not 0 where a GradScaler found NaN or infinity, for rules that skip such a step by themselves.
        voters: the ranks that vote on the step of a group with ``vote``.
    """

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    states: StateLists
    grad_scale: Tensor | None = None
    positions: Sequence[int] = ()
    found_inf: Tensor | None = None
    voters: Voters | None = None

    def only(self, chosen: Sequence[int]) -> StepInputs:
        """The same of the parameters at these places."""
        if len(chosen) == len(self.params):
            return self
        return StepInputs(  # torch.compile of torch 2.6 knows no _replace
            self.group,
            [self.params[index] for index in chosen],
            [self.grads[index] for index in chosen],
            {key: [tensors[index] for index in chosen] for key, tensors in self.states.items()},
            self.grad_scale,
            [self.positions[index] for index in chosen] if self.positions else (),
            self.found_inf,
            self.voters,
        )
