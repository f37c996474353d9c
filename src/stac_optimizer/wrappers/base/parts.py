"""What this rank holds of parameters and of what is kept of them, in lists that one call can take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import real_parts
from stac_optimizer.tensors.layouts import indices_by_device_and_dtype
from stac_optimizer.tensors.units.cutting import block_numel, filled, units
from stac_optimizer.tensors.units.pieces import Lists, Tensors

__all__ = ["by_kind", "copy_all", "units_of_lists"]


def by_kind(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Local parts of tensors, as real numbers, in lists of one device and dtype each.

    Args:
        lists: the same number of tensors each; those of a gradient go behind those of its parameter, whose placement
            it is brought to.
    """
    local = [real_parts(list(lists[0]))]
    local += [real_parts(list(tensors), list(lists[0])) for tensors in lists[1:]]
    for indices in indices_by_device_and_dtype(local) if lists[0] else ():
        yield tuple([tensors[index] for index in indices] for tensors in local)


def units_of_lists(lists: Lists) -> Iterator[Sequence[list[Tensor]]]:
    """Packs of small tensors, and lists of about one block's elements, list by list (Note [Units of work]).

    Args:
        lists: of one device and dtype each; all but the gradients may be written to.
    """
    kinds = range(len(lists.flat()))
    waiting: list[Tensors] = []
    for unit in units(lists):
        for piece in chain.from_iterable(unit.parts):
            if unit.sizes:  # a pack is written back when the next is asked for
                yield [[tensor] for tensor in piece.tensors.flat()]
            else:
                waiting.append(piece.tensors)
    sizes = [tensors.param.numel() for tensors in waiting]
    for some in filled(waiting, sizes, block_numel(lists.params[0])):
        flat = [tensors.flat() for tensors in some]
        yield [[each[kind] for each in flat] for kind in kinds]


def copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors to others of the same dtypes, and let autograd know."""
    for target, source in by_kind(targets, sources):
        torch._foreach_copy_(target, source)
    torch.autograd.graph.increment_version(targets)
