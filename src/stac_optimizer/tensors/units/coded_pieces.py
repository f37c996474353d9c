"""How a parameter whose average is held in 8-bit codes is cut: into blocks of codes, each with its scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from stac_optimizer.tensors import codes
from stac_optimizer.tensors.units.pieces import Piece, Tensors, Unit, copy_back

__all__ = ["CodedRows", "coded_parts"]


def coded_parts(tensors: Tensors, numel: int) -> list[CodedRows]:
    """Cut such a parameter into rows of so many elements, more or less."""
    rows, columns = codes.matrix_shape(tensors.param)
    step = max(1, numel // columns)
    return [CodedRows(tensors, numel, start, min(start + step, rows)) for start in range(0, rows, step)]


class CodedRows:
    """The pieces of some rows of such a parameter: three dimensions, the last that of a block of codes.

    Args:
        tensors: of the parameter.
        numel: how many elements a piece may have at most, more or less.
        start: the first row.
        stop: the row after the last.
    """

    def __init__(self, tensors: Tensors, numel: int, start: int, stop: int) -> None:
        assert tensors.scale is not None
        self.tensors, self.scale, self.numel, self.start, self.stop = tensors, tensors.scale, numel, start, stop
        self.columns = codes.matrix_shape(tensors.param)[1]

    def __iter__(self) -> Iterator[Piece]:
        pieces, copies = self._cut_rows()
        yield from pieces
        copy_back(copies)

    def as_recorded(self, index: int) -> Unit:
        """All of the parameter at this position, as one unit that is gone through once."""
        pieces, copies = self._cut_rows() if self.stop else ((), ())
        return Unit([list(pieces)], (index,), (), copies)

    def _cut_rows(self) -> tuple[Iterable[Piece], Sequence[tuple[Tensor, Tensor]]]:
        """The pieces, and what of the rows is worked on in copies."""
        start, stop = self.start, self.stop
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
