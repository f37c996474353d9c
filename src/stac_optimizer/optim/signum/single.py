"""The trunk's update one unit of work after the other, by the operations of ``arithmetic.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded, sum_over_shards
from stac_optimizer.optim.signum.arithmetic import LEAST_MASK_MEAN, Coefficients, SignUpdate, next_mask, update
from stac_optimizer.tensors import rounding
from stac_optimizer.tensors.cutting import units
from stac_optimizer.tensors.pieces import Piece, Unit, copy_back, is_recorded
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.tensors.scratch import Scratch

__all__ = ["Kernels", "can_pack", "count_passing", "single_tensor", "step_unit", "update_piece"]

# Counts up to it are sums of float32 without rounding.
EXACT_SUM = 2**24


def count_passing(
    piece: Piece, unit: Unit, coefficients: Coefficients, *, maximize: bool, scratch: Scratch | None = None
) -> Tensor:
    """How many elements the mask of a piece will let pass."""
    return _count(next_mask(piece.tensors, coefficients, maximize=maximize, scratch=scratch))


def _count(mask: Tensor) -> Tensor:
    """How many elements a mask lets pass: their sum where float32 holds it exactly, which is 30 times as fast."""
    return mask.sum().to(torch.int64) if mask.numel() <= EXACT_SUM else mask.count_nonzero()


def update_piece(
    piece: Piece,
    unit: Unit,
    coefficients: Coefficients,
    *,
    maximize: bool,
    mean: Tensor | None,
    noise_seeds: Tensor | None,
    rounds: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update a piece of a unit, rounding by chance where there are noise seeds."""
    noise = None if noise_seeds is None else rounding.noise_of(piece, unit, noise_seeds, of_blocks=not rounds)
    update(piece.tensors, coefficients, maximize=maximize, mean=mean, noise=noise, rounds=rounds, scratch=scratch)


class Kernels(NamedTuple):
    """What runs on a piece."""

    count_passing: Callable[..., Tensor]
    update_piece: Callable[..., None]


def single_tensor(work: SignUpdate) -> None:
    """Update one unit of work after the other."""
    scratch = None if is_recorded() else Scratch()
    kernels = Kernels(
        functools.partial(count_passing, scratch=scratch), functools.partial(update_piece, scratch=scratch)
    )
    for unit in units(work.lists, pack=can_pack(work)):
        step_unit(work, unit, kernels)


def can_pack(work: SignUpdate) -> bool:
    """Whether parameters may share a unit: a mean over shards is taken parameter by parameter."""
    return not (work.group["cautious"] and any(map(is_sharded, work.params)))


def step_unit(work: SignUpdate, unit: Unit, kernels: Kernels) -> None:
    """Update a unit of work."""
    maximize, rounds = work.group["maximize"], work.group["stochastic_rounding"]
    coefficients = work.coefficients(work.lists.params[unit.members[0]].device)
    # Before the first weight, so averages are computed here and again in the update: that costs less than keeping them.
    mean = _mean_of_unit(work, unit, coefficients, kernels) if work.group["cautious"] else None
    for piece in unit.pieces:
        kernels.update_piece(
            piece, unit, coefficients, maximize=maximize, mean=mean, noise_seeds=work.noise_seeds, rounds=rounds
        )
    copy_back(unit.copies)


def _mean_of_unit(work: SignUpdate, unit: Unit, coefficients: Coefficients, kernels: Kernels) -> Tensor:
    """The mean of a parameter's mask, floored, or one for each element of a pack.

    A count over a number: exact however a parameter is cut or sharded.
    """
    maximize = work.group["maximize"]
    param, local = work.params[unit.members[0]], work.lists.params[unit.members[0]]
    dtype = arithmetic_dtype(local.dtype)
    if unit.sizes:
        (mask,) = [next_mask(piece.tensors, coefficients, maximize=maximize) for piece in unit.pieces]
        sizes = torch.tensor(unit.sizes, device="cpu")
        passing = torch.stack([_count(part) for part in mask.split(list(unit.sizes))])
        means = (passing.to(dtype) / sizes).clamp_(min=LEAST_MASK_MEAN)
        return means.repeat_interleave(sizes, output_size=sum(unit.sizes))
    counts = [kernels.count_passing(piece, unit, coefficients, maximize=maximize) for piece in unit.pieces]
    counts = counts or [torch.zeros((), dtype=torch.int64, device=local.device)]  # an empty shard has no pieces
    passing = sum_over_shards(torch.stack(counts).sum(), param)
    numel = param.numel() * (2 if param.is_complex() else 1)
    # By a tensor: on CUDA a quotient by a number is a product with its reciprocal, and rounds twice.
    passing = passing.to(dtype)
    return passing.div_(torch.full_like(passing, numel)).clamp_(min=LEAST_MASK_MEAN)
