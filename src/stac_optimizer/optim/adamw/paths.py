"""The ways of AdamW's update: in blocks of bounded memory, by torch's fused kernel, with stochastic rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from stac_optimizer.optim.adamw.shard_ends import ends_elsewhere, fused_on_shard
from stac_optimizer.optim.adamw.update import AdamWUpdate, call_adamw
from stac_optimizer.rule.state import count_step_
from stac_optimizer.tensors import cutting, rounding
from stac_optimizer.tensors.layouts import has_layout_of, in_layout_of, is_dense
from stac_optimizer.tensors.pieces import Piece, Unit, is_recorded

__all__ = ["adamw_in_blocks", "fused_adamw", "is_walkable", "rounding_adamw"]


# Note [Fused AdamW and layouts]
# torch's fused kernels walk memory, not indices: where the layouts of parameter, gradient and state differ they compute
# wrong values or write outside the parameter. Gradients are brought to the parameter's layout; a parameter with gaps in
# memory, such as a slice, or with state in another layout, takes the single-tensor path.
def fused_adamw(work: AdamWUpdate) -> None:
    """Update by torch's fused kernel, where it can walk the memory."""
    held = zip(*work.averages, strict=True)
    walkable = [is_walkable(weight, averages) for weight, averages in zip(work.weights, held, strict=True)]
    # What needs copies goes one by one in blocks. torch's kernel writes the unscaled gradients back, hence the clone.
    plain = [
        ok and work.grad_scale is None and work.needs_no_copy(index) and not ends_elsewhere(work, index)
        for index, ok in enumerate(walkable)
    ]
    if any(plain):
        call_adamw(work.only([index for index, flag in enumerate(plain) if flag]), fused=True)
    for index, (ok, is_done) in enumerate(zip(walkable, plain, strict=True)):
        one = work.only([index])
        if not ok:
            adamw_in_blocks(one, foreach=False)
        elif not is_done:
            one = one.in_layout()
            is_shard = ends_elsewhere(one, 0)
            for block, _ in _blocks(one, cut=not is_shard):
                _fused_block(
                    block.using(block.weights, [grad.clone() for grad in block.grads], block.averages),
                    is_shard=is_shard,
                )


def is_walkable(weight: Tensor, state: Iterable[Tensor]) -> bool:
    """Whether a kernel may walk the memory of a weight and of its state; counters do not matter."""
    return is_dense(weight) and all(not each.ndim or has_layout_of(each, weight) for each in state)


def _fused_block(work: AdamWUpdate, *, is_shard: bool) -> None:
    """Run torch's fused kernel on a block of one parameter, or on all that this rank holds of it."""
    if is_shard:
        fused_on_shard(work)
    else:
        call_adamw(work, fused=True)


def adamw_in_blocks(work: AdamWUpdate, *, foreach: bool) -> None:
    """Small parameters together, as lists in buckets; large ones block by block, see Note [Units of work]."""
    numels = [_block_numel(weight) for weight in work.weights]
    small = [index for index, weight in enumerate(work.weights) if weight.numel() <= numels[index]]
    sizes = [work.weights[index].numel() for index in small]
    for some in cutting.filled(small, sizes, max(numels)) if foreach else [small]:
        if some:
            call_adamw(work.only(some), foreach=foreach)
    for index, weight in enumerate(work.weights):
        if weight.numel() > numels[index]:
            for block, _ in _blocks(work.only([index])):
                call_adamw(block, foreach=foreach)


def _block_numel(weight: Tensor) -> int:
    return weight.numel() if is_recorded() else cutting.block_numel(weight)


def _blocks(work: AdamWUpdate, *, cut: bool = True) -> Iterator[tuple[AdamWUpdate, Piece]]:
    """The blocks of one parameter, without ``cut`` a single one, each to be stepped from the same count of steps."""
    (step,) = work.steps
    before = step.clone()
    for piece in cutting.blocks(work.tensors(), numel=_block_numel(work.weights[0]) if cut else None):
        step.copy_(before)
        yield work.on(piece.tensors), piece


def rounding_adamw(work: AdamWUpdate, positions: Sequence[int], offsets: Sequence[int]) -> None:
    """In float32, block by block; what is stored is rounded stochastically, each kind of tensor by bits of its own."""
    seed, fused = work.group["rounding_seed"], work.group["fused"] or None
    following = [step.clone() for step in work.steps]
    count_step_(following, never_stops=True)
    counts = rounding.counts(following)
    kinds = range(len(work.averages) + 1)
    seeds = [rounding.noise_seeds(seed, positions, counts, kind=kind, offsets=offsets) for kind in kinds]
    for index in range(len(positions)):
        one = work.only([index])
        is_shard = bool(fused) and ends_elsewhere(one, 0)
        if is_shard:
            one = one.in_layout()
        for block, piece in _blocks(one, cut=not is_shard):
            stored = block.tensors().written()
            weight = block.weights[0].float()
            held = [in_layout_of(weight, average.float()) for (average,) in block.averages]
            grads = [in_layout_of(weight, grad.float()) for grad in block.grads]
            in_float32 = block.using([weight], grads, [[average] for average in held])
            if fused:
                _fused_block(in_float32, is_shard=is_shard)
            else:
                call_adamw(in_float32, foreach=False)
            for result, tensor, kind_seeds in zip((weight, *held), stored, seeds, strict=True):
                if tensor.dtype == torch.bfloat16:
                    noise = rounding.noise_of(piece, Unit([piece], (index,)), kind_seeds)
                    rounding.round_into(result, tensor, noise)
                else:  # of a checkpoint, which keeps its dtype
                    tensor.copy_(result)
        one.steps[0].copy_(following[index])
