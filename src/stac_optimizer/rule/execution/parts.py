"""Parts of parameters, and which of them are updated together; of one device and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from stac_optimizer.distributed.shards import is_cut
from stac_optimizer.rule.inputs import StepInputs
from stac_optimizer.rule.moments import known_counts
from stac_optimizer.tensors.units.cutting import block_numel, filled, rows, units
from stac_optimizer.tensors.units.pieces import Lists, Piece, Unit, is_recorded

__all__ = ["Part", "cut_in_turns", "cut_parts", "in_one_part", "row_parts", "together", "whole_parts"]

# So many sharded parameters for each rank are dealt out at once: enough that their different sizes even out. Of plain
# ones, of which each rank has all in memory, one.
DEALT = 4


class Part(NamedTuple):
    """A piece of the parameters at these places of the lists.

    Args:
        piece: the piece.
        unit: whose members are those places, several of a pack.
        row: the first row of a piece cut between rows.
    """

    piece: Piece
    unit: Unit
    row: int = 0


def whole_parts(lists: Lists, indices: Sequence[int]) -> Iterator[Part]:
    """Each parameter by itself."""
    for index in indices:
        yield Part(Piece(lists.at(index), strides=lists.params[index].stride()), Unit((), (index,)))


def row_parts(lists: Lists, indices: Sequence[int]) -> Iterator[Part]:
    """Blocks cut between rows."""
    for index in indices:
        for row, piece in rows(lists.at(index), numel=block_numel(lists.params[index])):
            yield Part(piece, Unit((), (index,)), row)


def cut_parts(lists: Lists, indices: Sequence[int], inputs: StepInputs) -> Iterator[Part]:
    """Blocks and packs."""
    for parts, _ in cut_in_turns(lists, indices, inputs):
        yield from parts


def cut_in_turns(
    lists: Lists, indices: Sequence[int], inputs: StepInputs, numel: int | None = None
) -> Iterator[tuple[Iterator[Part], int]]:
    """The same, in what one thread goes through, and how many elements that has.

    What is in one pack has taken as many steps.

    Args:
        lists: of the parameters.
        indices: the places of those to cut.
        inputs: of the step.
        numel: the most elements of a block, by default those of the device.
    """
    steps = [inputs.states["step"][index] for index in indices]
    by_step: dict[float, list[int]] = {}
    is_told = steps and lists.params[indices[0]].is_cpu and not is_recorded()
    counts = known_counts(steps) if is_told else None
    for index, count in zip(indices, counts or [0.0] * len(steps), strict=True):
        by_step.setdefault(count, []).append(index)
    for some in by_step.values():
        for unit in units(lists.only(some), numel=numel):
            places = Unit((), tuple([some[member] for member in unit.members]), unit.sizes)
            total = sum([lists.params[place].numel() for place in places.members])
            for part in unit.parts:
                yield _placed(part, places), total // len(unit.parts)


def _placed(pieces: Iterable[Piece], places: Unit) -> Iterator[Part]:
    for piece in pieces:
        yield Part(piece, places)


def in_one_part(lists: Lists, indices: Sequence[int]) -> list[int]:
    """Those of these places that :func:`cut_parts` and :func:`row_parts` leave in one part."""
    most = math.inf if is_recorded() or not indices else block_numel(lists.params[indices[0]])
    return [index for index in indices if lists.params[index].numel() <= most]


def together(parts: Iterable[Part], params: Sequence[Tensor], *, is_single: bool, ranks: int) -> Iterator[list[Part]]:
    """What is updated together: single pieces and packs, or lists of about one block's elements.

    Args:
        parts: of one device and dtype.
        params: the parameters as the optimizer holds them.
        is_single: whether pieces go one by one.
        ranks: how many ranks whole parameters are dealt out to, some for each.
    """
    waiting: list[Part] = []
    for part in parts:
        if is_single or part.unit.sizes:  # a pack is written back when the next is asked for
            yield [part]
        else:
            waiting.append(part)
    if waiting:
        full = block_numel(waiting[0].piece.tensors.param)
        sizes = [part.piece.tensors.param.numel() for part in waiting]
        if ranks > 1:  # by whole ones, for lists must be the same on all ranks, whose parts are not
            wholes = [params[part.unit.members[0]] for part in waiting]
            sizes = [min(whole.numel(), full // (DEALT if is_cut(whole) else 1)) // ranks for whole in wholes]
        yield from filled(waiting, sizes, full)
