"""Small tensors of one shape as one stack, for the calls' sake, where whole tensors are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.rule import StateLists, TensorList
from stac_optimizer.rule.moments import assign_, known_counts
from stac_optimizer.tensors.kinds import has_own_operations
from stac_optimizer.tensors.units.cutting import PACK_NUMEL
from stac_optimizer.tensors.units.pieces import is_recorded

__all__ = ["Work", "stackable"]


class Work(NamedTuple):
    """What a rule is given of some parameters, list by list."""

    params: TensorList
    grads: TensorList
    state: StateLists

    def only(self, chosen: Sequence[int]) -> Work:
        """The same of the parameters at these places."""
        if len(chosen) == len(self.params):
            return self
        params, grads, *states = (
            [tensors[index] for index in chosen] for tensors in (self.params, self.grads, *self.state.values())
        )
        return Work(params, grads, dict(zip(self.state, states, strict=True)))

    def stacked(self) -> Work:
        """All of them as one, which has a dimension more."""
        state = {key: tensors[:1] if key == "step" else [torch.stack(tensors)] for key, tensors in self.state.items()}
        return Work([torch.stack(self.params)], [torch.stack(self.grads)], state)

    def take_back(self, stacked: Work) -> None:
        """Write to the parameters and their state what has become of :meth:`stacked`."""
        assign_(self.params, stacked.params[0].unbind())
        for key, tensors in self.state.items():
            if key != "step":
                assign_(tensors, stacked.state[key][0].unbind())


def stackable(params: TensorList, steps: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[list[int]]:
    """The places of small parameters of one shape that have taken as many steps, two or more of each.

    Args:
        params: real and local.
        steps: of each.
        shapes: of the parameters as the optimizer holds them; of complex ones another, and they are left out.
    """
    counts = None if is_recorded() or len(params) < 2 else known_counts(steps)
    if counts is None:
        return []
    alike: dict[tuple[torch.Size, float], list[int]] = {}
    for index, (param, count, shape) in enumerate(zip(params, counts, shapes, strict=True)):
        if param.numel() <= PACK_NUMEL and param.is_cpu and param.shape == shape and not has_own_operations(param):
            alike.setdefault((shape, count), []).append(index)
    return [places for places in alike.values() if len(places) > 1]
