"""The trunk's update where ranks vote on it: averages and their signs first, then the votes, then the weights.

The operations before and after the votes are those of ``arithmetic.py``, so a single voter's weights are
those of the ordinary step to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.distributed import packed_signs
from stac_optimizer.distributed.ballots import Ballot
from stac_optimizer.distributed.vote import Voters
from stac_optimizer.optim.signum.arithmetic import SignUpdate, accumulate, move
from stac_optimizer.tensors import codes, rounding
from stac_optimizer.tensors.layouts import in_layout_of, is_dense
from stac_optimizer.tensors.precision import arithmetic_dtype, downcast, upcast
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.cutting import filled, units
from stac_optimizer.tensors.units.pieces import Lists, Piece, Unit, copy_back, is_recorded

__all__ = ["average_over_ranks", "by_vote"]

# Votes on so many weights, or on one larger parameter, travel together while the next are prepared: 8 MiB of a rank.
BALLOT_NUMEL = 32 * 1024 * 1024


class _Vote(NamedTuple):
    """One parameter's place on a ballot.

    Args:
        work: its update alone.
        unit: the pieces that it was cut into.
        starts: where the votes of each piece begin.
    """

    work: SignUpdate
    unit: Unit
    starts: list[int]


def by_vote(work: SignUpdate, voters: Voters) -> None:
    """Update parameters; a collective. All ranks give the same ones in the same order."""
    numels = [param.numel() for param in work.lists.params]
    pending: tuple[Ballot, list[_Vote]] | None = None
    for chosen in filled(range(len(numels)), numels, BALLOT_NUMEL):
        begun = _cast(work, chosen, voters)
        if pending is not None:
            _apply(*pending)
        pending = begun
    if pending is not None:
        _apply(*pending)


def _cast(work: SignUpdate, chosen: Sequence[int], voters: Voters) -> tuple[Ballot, list[_Vote]]:
    """Update averages, and begin to send their signs."""
    votes: list[_Vote] = []
    end = 0
    for index in chosen:
        one = work.only([index])
        (unit,) = units(_canonical(one.lists), pack=False)
        starts = []
        for piece in chain.from_iterable(unit.parts):
            starts.append(end)
            end += packed_signs.words_for(piece.tensors.param.numel()) * packed_signs.WORD
        votes.append(_Vote(one, unit, starts))
    scratch = None if is_recorded() else Scratch()
    ballot = voters.ballot(end, work.lists.params[chosen[0]].device)
    for one, unit, starts in votes:
        coefficients = one.coefficients(one.lists.params[0].device)
        for piece, start in zip(chain.from_iterable(unit.parts), starts, strict=True):
            noise = _noise(one, piece, unit)
            _, average = accumulate(
                piece.tensors, coefficients, maximize=one.group["maximize"], noise=noise, scratch=scratch
            )
            ballot.put(average.flatten(), start)
    ballot.cast()
    return ballot, votes


def _noise(one: SignUpdate, piece: Piece, unit: Unit) -> Tensor | None:
    """What a piece's weights and averages are rounded by."""
    of_blocks = not one.group["stochastic_rounding"]
    return None if one.noise_seeds is None else rounding.noise_of(piece, unit, one.noise_seeds, of_blocks=of_blocks)


def _canonical(lists: Lists) -> Lists:
    """Lists of one that are cut by the weight's layout: that of a gradient may differ by rank, and pieces must not."""
    (param,), (grad,) = lists.params, lists.grads
    return Lists([param], [in_layout_of(param, grad) if is_dense(param) else grad], lists.states, lists.scales)


def _apply(ballot: Ballot, votes: Sequence[_Vote]) -> None:
    """Move weights as the majority wants."""
    ballot.decide()
    for one, unit, starts in votes:
        coefficients = one.coefficients(one.lists.params[0].device)
        for piece, start in zip(chain.from_iterable(unit.parts), starts, strict=True):
            param = piece.tensors.param
            dtype = arithmetic_dtype(param.dtype)
            direction = ballot.direction(start, param.numel(), dtype).view(param.shape)
            noise = _noise(one, piece, unit) if one.group["stochastic_rounding"] else None
            move(param, direction.to(param.device), coefficients.lr, coefficients.decay_factor, noise=noise)
        copy_back(unit.copies)


def average_over_ranks(exp_avg: Tensor, exp_avg_scale: Tensor | None, param: Tensor, voters: Voters) -> None:
    """Make an average the mean of all ranks' ones; a collective."""
    if exp_avg.dtype != torch.int8 or exp_avg_scale is None:
        mean = upcast(exp_avg)
        voters.average_([torch.view_as_real(mean) if mean.is_complex() else mean])
        downcast(mean, exp_avg)
        return
    (unit,) = units(Lists([param], [param], [[exp_avg]], [exp_avg_scale]), pack=False)
    for piece in chain.from_iterable(unit.parts):
        (held,), scale = piece.tensors.state, piece.tensors.scale
        assert scale is not None
        mean = codes.decode(held, scale)
        voters.average_([mean])
        codes.encode_(mean, held, scale, None)
