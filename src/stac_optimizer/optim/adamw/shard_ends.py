"""The last elements of shards under torch's fused AdamW on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.optim.adamw.update import AdamWUpdate, call_adamw
from stac_optimizer.tensors.torch_private import local_shape_and_offsets
from stac_optimizer.tensors.units.pieces import Tensors

__all__ = ["ends_elsewhere", "fused_on_shard"]

# Note [Fused AdamW and shards]
# On the CPU torch's fused kernel rounds differently in the last elements of a tensor, which do not fill a vector. So
# that a shard gets the bits of the whole, its last elements are computed among others that fill vectors, and what it
# has of the whole's end in its place there. This many elements are whole vectors on every CPU.
LANES = 64


def ends_elsewhere(work: AdamWUpdate, index: int) -> bool:
    """Whether a parameter is a shard, so that its end need not be that of the whole."""
    weight = work.weights[index]
    return weight.is_cpu and weight.is_contiguous() and is_sharded(work.params[index])


def fused_on_shard(work: AdamWUpdate) -> None:
    """Run torch's fused kernel on all that this rank holds of one parameter."""
    (step,) = work.steps
    before = step.clone()
    flat = [tensor.view(-1) for tensor in work.tensors().flat()]
    end = places_at_end(work.params[0], LANES)
    last = flat[0].numel() - len(end)
    cut = last - last % LANES
    call_adamw(work.on(_tensors([tensor[:cut] for tensor in flat])), fused=True)
    for start, places, numel in (
        (cut, list(range(last - cut)), LANES),
        (last, end, work.params[0].numel() % LANES),
    ):
        if places:
            step.copy_(before)
            parts = [tensor[start : start + len(places)] for tensor in flat]
            among = [part.new_ones(numel).index_copy_(0, torch.tensor(places, device="cpu"), part) for part in parts]
            call_adamw(work.on(_tensors(among)), fused=True)
            for part, others in zip(_tensors(parts).written(), _tensors(among).written(), strict=True):
                part.copy_(others[places])


def _tensors(flat: list[torch.Tensor]) -> Tensors:
    return Tensors(flat[0], flat[1], tuple(flat[2:]))


def places_at_end(param: Any, numel: int) -> list[int]:
    """Of the last elements of a whole parameter, those left over by runs of ``numel``, the places that this rank holds.

    Args:
        param: a contiguous DTensor. What is held of its end is the end of what is held of it, in the same order.
        numel: of a run.
    """
    start = param.numel() - param.numel() % numel
    shape, offsets = local_shape_and_offsets(param)
    held = torch.arange(start, param.numel(), device="cpu")
    for size, length, offset, stride in zip(param.shape, shape, offsets, param.stride(), strict=True):
        along = held.div(stride, rounding_mode="floor") % size - offset
        held = held[(along >= 0) & (along < length)]
    places: list[int] = (held - start).tolist()
    return places
