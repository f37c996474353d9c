"""What an update can ask of whole parameters, of which it may see parts alone: blocks, packs, shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.dealing import DtypeOf, WholeFunction, dealt_out
from stac_optimizer.distributed.shards import roots_of_sums_over_shards, sum_over_shards
from stac_optimizer.tensors.pieces import Unit

__all__ = ["Norms", "Wholes"]


class Norms:
    """Norms of whole parameters, put together of those of their parts, which come one after the other.

    Args:
        params: the parameters as the optimizer holds them.
        kinds: of how many tensors for each.
    """

    def __init__(self, params: Sequence[Tensor], kinds: int) -> None:
        self._params = params
        self._parts: list[dict[int, list[Tensor]]] = [{} for _ in range(kinds)]
        self._norms: list[dict[int, Tensor]] = []

    def add(self, units: Sequence[Unit], kinds: Sequence[Sequence[Tensor]]) -> None:
        """Take in, for each kind, the tensors that belong to these units; one of a pack is flat."""
        members = [member for unit in units for member in unit.members]
        for found, tensors in zip(self._parts, kinds, strict=True):
            flat = [
                part
                for unit, tensor in zip(units, tensors, strict=True)
                for part in (tensor.split(list(unit.sizes)) if unit.sizes else (tensor,))
            ]
            for member, norm in zip(members, torch._foreach_norm(flat), strict=True):
                found.setdefault(member, []).append(norm)

    def settle(self) -> None:
        """Once all parts are in; a collective for DTensors, one for all that are sharded alike."""
        for found in self._parts:
            local = [
                norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
                for norms in found.values()
            ]
            wholes = roots_of_sums_over_shards(local, [self._params[member] for member in found])
            self._norms.append(dict(zip(found, wholes, strict=True)))

    def of(self, units: Sequence[Unit]) -> list[list[Tensor]]:
        """For each kind and unit what multiplies its tensor: one number, or of a pack one for each element."""
        return [[_over_elements(norms, unit) for unit in units] for norms in self._norms]


def _over_elements(norms: dict[int, Tensor], unit: Unit) -> Tensor:
    if not unit.sizes:
        return norms[unit.members[0]]
    return torch.stack([norms[member] for member in unit.members]).repeat_interleave(torch.tensor(unit.sizes))


class Wholes:
    """What an update can ask of whole parameters, whose shards may lie on several ranks.

    Args:
        params: the parameters as the optimizer holds them.
        shares: whether ranks that all hold whole parameters share out what is computed of them.
        norms: for each list that the rule's ``measured`` returned, the norms over whole parameters, each a tensor
            that a part can be multiplied by.
    """

    def __init__(self, params: Sequence[Tensor], *, shares: bool = False, norms: Sequence[list[Tensor]] = ()) -> None:
        self._params, self._shares = params, shares
        self.norms = norms

    @property
    def numels(self) -> list[int]:
        """The elements of each whole parameter, complex ones counted as two reals."""
        return [param.numel() * (2 if param.is_complex() else 1) for param in self._params]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each whole parameter."""
        return [param.shape for param in self._params]

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What the part on this rank contributes to a sum over each parameter, added up; a collective for DTensors."""
        return [sum_over_shards(value, param) for value, param in zip(values, self._params, strict=True)]

    def apply(self, function: WholeFunction, parts: Sequence[Tensor], dtype_of: DtypeOf) -> list[Tensor]:
        """This rank's parts of what a function makes of whole tensors, each computed by one of the ranks; a collective.

        Args:
            function: from whole tensors to as many of the same shapes.
            parts: of each parameter this rank's part of such a tensor.
            dtype_of: tells the dtype of what it makes.
        """
        return dealt_out(function, parts, self._params, dtype_of, shares=self._shares)
