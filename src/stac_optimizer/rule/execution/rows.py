"""Sums over the rows of parameters, indices of their first dimension, for rules that look at each row by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import row_sums_over_shards
from stac_optimizer.rule.execution.wholes import FEW
from stac_optimizer.tensors.precision import widest_dtype
from stac_optimizer.tensors.units.pieces import Unit

__all__ = ["RowSums"]


class RowSums:
    """Sums over whole rows, put together of those over their parts, which come one after the other.

    Args:
        params: the parameters as the optimizer holds them, of one dimension at least.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._parts: list[dict[int, list[tuple[int, Tensor]]]] = []

    def add(self, units: Sequence[Unit], rows: Sequence[int], kinds: Sequence[Sequence[Tensor]]) -> None:
        """Take in, for each kind, the tensors that belong to these units, the first rows of which are these."""
        self._parts = self._parts or [{} for _ in kinds]
        members = [member for unit in units for member in unit.members]
        starts = [0] * len(members) if units[0].sizes else rows
        for found, tensors in zip(self._parts, kinds, strict=True):
            for member, row, sums in zip(members, starts, self._sums(units, tensors), strict=True):
                found.setdefault(member, []).append((row, sums))

    def _sums(self, units: Sequence[Unit], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """For each parameter's part the sums over its rows."""
        if not units[0].sizes:
            return [_sum_over_rows(tensor) for tensor in tensors]
        (pack,), (unit,) = tensors, units
        heights = [self._params[member].shape[0] for member in unit.members]
        widths = [size // max(height, 1) for size, height in zip(unit.sizes, heights, strict=True)]
        lengths = torch.tensor(widths).repeat_interleave(torch.tensor(heights))
        if not len(lengths):
            return [pack.new_zeros(0) for _ in heights]
        sums = torch.segment_reduce(pack.to(widest_dtype(pack.device)), "sum", lengths=lengths).to(pack.dtype)
        of_each: Sequence[Tensor] = sums.split(heights)
        return of_each

    def settled(self) -> tuple[list[int], list[list[Tensor]]]:
        """Once all parts are in: whose, and for each kind theirs, those of a shard's rows; collectives for DTensors."""
        members = sorted(self._parts[0])
        return members, [[self._whole(member, found[member]) for member in members] for found in self._parts]

    def _whole(self, member: int, parts: Sequence[tuple[int, Tensor]]) -> Tensor:
        whole = parts[0][1]
        if len(parts) > 1:
            last_row, last = parts[-1]
            whole = last.new_zeros(last_row + len(last))
            for row, sums in parts:
                whole[row : row + len(sums)] += sums
        return row_sums_over_shards(whole, self._params[member])


def _sum_over_rows(tensor: Tensor) -> Tensor:
    """Of few elements in double precision, so that how they lie in memory does not show."""
    dtype = widest_dtype(tensor.device) if tensor.numel() <= FEW else tensor.dtype
    return tensor.sum(tuple(range(1, tensor.ndim)), dtype=dtype).to(tensor.dtype)
