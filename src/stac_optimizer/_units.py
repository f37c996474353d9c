"""How an elementwise in-place update is cut into units of work that stay in cache. Knows no rule.

Note [Units of work]. An update of several elementwise operations is bound by memory for large tensors, each operation
being a trip through the whole of them, and by calls for small ones. So large ones are cut into blocks that stay in
cache, which also bounds the memory of temporaries, and on the CPU small ones are packed into blocks, at the price of
copying them in and out. The same operations run on the same elements, so no bit changes. torch.compile, which fuses by
itself, and a differentiated step get whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stac_optimizer import _codes, _tensors

__all__ = [
    "Piece",
    "Scratch",
    "Unit",
    "block_numel",
    "blocks",
    "buckets",
    "copy_back",
    "filled",
    "is_recorded",
    "units",
]

# Elements of a block on the CPU. The four tensors that a block works on (weight, gradient, average, one temporary) then
# stay in the cache of a core or of its neighbours; smaller blocks pay more calls, larger ones trips to memory.
BLOCK_NUMEL = 512 * 1024
# The same for averages in codes, whose update without kernel has half a dozen temporaries, on all devices.
CODED_NUMEL = 256 * 1024
# Where a call costs more beside the bytes, on other devices and for compiled kernels: a temporary of 8 MiB in float32.
LARGE_NUMEL = 2 * 1024 * 1024
# A tensor of at most this many elements is packed with others until they fill a block.
PACK_NUMEL = 16 * 1024


Item = TypeVar("Item")


class Piece(NamedTuple):
    """A part of one parameter, or a pack of whole ones.

    Args:
        tensors: its part of every list: weight, gradient, state.
        offset: the index, within the memory of the parameter, of its first element.
        strides: how much one step along each of its dimensions adds to that index.
    """

    tensors: tuple[Tensor, ...]
    offset: int = 0
    strides: tuple[int, ...] = (1,)


class Unit(NamedTuple):
    """What an update must look at before it writes to any of it, where it depends on a whole parameter.

    Args:
        pieces: may be gone through several times; what was written to a piece is in place once the next is asked for,
            but for ``copies``.
        members: the positions of its parameters in the lists; several for a pack.
        sizes: of a pack, whose one piece is flat, the elements of each parameter in it; else empty.
        copies: tensors, and what was worked on in their place, for :func:`copy_back` once all pieces are done. Only
            while a step is recorded: dynamo of torch 2.6 goes through all of ``pieces`` before it works on the first.
    """

    pieces: Iterable[Piece]
    members: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    copies: Sequence[tuple[Tensor, Tensor]] = ()


class Scratch:
    """Memory for temporaries of one piece after the other, two at a time.

    On the CPU memory fresh from the system costs a page fault for every 4 KiB, several times what the arithmetic takes.
    """

    def __init__(self) -> None:
        self._held = [torch.empty(0, device="cpu")] * 2

    def like(self, tensor: Tensor, place: int = 0) -> Tensor:
        """A tensor of this shape, dtype, device and layout, of any values.

        Args:
            tensor: whose like it is.
            place: 0 or 1; the next call for the same place takes its memory.
        """
        if type(tensor) is not Tensor or not tensor.is_contiguous():
            return torch.empty_like(tensor)
        held, numel = self._held[place], tensor.numel()
        if held.numel() < numel or held.dtype != tensor.dtype or held.device != tensor.device:
            self._held[place] = held = torch.empty(numel, dtype=tensor.dtype, device=tensor.device)
        return held[:numel].view(tensor.shape)


def is_recorded() -> bool:
    """Whether the step is recorded, by torch.compile or for its derivative."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def copy_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put what was worked on in copies, the second of each pair, where it belongs."""
    for tensor, worked_on in copies:
        tensor.copy_(worked_on)


def block_numel(tensor: Tensor) -> int:
    """Elements of a block on this tensor's device."""
    return BLOCK_NUMEL if tensor.is_cpu else LARGE_NUMEL


def units(tensorlists: Sequence[list[Tensor]], *, pack: bool = True, cut: bool = True) -> Iterator[Unit]:
    """Split an update into units of work.

    Args:
        tensorlists: the weights; the gradients, which the update only reads; then the state. Local and real.
        pack: whether parameters may share a unit.
        cut: whether tensors of one dense layout are cut into blocks; where not, those in codes are in larger ones.
    """
    is_whole = is_recorded()
    packed = _packable(tensorlists) if pack and not is_whole else {}
    are_packed = {index for members in packed.values() for index in members}
    for index in range(len(tensorlists[0])):
        if index in are_packed:
            continue
        tensors = tuple([held[index] for held in tensorlists])
        first = tensors[0]
        if _codes.is_coded(tensors) and is_whole:
            yield _CodedPieces(tensors, first.numel()).as_recorded(index)
        elif _codes.is_coded(tensors):
            numel = LARGE_NUMEL if not cut and _codes.has_whole_blocks(tensors) else CODED_NUMEL
            yield Unit(_CodedPieces(tensors, numel), (index,))
        elif is_whole:
            yield Unit([_whole(tensors)], (index,))
        else:
            yield Unit(blocks(*tensors, numel=block_numel(first) if cut else None), (index,))
    for members in packed.values():
        for some in filled(members, [tensorlists[0][index].numel() for index in members], BLOCK_NUMEL):
            if len(some) == 1:
                yield Unit([_whole(tuple([tensors[some[0]] for tensors in tensorlists]))], tuple(some))
                continue
            pieces = _Pack([[tensors[index] for index in some] for tensors in tensorlists])
            yield Unit(pieces, tuple(some), tuple(pieces.sizes))


def _packable(tensorlists: Sequence[list[Tensor]]) -> dict[tuple[torch.dtype, ...], list[int]]:
    """Positions of small parameters that can share units, by dtypes; list by list, for there may be thousands."""
    if _codes.is_coded([tensors[0] for tensors in tensorlists if tensors]):
        return {}
    fits = [
        small and all(contiguous)
        for small, *contiguous in zip(
            [param.numel() <= PACK_NUMEL and param.is_cpu for param in tensorlists[0]],
            *(map(Tensor.is_contiguous, tensors) for tensors in tensorlists),
            strict=True,
        )
    ]
    positions = [index for index, fit in enumerate(fits) if fit]
    if all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in tensorlists):
        return {(): positions}
    packed: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index in positions:
        packed.setdefault(tuple([tensors[index].dtype for tensors in tensorlists]), []).append(index)
    return packed


def buckets(tensorlists: Sequence[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Cut large tensors, and deal all out into lists of about one block's elements, for operations on lists."""
    cut = [
        piece.tensors
        for tensors in zip(*tensorlists, strict=True)
        for piece in blocks(*tensors, numel=block_numel(tensors[0]))
    ]
    if cut:
        for some in filled(cut, [tensors[0].numel() for tensors in cut], block_numel(cut[0][0])):
            yield [list(tensors) for tensors in zip(*some, strict=True)]


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


def blocks(*tensors: Tensor, numel: int | None) -> list[Piece]:
    """Cut tensors of one shape into views of at most so many elements.

    Tensors of one dense layout are cut as they lie in memory, with ``None`` into a single view without gaps; others are
    sliced along their longest dimensions.
    """
    first = tensors[0]
    is_plain = all(map(Tensor.is_contiguous, tensors))  # and then the faster of two ways will do
    if is_plain and numel is None:
        return [Piece(tensors, strides=first.stride())]
    is_small = numel is not None and first.numel() <= numel
    if is_small or not (is_plain or all(_tensors.has_layout_of(tensor, first) for tensor in tensors)):
        return _sliced(_whole(tensors), numel or block_numel(first))
    flat = [tensor.view(-1) if is_plain else tensor.as_strided((first.numel(),), (1,)) for tensor in tensors]
    if numel is None:
        return [Piece(tuple(flat))]
    starts = range(0, first.numel(), numel)
    return [Piece(tuple([tensor[start : start + numel] for tensor in flat]), start) for start in starts]


def _whole(tensors: tuple[Tensor, ...]) -> Piece:
    first = tensors[0]
    strides = first.stride() if _tensors.is_dense(first) else torch.empty(first.shape, device="meta").stride()
    return Piece(tensors, strides=strides)


def _sliced(piece: Piece, numel: int) -> list[Piece]:
    first = piece.tensors[0]
    if first.numel() <= numel:
        return [piece]
    dim = max(range(first.ndim), key=first.shape.__getitem__)
    step = max(1, numel * first.shape[dim] // first.numel())
    slices = zip(*(tensor.split(step, dim) for tensor in piece.tensors), strict=True)
    return [
        smaller
        for count, tensors in enumerate(slices)
        for smaller in _sliced(
            piece._replace(tensors=tensors, offset=piece.offset + count * step * piece.strides[dim]), numel
        )
    ]


class _CodedPieces:
    """The pieces of a parameter whose average is held in codes: three dimensions, the last that of a block of codes."""

    def __init__(self, tensors: tuple[Tensor, ...], numel: int) -> None:
        *self.matrices, self.scale = tensors
        self.rows, self.columns = _codes.matrix_shape(tensors[0])
        self.numel = numel

    def __iter__(self) -> Iterator[Piece]:
        step = max(1, self.numel // self.columns)
        for start in range(0, self.rows, step):
            pieces, copies = self._cut_rows(start, start + step)
            yield from pieces
            copy_back(copies)

    def as_recorded(self, index: int) -> Unit:
        """All of the parameter at this position, as one unit that is gone through once."""
        pieces, copies = self._cut_rows(0, self.rows) if self.rows else ((), ())
        return Unit(list(pieces), (index,), (), copies)

    def _cut_rows(self, start: int, stop: int) -> tuple[Iterable[Piece], Sequence[tuple[Tensor, Tensor]]]:
        """The pieces of some rows, and what of the rows is worked on in copies."""
        held = [tensor[start:stop] for tensor in self.matrices]
        flat = [tensor.flatten(1) for tensor in held]  # views where the layout allows, else copies
        pieces = self._cut_columns([*flat, self.scale[start:stop]], start * self.columns)
        weight, _, *state = zip(held, flat, strict=True)  # gradients are read-only
        copies = [(tensor, part.view_as(tensor)) for tensor, part in (weight, *state) if not tensor.is_contiguous()]
        return pieces, copies

    def _cut_columns(self, matrices: list[Tensor], offset: int) -> Iterator[Piece]:
        """Parts of whole blocks, and the rest that is shorter than a block."""
        *flat, scale = matrices
        block = _codes.BLOCK
        whole = self.columns // block * block
        step = max(1, self.numel // block) * block
        spans = [(start, min(start + step, whole), block) for start in range(0, whole, step)]
        if whole < self.columns:
            spans.append((whole, self.columns, self.columns - whole))
        for start, stop, width in spans:
            parts = [tensor[:, start:stop].unflatten(1, (-1, width)) for tensor in flat]
            part_scale = scale[:, start // block : (stop + block - 1) // block].unsqueeze(-1)
            yield Piece((*parts, part_scale), offset + start, (self.columns, block, 1))


class _Pack:
    """The one piece of several small parameters: flat copies, written back after they were worked on."""

    def __init__(self, tensorlists: Sequence[list[Tensor]]) -> None:
        self.originals = [[t if t.ndim == 1 else t.flatten() for t in tensors] for tensors in tensorlists]
        self.sizes = [tensor.numel() for tensor in self.originals[0]]
        self.flat = tuple(torch.cat(tensors) for tensors in self.originals)

    def __iter__(self) -> Iterator[Piece]:
        yield Piece(self.flat)
        for index, (tensors, result) in enumerate(zip(self.originals, self.flat, strict=True)):
            if index != 1:  # gradients are read-only
                torch.split_with_sizes_copy(result, self.sizes, out=tensors)
