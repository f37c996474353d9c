"""The trunk's update one unit of work after the other, by the operations of ``_sign_momentum_kernels.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer import _rounding, _shards, _tensors
from stac_optimizer._units import Piece, Scratch, Unit, copy_back, is_recorded, units
from stac_optimizer.rules._sign_momentum_kernels import LEAST_AGREEMENT, Numbers, Work, next_mask, update

__all__ = ["Kernels", "can_pack", "count_agreeing", "single_tensor", "step_unit", "update_piece"]

# Counts up to it are sums of float32 without rounding.
EXACT_SUM = 2**24


def count_agreeing(
    piece: Piece, unit: Unit, numbers: Numbers, *, maximize: bool, scratch: Scratch | None = None
) -> Tensor:
    """How many elements the mask of a piece will let pass."""
    _, grad, *exp_avg = piece.tensors
    return _count(next_mask(grad, exp_avg, numbers, maximize=maximize, scratch=scratch))


def _count(mask: Tensor) -> Tensor:
    """How many elements a mask lets pass: their sum where float32 holds it exactly, which is 30 times as fast."""
    return mask.sum().to(torch.int64) if mask.numel() <= EXACT_SUM else mask.count_nonzero()


def update_piece(
    piece: Piece,
    unit: Unit,
    numbers: Numbers,
    *,
    maximize: bool,
    mean: Tensor | None,
    salt: Tensor | None,
    scratch: Scratch | None = None,
) -> None:
    """Update a piece of a unit, with stochastic rounding where there is salt."""
    noise = None if salt is None else _rounding.noise_of(piece, unit, salt)
    update(piece.tensors, numbers, maximize=maximize, mean=mean, noise=noise, scratch=scratch)


class Kernels(NamedTuple):
    """What runs on a piece."""

    count_agreeing: Callable[..., Tensor]
    update_piece: Callable[..., None]


def single_tensor(work: Work) -> None:
    """Update one unit of work after the other."""
    scratch = None if is_recorded() else Scratch()
    kernels = Kernels(
        functools.partial(count_agreeing, scratch=scratch), functools.partial(update_piece, scratch=scratch)
    )
    for unit in units(work.tensorlists, pack=can_pack(work)):
        step_unit(work, unit, kernels)


def can_pack(work: Work) -> bool:
    """Whether parameters may share a unit: a mean over shards is taken parameter by parameter."""
    return not (work.group["trunk_cautious"] and any(map(_shards.is_sharded, work.wholes)))


def step_unit(work: Work, unit: Unit, kernels: Kernels) -> None:
    """Update a unit of work."""
    maximize = work.group["maximize"]
    numbers = work.numbers(work.tensorlists[0][unit.members[0]].device)
    # Before the first weight, so averages are computed here and again in the update: that costs less than keeping them.
    mean = _mean_of_unit(work, unit, numbers, kernels) if work.group["trunk_cautious"] else None
    for piece in unit.pieces:
        kernels.update_piece(piece, unit, numbers, maximize=maximize, mean=mean, salt=work.salt)
    copy_back(unit.copies)


def _mean_of_unit(work: Work, unit: Unit, numbers: Numbers, kernels: Kernels) -> Tensor:
    """The mean of a parameter's mask, floored, or one for each element of a pack.

    A count over a number: exact however a parameter is cut or sharded.
    """
    maximize = work.group["maximize"]
    whole, local = work.wholes[unit.members[0]], work.tensorlists[0][unit.members[0]]
    dtype = _tensors.arithmetic_dtype(local.dtype)
    if unit.sizes:
        (mask,) = [
            next_mask(grad, exp_avg, numbers, maximize=maximize)
            for _, grad, *exp_avg in (piece.tensors for piece in unit.pieces)
        ]
        sizes = torch.tensor(unit.sizes, device="cpu")
        agreeing = torch.stack([_count(part) for part in mask.split(list(unit.sizes))])
        means = (agreeing.to(dtype) / sizes).clamp_(min=LEAST_AGREEMENT)
        return means.repeat_interleave(sizes, output_size=sum(unit.sizes))
    counts = [kernels.count_agreeing(piece, unit, numbers, maximize=maximize) for piece in unit.pieces]
    counts = counts or [torch.zeros((), dtype=torch.int64, device=local.device)]  # an empty shard has no pieces
    agreeing = _shards.sum_over_shards(torch.stack(counts).sum(), whole)
    numel = whole.numel() * (2 if whole.is_complex() else 1)
    # By a tensor: on CUDA a quotient by a number is a product with its reciprocal, and rounds twice.
    agreeing = agreeing.to(dtype)
    return agreeing.div_(torch.full_like(agreeing, numel)).clamp_(min=LEAST_AGREEMENT)
