"""How a parameter whose average is held in 8-bit codes is cut: into blocks of codes, each with its scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from stac_optimizer.tensors import codes
from stac_optimizer.tensors.pieces import Piece, Tensors, Unit, copy_back

__all__ = ["CodedPieces"]


class CodedPieces:
    """The pieces of such a parameter: three dimensions, the last that of a block of codes.

    Args:
        tensors: of the parameter.
        numel: how many elements a piece may have at most, more or less.
    """

    def __init__(self, tensors: Tensors, numel: int) -> None:
        assert tensors.scale is not None
        self.tensors, self.scale = tensors, tensors.scale
        self.rows, self.columns = codes.matrix_shape(tensors.param)
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
        param, grad, *state = [tensor[start:stop] for tensor in self.tensors.flat()]
        # Views where the layout allows, else copies.
        held = Tensors(param.flatten(1), grad.flatten(1), tuple([tensor.flatten(1) for tensor in state]))
        pieces = self._cut_columns(held, self.scale[start:stop], start * self.columns)
        written = zip((param, *state), held.written(), strict=True)
        copies = [(tensor, part.view_as(tensor)) for tensor, part in written if not tensor.is_contiguous()]
        return pieces, copies

    def _cut_columns(self, matrices: Tensors, scale: Tensor, offset: int) -> Iterator[Piece]:
        """Parts of whole blocks, and the rest that is shorter than a block."""
        block = codes.BLOCK
        whole = self.columns // block * block
        step = max(1, self.numel // block) * block
        spans = [(start, min(start + step, whole), block) for start in range(0, whole, step)]
        if whole < self.columns:
            spans.append((whole, self.columns, self.columns - whole))
        for start, stop, width in spans:
            param, grad, *state = [tensor[:, start:stop].unflatten(1, (-1, width)) for tensor in matrices.flat()]
            part_scale = scale[:, start // block : (stop + block - 1) // block].unsqueeze(-1)
            yield Piece(Tensors(param, grad, tuple(state), part_scale), offset + start, (self.columns, block, 1))
