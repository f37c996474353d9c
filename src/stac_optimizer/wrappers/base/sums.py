"""Sums over parameters, and over the ranks that hold parts of them, in few collectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_cut
from stac_optimizer.tensors.precision import upcast, widest_dtype
from stac_optimizer.tensors.units.cutting import block_numel, filled

__all__ = ["places_of_alike", "products"]

# A tensor of at most this many elements is multiplied together with others.
SMALL_NUMEL = 16 * 1024


def places_of_alike(params: Sequence[Any]) -> Mapping[Any, list[int]]:
    """Places of parameters that are cut alike over the same ranks; under None of those that each rank has whole."""
    alike: dict[Any, list[int]] = {}
    for place, param in enumerate(params):
        key = (param.device_mesh, tuple(param.placements)) if is_cut(param) else None
        alike.setdefault(key, []).append(place)
    return alike


def products(lists: Sequence[list[Tensor]], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Sums over all elements of products, in float64 where the device has it.

    Args:
        lists: of real tensors, of one device and, list for list, of the same shapes; not empty.
        pairs: for each sum the places of the two lists that are multiplied.
    """
    held = [torch.stack([torch.dot(runs[one], runs[other]) for one, other in pairs]) for runs in _runs(lists)]
    return torch.stack(held).sum(0, dtype=widest_dtype(held[0].device))


def _runs(lists: Sequence[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Runs of elements in arithmetic precision, of each list one: parts of large tensors, and small ones together."""
    sizes = [tensor.numel() for tensor in lists[0]]
    small = [place for place, size in enumerate(sizes) if size <= SMALL_NUMEL]
    most = block_numel(lists[0][0])
    for places in filled(small, [sizes[place] for place in small], most):
        yield [upcast(torch.cat([tensors[place].reshape(-1) for place in places])) for tensors in lists]
    for place, size in enumerate(sizes):
        if size > SMALL_NUMEL:
            for runs in zip(*(tensors[place].reshape(-1).split(most) for tensors in lists), strict=True):
                yield list(map(upcast, runs))
