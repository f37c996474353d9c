"""How an elementwise in-place update is cut into units of work that stay in cache (Note [Units of work]).

Knows no rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stac_optimizer.tensors import codes
from stac_optimizer.tensors.kinds import PLAIN_TYPES, has_data, has_own_operations
from stac_optimizer.tensors.layouts import has_layout_of, is_dense, overlap
from stac_optimizer.tensors.units.coded_pieces import CodedRows, coded_parts
from stac_optimizer.tensors.units.pieces import Lists, Piece, Tensors, Unit, is_recorded

__all__ = ["block_numel", "blocks", "buckets", "filled", "rows", "units"]

# Elements of a block on the CPU. The four tensors that a block works on (weight, gradient, average, one temporary) then
# stay in the cache of a core or of its neighbours; smaller blocks pay more calls, larger ones trips to memory.
BLOCK_NUMEL = 512 * 1024
# The same for averages in codes, whose update without kernel has half a dozen temporaries, on all devices.
CODED_NUMEL = 512 * 1024
# Where a call costs more beside the bytes, on other devices: a temporary of 8 MiB in float32.
LARGE_NUMEL = 2 * 1024 * 1024
# A tensor of at most this many elements is packed with others until they fill a block.
PACK_NUMEL = 16 * 1024


Item = TypeVar("Item")


def block_numel(tensor: Tensor) -> int:
    """Elements of a block on this tensor's device."""
    return BLOCK_NUMEL if tensor.is_cpu else LARGE_NUMEL


def units(lists: Lists, *, pack: bool = True, numel: int | None = None) -> Iterator[Unit]:
    """Split an update into units of work.

    Args:
        lists: of the parameters.
        pack: whether parameters may share a unit.
        numel: the most elements of a block, by default those of the device.
    """
    is_whole = is_recorded()
    packed = _packable(lists) if pack and not is_whole else {}
    are_packed = {index for members in packed.values() for index in members}
    for index in range(len(lists.params)):
        if index in are_packed:
            continue
        tensors = lists.at(index)
        most = tensors.param.numel() if is_whole else numel or block_numel(tensors.param)
        if tensors.scale is not None and is_whole:
            yield CodedRows(tensors, most, 0, codes.matrix_shape(tensors.param)[0]).as_recorded(index)
        elif tensors.scale is not None:
            yield Unit(coded_parts(tensors, min(most, CODED_NUMEL)), (index,))
        elif is_whole:
            yield Unit([[_whole(tensors)]], (index,))
        else:
            yield Unit([[piece] for piece in blocks(tensors, numel=most)], (index,))
    # The last that goes into a pack may be of PACK_NUMEL elements.
    full = BLOCK_NUMEL if numel is None or numel >= BLOCK_NUMEL else max(1, numel - PACK_NUMEL)
    for members in packed.values():
        for some in filled(members, [lists.params[index].numel() for index in members], full):
            if len(some) == 1:
                yield Unit([[_whole(lists.at(some[0]))]], tuple(some))
            else:
                pieces = _Pack(lists.only(some))
                yield Unit([pieces], tuple(some), tuple(pieces.sizes))


def _packable(lists: Lists) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Positions of small parameters that can share units, by dtypes; list by list, for there may be thousands."""
    if lists.scales is not None:
        return {}
    positions = [index for index, param in enumerate(lists.params) if param.numel() <= PACK_NUMEL and param.is_cpu]
    if not all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists.flat()):
        positions = [index for index in positions if all(tensors[index].is_contiguous() for tensors in lists.flat())]
    small = [lists.params[index] for index in positions]
    if PLAIN_TYPES.issuperset(map(type, small)) and all(map(has_data, small[:1])):
        for place in sorted(overlap(small), reverse=True):  # of two copies, what is written to one would be lost
            del positions[place]
    if all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists.flat()):
        return {(): positions}
    packed: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index in positions:
        packed.setdefault(tuple([tensors[index].dtype for tensors in lists.flat()]), []).append(index)
    return packed


def buckets(lists: Lists) -> Iterator[Lists]:
    """Cut large tensors, and deal all out into lists of about one block's elements, for operations on lists."""
    cut = [
        piece.tensors
        for index, param in enumerate(lists.params)
        for piece in blocks(lists.at(index), numel=block_numel(param))
    ]
    if cut:
        for some in filled(cut, [tensors.param.numel() for tensors in cut], block_numel(cut[0].param)):
            params, grads, states, _ = zip(*some, strict=True)
            yield Lists(list(params), list(grads), [list(tensors) for tensors in zip(*states, strict=True)])


def filled(items: Sequence[Item], sizes: Sequence[int], full: int) -> Iterator[list[Item]]:
    """Deal items out into lists, a list ending with the item that fills it."""
    held: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        held.append(item)
        total += size
        if total >= full:
            yield held
            held, total = [], 0
    if held:
        yield held


def blocks(tensors: Tensors, *, numel: int | None) -> list[Piece]:
    """Cut tensors of one shape into views of at most so many elements.

    Tensors of one dense layout are cut as they lie in memory, with ``None`` into a single view without gaps; others,
    which no kernel walks, are sliced along their longest dimensions, into blocks of the device at most.
    """
    first, held = tensors.param, tensors.flat()
    if any(map(has_own_operations, held)):  # whose views need not be views
        return [_whole(tensors)]
    is_plain = all(map(Tensor.is_contiguous, held))  # and then the faster of two ways will do
    most = block_numel(first) if numel is None else min(numel, block_numel(first))
    if is_plain if numel is None else first.numel() <= most:
        return [_whole(tensors)]
    if not (is_plain or all(has_layout_of(tensor, first) for tensor in held)):
        return _sliced(_whole(tensors), most)
    if numel is not None and first.numel() <= numel:
        return [_whole(tensors)]
    flat = [tensor.view(-1) if is_plain else tensor.as_strided((first.numel(),), (1,)) for tensor in held]
    if numel is None:
        return [Piece(_as_tensors(flat))]
    starts = range(0, first.numel(), numel)
    return [Piece(_as_tensors([tensor[start : start + numel] for tensor in flat]), start) for start in starts]


def rows(tensors: Tensors, *, numel: int) -> Iterator[tuple[int, Piece]]:
    """Cut tensors of one shape between rows, indices of their first dimension, and rows of more elements in themselves.

    Args:
        tensors: of one dimension at least.
        numel: the most elements of a piece.

    Yields:
        The first row of a piece, and the piece, of as many dimensions as the tensors.
    """
    whole, first = _whole(tensors), tensors.param
    if first.numel() <= numel or is_recorded() or any(map(has_own_operations, tensors.flat())):
        yield 0, whole
        return
    step = max(1, numel * first.shape[0] // first.numel())
    for count, some in enumerate(zip(*(tensor.split(step) for tensor in tensors.flat()), strict=True)):
        piece = Piece(_as_tensors(some), whole.offset + count * step * whole.strides[0], whole.strides)
        yield from ((count * step, smaller) for smaller in _sliced(piece, numel))


def _as_tensors(flat: Sequence[Tensor]) -> Tensors:
    return Tensors(flat[0], flat[1], tuple(flat[2:]))


def _whole(tensors: Tensors) -> Piece:
    first = tensors.param
    strides = first.stride() if is_dense(first) else torch.empty(first.shape, device="meta").stride()
    return Piece(tensors, strides=strides)


def _sliced(piece: Piece, numel: int) -> list[Piece]:
    first = piece.tensors.param
    if first.numel() <= numel:
        return [piece]
    dim = max(range(first.ndim), key=first.shape.__getitem__)
    step = max(1, numel * first.shape[dim] // first.numel())
    slices = zip(*(tensor.split(step, dim) for tensor in piece.tensors.flat()), strict=True)
    return [
        smaller
        for count, tensors in enumerate(slices)
        for smaller in _sliced(
            Piece(_as_tensors(tensors), piece.offset + count * step * piece.strides[dim], piece.strides), numel
        )
    ]


class _Pack:
    """The one piece of several small parameters: flat copies, made when asked for, and written back after the work."""

    def __init__(self, lists: Lists) -> None:
        self.lists = lists
        self.sizes = [tensor.numel() for tensor in lists.params]

    def __iter__(self) -> Iterator[Piece]:
        flat = [[t if t.ndim == 1 else t.flatten() for t in tensors] for tensors in self.lists.flat()]
        packed = _as_tensors([torch.cat(tensors) for tensors in flat])
        yield Piece(packed)
        written = [flat[0], *flat[2:]]  # gradients are read-only
        for tensors, result in zip(written, packed.written(), strict=True):
            torch.split_with_sizes_copy(result, self.sizes, out=tensors)
