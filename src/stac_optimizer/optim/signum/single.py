"""The trunk's update one unit of work after the other, or shared out, by the operations of ``arithmetic.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded, sum_over_shards
from stac_optimizer.optim.signum.arithmetic import LEAST_MASK_MEAN, SignUpdate, next_mask, update
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.tensors.rounding import noise_of
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.cutting import units
from stac_optimizer.tensors.units.pieces import Piece, Unit, copy_back, is_recorded
from stac_optimizer.tensors.units.threads import Task, run_all, shares

__all__ = ["single_tensor"]

# Counts up to it are sums of float32 without rounding.
EXACT_SUM = 2**24


def _count(mask: Tensor) -> Tensor:
    """How many elements a mask lets pass: their sum where float32 holds it exactly, which is 30 times as fast."""
    return mask.sum().to(torch.int64) if mask.numel() <= EXACT_SUM else mask.count_nonzero()


def single_tensor(work: SignUpdate) -> None:
    """Update in units of work, of which threads may share out the parts."""
    shared = shares(work.lists.flat())
    # A mean over shards is taken parameter by parameter.
    pack = not (work.group["cautious"] and any(map(is_sharded, work.params)))
    made = units(work.lists, pack=pack, numel=shared.numel)
    if is_recorded():
        for unit in made:
            _UnitStep(work, unit).run(None)
        return
    steps = [_UnitStep(work, unit) for unit in made]
    run_all([task for step in steps for task in step.counts()], shared)
    for step in steps:
        step.settle()
    run_all([task for step in steps for task in step.updates()], shared)


class _UnitStep:
    """The update of a unit of work.

    A mask's mean is known before the first weight moves, so averages are computed for it, and again in the update: that
    costs less than keeping them. What is in one part does both at one go, while it is in cache.
    """

    def __init__(self, work: SignUpdate, unit: Unit) -> None:
        self._work, self._unit = work, unit
        self._coefficients = work.coefficients(work.lists.params[unit.members[0]].device)
        self._maximize = work.group["maximize"]
        is_in_parts = len(unit.parts) != 1 or is_sharded(work.params[unit.members[0]])
        self._is_counted_first = work.group["cautious"] and is_in_parts
        self._passing: list[Tensor] = []
        self._mean: Tensor | None = None

    def counts(self) -> list[Task]:
        """What is to run before :meth:`settle`."""
        return self._of_parts(self._count) if self._is_counted_first else []

    def settle(self) -> None:
        """Take the mean of a mask that was counted; a collective where the parameter is sharded."""
        if self._is_counted_first:
            self._mean = self._mean_of_counts()

    def updates(self) -> list[Task]:
        """What is to run then."""
        is_at_one_go = self._work.group["cautious"] and not self._is_counted_first
        return [Task(self.run, self._numel)] if is_at_one_go else self._of_parts(self._update)

    @property
    def _numel(self) -> int:
        return sum(self._unit.sizes) or self._work.lists.params[self._unit.members[0]].numel()

    def _of_parts(self, run: Callable[[Iterable[Piece], Scratch], None]) -> list[Task]:
        parts = self._unit.parts
        return [Task(partial(run, part), self._numel // len(parts)) for part in parts]

    def run(self, scratch: Scratch | None) -> None:
        """All of it, one after the other."""
        if self._work.group["cautious"] and not self._unit.sizes:
            self._mean = self._counted(scratch)
        for part in self._unit.parts:
            self._update(part, scratch)
        copy_back(self._unit.copies)

    def _update(self, part: Iterable[Piece], scratch: Scratch | None) -> None:
        seeds, rounds = self._work.noise_seeds, self._work.group["stochastic_rounding"]
        is_masked_pack = self._work.group["cautious"] and self._unit.sizes
        for piece in part:
            update(
                piece.tensors,
                self._coefficients,
                maximize=self._maximize,
                mean=self._means_of_pack(piece, scratch) if is_masked_pack else self._mean,
                noise=None if seeds is None else noise_of(piece, self._unit, seeds, of_blocks=not rounds),
                rounds=rounds,
                scratch=scratch,
            )

    def _count(self, part: Iterable[Piece], scratch: Scratch | None) -> None:
        for piece in part:
            self._passing.append(_count(self._next_mask(piece, scratch)))

    def _next_mask(self, piece: Piece, scratch: Scratch | None) -> Tensor:
        return next_mask(piece.tensors, self._coefficients, maximize=self._maximize, scratch=scratch)

    def _counted(self, scratch: Scratch | None) -> Tensor:
        for part in self._unit.parts:
            self._count(part, scratch)
        return self._mean_of_counts()

    def _mean_of_counts(self) -> Tensor:
        """The mean of a parameter's mask, floored: a count over a number, exact however it is cut or sharded."""
        param, local = self._work.params[self._unit.members[0]], self._work.lists.params[self._unit.members[0]]
        # An empty shard has no pieces.
        counts = self._passing or [torch.zeros((), dtype=torch.int64, device=local.device)]
        passing = sum_over_shards(torch.stack(counts).sum(), param).to(arithmetic_dtype(local.dtype))
        numel = param.numel() * (2 if param.is_complex() else 1)
        # By a tensor: on CUDA a quotient by a number is a product with its reciprocal, and rounds twice.
        return passing.div_(torch.full_like(passing, numel)).clamp_(min=LEAST_MASK_MEAN)

    def _means_of_pack(self, piece: Piece, scratch: Scratch | None) -> Tensor:
        """The means of the masks of several parameters, one for each element of the pack."""
        mask = self._next_mask(piece, scratch)
        sizes = torch.tensor(self._unit.sizes, device="cpu")
        passing = torch.stack([_count(part) for part in mask.split(list(self._unit.sizes))])
        means = (passing.to(arithmetic_dtype(piece.tensors.param.dtype)) / sizes).clamp_(min=LEAST_MASK_MEAN)
        return means.repeat_interleave(sizes, output_size=sum(self._unit.sizes))
