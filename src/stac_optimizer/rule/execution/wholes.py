"""What an update can ask of whole parameters, of which it may see parts alone: blocks, packs, shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.dealing import DtypeOf, WholeFunction, dealt_out
from stac_optimizer.distributed.shards import (
    roots_of_sums_over_shards,
    sum_over_shards,
    sums_over_rows,
    which_are_cut,
)
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.precision import widest_dtype
from stac_optimizer.tensors.units.pieces import Unit, is_recorded

__all__ = ["Factors", "Norms", "Wholes"]

# Norms whose squares float32 holds, as it does those of all that counts among their elements.
FITS = (1e-10, 1e18)
# Elements of which the norm costs little in double precision too.
FEW = 16 * 1024


class Norms:
    """Norms of whole parameters, put together of those of their parts, which come one after the other.

    In double precision at least where squares of numbers in float32 overflow or vanish.

    Args:
        params: the parameters as the optimizer holds them.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._places: dict[int, list[int]] = {}  # of each parameter's parts, in the matrix of their norms
        self._norms: list[Tensor] = []  # parts of that, a row for each kind
        self._dtype = torch.float64

    def add(self, units: Sequence[Unit], rows: Sequence[int], kinds: Sequence[Sequence[Tensor]]) -> None:
        """Take in, for each kind, the tensors that belong to these units; one of a pack is flat."""
        start = sum(norms.shape[1] for norms in self._norms)
        for place, member in enumerate([member for unit in units for member in unit.members], start):
            self._places.setdefault(member, []).append(place)
        self._norms.append(torch.stack([_norms(units, tensors) for tensors in kinds]))
        self._dtype = kinds[0][0].dtype

    def settled(self) -> tuple[list[int], list[list[Tensor]]]:
        """Once all parts are in: whose, and for each kind theirs; one collective for all DTensors cut alike."""
        norms = torch.cat(self._norms, 1)
        members = sorted(self._places)  # ranks pack and list parts by their sizes, which are not the same on all
        params = [self._params[member] for member in members]
        if len(members) < norms.shape[1] or which_are_cut(params):
            wholes = [torch.linalg.vector_norm(norms[:, self._places[member]], dim=1) for member in members]
            norms = torch.stack(roots_of_sums_over_shards(wholes, params), 1)
        else:
            members = list(self._places)
        return members, [list(of_kind.unbind()) for of_kind in norms.to(self._dtype)]


def _norms(units: Sequence[Unit], tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each parameter's part."""
    dtype = widest_dtype(tensors[0].device)
    if units[0].sizes:
        (pack,), (unit,) = tensors, units
        return torch.segment_reduce(pack.to(dtype).square(), "sum", lengths=torch.tensor(unit.sizes)).sqrt()
    if not tensors[0].is_cpu or not has_data(tensors[0]) or is_recorded():
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype))
    return torch.stack([_norm_on_cpu(tensor) for tensor in tensors])


def _norm_on_cpu(tensor: Tensor) -> Tensor:
    """In float32 where that serves, for on the CPU double precision takes four times as long."""
    if tensor.numel() > FEW:
        norm: Tensor = torch.linalg.vector_norm(tensor)
        if FITS[0] < norm.item() < FITS[1]:
            return norm.to(torch.float64)
    exact: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return exact


class Factors:
    """Numbers for whole parameters, or for each of their rows, handed out to parts of them.

    Args:
        members: the positions of the parameters.
        kinds: for each kind theirs.
    """

    def __init__(self, members: Sequence[int], kinds: Sequence[Sequence[Tensor]]) -> None:
        self._kinds = [dict(zip(members, values, strict=True)) for values in kinds]

    def of(self, units: Sequence[Unit], rows: Sequence[int], parts: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each kind and part what multiplies it: a number, or of a pack and of rows one for each element or row."""
        return [
            [_over(values, unit, row, part) for unit, row, part in zip(units, rows, parts, strict=True)]
            for values in self._kinds
        ]


def _over(values: dict[int, Tensor], unit: Unit, row: int, part: Tensor) -> Tensor:
    if unit.sizes:
        numbers = [values[member] for member in unit.members]
        if not numbers[0].ndim:
            return torch.stack(numbers).repeat_interleave(torch.tensor(unit.sizes))
        heights = list(map(len, numbers))
        widths = torch.tensor([size // max(height, 1) for size, height in zip(unit.sizes, heights, strict=True)])
        return torch.cat(numbers).repeat_interleave(widths.repeat_interleave(torch.tensor(heights)))
    value = values[unit.members[0]]
    return value[row : row + len(part)].view(-1, *[1] * (part.ndim - 1)) if value.ndim else value


class Wholes:
    """What an update can ask of whole parameters, whose shards may lie on several ranks.

    Args:
        params: the parameters as the optimizer holds them.
        shares: whether ranks that all hold whole parameters share out what is computed of them.
        settled: for each list that the rule's ``settled`` returned, numbers of whole parameters, each a tensor that a
            part can be multiplied by. Where it has none of its own, they are ``norms``.
    """

    def __init__(self, params: Sequence[Tensor], *, shares: bool = False, settled: Sequence[list[Tensor]] = ()) -> None:
        self._params, self._shares = params, shares
        self.settled = settled

    @property
    def norms(self) -> Sequence[list[Tensor]]:
        """For each list that the rule's ``measured`` returned the norms over whole parameters."""
        return self.settled

    @property
    def numels(self) -> list[int]:
        """The elements of each whole parameter, complex ones counted as two reals."""
        return [param.numel() * (2 if param.is_complex() else 1) for param in self._params]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each whole parameter; in an update of a pack that of its first."""
        return [param.shape for param in self._params]

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What the part on this rank contributes to a sum over each parameter, added up; a collective for DTensors."""
        return [sum_over_shards(value, param) for value, param in zip(values, self._params, strict=True)]

    def sums_over_rows(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What the rows on this rank contribute to sums over all, values of one shape; a collective for DTensors."""
        return sums_over_rows(values, self._params)

    def apply(self, function: WholeFunction, parts: Sequence[Tensor], dtype_of: DtypeOf) -> list[Tensor]:
        """This rank's parts of what a function makes of whole tensors, each computed by one of the ranks; a collective.

        Args:
            function: from whole tensors to as many of the same shapes.
            parts: of each parameter this rank's part of such a tensor.
            dtype_of: tells the dtype of what it makes.
        """
        return dealt_out(function, parts, self._params, dtype_of, shares=self._shares)
