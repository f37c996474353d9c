"""The discrete Laplacian of whole tensors: what each value's neighbours have more than it has, edges joined.

A product and its sum are two operations each, so that a field has the same bits alone and in a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer.tensors.units.cutting import BLOCK_NUMEL
from stac_optimizer.tensors.units.pieces import is_recorded

__all__ = ["STENCILS", "diffuse_", "diffused_wholes", "has_neighbours"]

STENCILS: Mapping[str, tuple[float, float]] = {"9point": (2 / 3, 1 / 6), "5point": (1.0, 0.0)}
"""By name the weights of the four neighbours at a value's sides and of the four at its corners."""

# A line of fewer elements, or a field of fewer rows or columns, is left as it is.
LEAST_LINE, LEAST_SIDE = 4, 3
# Elements of the rows that are worked on at once: with half a dozen temporaries they stay in cache.
ROWS_NUMEL = BLOCK_NUMEL // 2


def diffuse_(fields: Tensor, factor: float, stencil: str) -> None:
    """In place x ← x + factor · Δx.

    Args:
        fields: several of (values), which are lines, or of (rows, columns) and more dimensions, one with the columns.
        factor: by how much.
        stencil: of fields, a name in ``STENCILS``.
    """
    if fields.ndim == 2:
        fields.copy_(_lines(fields, factor))
    else:
        _diffuse_in_rows_(fields.flatten(2), factor, *STENCILS[stencil])


def diffused_wholes(tensors: Sequence[Tensor], factor: float, stencil: str, least: int) -> list[Tensor]:
    """In place the same for whole and contiguous tensors; real and imaginary parts are fields of their own.

    Args:
        tensors: some may have no neighbours.
        factor: by how much.
        stencil: a name in ``STENCILS``.
        least: of how many elements a tensor must be.
    """
    for tensor in tensors:
        if has_neighbours(tensor.shape, least):
            parts = torch.view_as_real(tensor).movedim(-1, 0) if tensor.is_complex() else tensor.unsqueeze(0)
            diffuse_(parts, factor, stencil)
    return list(tensors)


def has_neighbours(shape: Sequence[int], least: int) -> bool:
    """Whether a tensor of this shape is large enough, of ``least`` elements and more."""
    if math.prod(shape) < least:
        return False
    return math.prod(shape) >= LEAST_LINE if len(shape) < 2 else min(shape[0], math.prod(shape[1:])) >= LEAST_SIDE


def _lines(lines: Tensor, factor: float) -> Tensor:
    """X + factor · (left − 2 x + right)."""
    laplacian = torch.roll(lines, 1, -1) + torch.roll(lines, -1, -1) - lines * 2
    return lines + laplacian * factor


def _diffuse_in_rows_(fields: Tensor, factor: float, side: float, corner: float) -> None:
    """In place, some rows at once between copies of the rows above and below, of which one is written already."""
    rows = fields.shape[1]
    some = rows if is_recorded() else max(1, ROWS_NUMEL // (fields.shape[0] * fields.shape[2]))
    first, above = fields[:, :1].clone(), fields[:, -1:]
    for start in range(0, rows, some):
        below = fields[:, start + some : start + some + 1] if start + some < rows else first
        framed = torch.cat([above, fields[:, start : start + some], below], dim=1)
        fields[:, start : start + some] = _between(framed, factor, side, corner)
        above = framed[:, -2:-1]


def _between(framed: Tensor, factor: float, side: float, corner: float) -> Tensor:
    """X + factor · (side · its four sides + corner · its four corners − 4 (side + corner) x), but of the outer rows.

    The sum of what cancels is taken before it is multiplied, so that what is even stays so to the last bit or two.
    """
    beside = torch.roll(framed, 1, -1) + torch.roll(framed, -1, -1)
    across = framed * side  # what a row adds to those above and below it
    if corner:
        across = across + beside * corner
    laplacian = across[:, 2:] + across[:, :-2]
    laplacian += beside[:, 1:-1] * side
    laplacian -= framed[:, 1:-1] * (4 * (side + corner))
    laplacian *= factor
    return laplacian.add_(framed[:, 1:-1])
