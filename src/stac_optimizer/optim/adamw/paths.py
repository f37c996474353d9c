"""The ways of AdamW's update: in blocks of bounded memory, by torch's fused kernel, with stochastic rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from stac_optimizer.optim.adamw.shard_ends import ends_elsewhere, fused_on_shard
from stac_optimizer.optim.adamw.update import AdamWUpdate, call_adamw
from stac_optimizer.rule.state import count_step_
from stac_optimizer.tensors import rounding
from stac_optimizer.tensors.layouts import has_layout_of, in_layout_of, is_dense
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units import cutting
from stac_optimizer.tensors.units.pieces import Piece, Unit, is_recorded
from stac_optimizer.tensors.units.threads import Task, run_all, shares

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
            blocks = _blocks(one, cut=not is_shard)
            for block, _ in blocks:
                _fused_block(
                    block.using(block.weights, [grad.clone() for grad in block.grads], block.averages),
                    is_shard=is_shard,
                )
            _count(one, blocks)


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
    if is_recorded():
        call_adamw(work, foreach=foreach)
        return
    shared = shares([work.weights, work.grads, *work.averages])
    numels = [shared.numel or cutting.block_numel(weight) for weight in work.weights]
    small = [index for index, weight in enumerate(work.weights) if weight.numel() <= numels[index]]
    large = [work.only([index]) for index, weight in enumerate(work.weights) if weight.numel() > numels[index]]
    sizes = [work.weights[index].numel() for index in small]
    is_dealt = foreach or shared.threads > 1
    packs = cutting.filled(small, sizes, max(numels)) if is_dealt else [small]
    cut = [_blocks(one, shared.numel) for one in large]
    works = [*(work.only(some) for some in packs if some), *(block for blocks in cut for block, _ in blocks)]
    run_all(
        [Task(partial(_step, each, foreach=foreach), sum(map(Tensor.numel, each.weights))) for each in works], shared
    )
    for one, blocks in zip(large, cut, strict=True):
        _count(one, blocks)


def _step(work: AdamWUpdate, scratch: Scratch, *, foreach: bool) -> None:
    call_adamw(work, foreach=foreach)


def _blocks(work: AdamWUpdate, numel: int | None = None, *, cut: bool = True) -> list[tuple[AdamWUpdate, Piece]]:
    """The blocks of one parameter, without ``cut`` a single one; each counts for itself, see :func:`_count`."""
    (step,) = work.steps
    most = work.weights[0].numel() if is_recorded() else numel or cutting.block_numel(work.weights[0])
    pieces = cutting.blocks(work.tensors(), numel=most if cut else None)
    return [(work.on(piece.tensors).counting([step.clone()]), piece) for piece in pieces]


def _count(work: AdamWUpdate, blocks: Sequence[tuple[AdamWUpdate, Piece]]) -> None:
    """Take over the count of a parameter's blocks, once all are stepped."""
    ((block, _), *_) = blocks
    work.steps[0].copy_(block.steps[0])


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
                    noise = rounding.noise_of(piece, Unit([[piece]], (index,)), kind_seeds)
                    rounding.round_into(result, tensor, noise)
                else:  # of a checkpoint, which keeps its dtype
                    tensor.copy_(result)
        one.steps[0].copy_(following[index])
