"""The trunk's update where ranks vote on it: averages and their signs first, then the votes, then the weights.

The operations before and after the votes are those of ``_sign_momentum_kernels.py``, so a single voter's weights are
those of the ordinary step to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer import _bits, _codes, _rounding, _tensors
from stac_optimizer._ballots import Ballot
from stac_optimizer._units import Scratch, Unit, copy_back, filled, is_recorded, units
from stac_optimizer.rules._sign_momentum_kernels import Work, accumulate, move
from stac_optimizer.vote import Voters

__all__ = ["average_state", "by_vote"]

# Votes on so many weights, or on one larger parameter, travel together while the next are prepared: 8 MiB of a rank.
BALLOT_NUMEL = 32 * 1024 * 1024


class _Vote(NamedTuple):
    """One parameter's place on a ballot.

    Args:
        work: its update alone.
        unit: the pieces that it was cut into.
        starts: where the votes of each piece begin.
    """

    work: Work
    unit: Unit
    starts: list[int]


def by_vote(work: Work, voters: Voters) -> None:
    """Update parameters; a collective. All ranks give the same ones in the same order."""
    numels = [param.numel() for param in work.tensorlists[0]]
    pending: tuple[Ballot, list[_Vote]] | None = None
    for chosen in filled(range(len(numels)), numels, BALLOT_NUMEL):
        begun = _cast(work, chosen, voters)
        if pending is not None:
            _apply(*pending)
        pending = begun
    if pending is not None:
        _apply(*pending)


def _cast(work: Work, chosen: Sequence[int], voters: Voters) -> tuple[Ballot, list[_Vote]]:
    """Update averages, and begin to send their signs."""
    votes: list[_Vote] = []
    end = 0
    for index in chosen:
        one = work.only([index])
        (unit,) = units(_canonical(one.tensorlists), pack=False)
        starts = []
        for piece in unit.pieces:
            starts.append(end)
            end += _bits.words_for(piece.tensors[0].numel()) * _bits.WORD
        votes.append(_Vote(one, unit, starts))
    scratch = None if is_recorded() else Scratch()
    ballot = voters.ballot(end, work.tensorlists[0][chosen[0]].device)
    for one, unit, starts in votes:
        numbers = one.numbers(one.tensorlists[0][0].device)
        for piece, start in zip(unit.pieces, starts, strict=True):
            _, grad, *exp_avg = piece.tensors
            _, average = accumulate(grad, exp_avg, numbers, maximize=one.group["maximize"], scratch=scratch)
            ballot.put(average.flatten(), start)
    ballot.cast()
    return ballot, votes


def _canonical(tensorlists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Lists that are cut by the weight's layout: that of a gradient may differ by rank, and pieces must not."""
    (param,), (grad,), *state = tensorlists
    return [[param], [_tensors.in_layout_of(param, grad) if _tensors.is_dense(param) else grad], *state]


def _apply(ballot: Ballot, votes: Sequence[_Vote]) -> None:
    """Move weights as the majority wants."""
    ballot.decide()
    for one, unit, starts in votes:
        numbers = one.numbers(one.tensorlists[0][0].device)
        for piece, start in zip(unit.pieces, starts, strict=True):
            param = piece.tensors[0]
            dtype = _tensors.arithmetic_dtype(param.dtype)
            direction = ballot.direction(start, param.numel(), dtype).view(param.shape)
            noise = None if one.salt is None else _rounding.noise_of(piece, unit, one.salt)
            move(param, direction.to(param.device), numbers.lr, numbers.decay_factor, is_unit=True, noise=noise)
        copy_back(unit.copies)


def average_state(exp_avg: Tensor, exp_avg_scale: Tensor | None, param: Tensor, voters: Voters) -> None:
    """Make an average the mean of all ranks' ones; a collective."""
    if exp_avg.dtype != torch.int8 or exp_avg_scale is None:
        mean = _tensors.upcast(exp_avg)
        voters.average_([torch.view_as_real(mean) if mean.is_complex() else mean])
        _tensors.downcast(mean, exp_avg)
        return
    (unit,) = units([[param], [param], [exp_avg], [exp_avg_scale]], pack=False)
    for piece in unit.pieces:
        codes, scale = piece.tensors[2:]
        mean = _codes.decode(codes, scale)
        voters.average_([mean])
        _codes.encode_(mean, codes, scale)
