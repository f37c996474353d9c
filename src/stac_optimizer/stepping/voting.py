"""What ranks that vote do before a step: check on all of them alike, then bring their gradients together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from stac_optimizer.distributed.shards import local_views
from stac_optimizer.distributed.vote import Voters
from stac_optimizer.rule import Group, Rule
from stac_optimizer.stepping.checks import check_finite, check_gradients, only_makes_state
from stac_optimizer.validation import warn

__all__ = ["Verdict", "check_on_all_ranks", "share_gradients_", "warn_of_equal_gradients"]


class Verdict(NamedTuple):
    """What all ranks have found alike.

    Args:
        only_makes_state: whether the step is only to make state.
        have_gradient: for each parameter whether it has a gradient on any rank.
    """

    only_makes_state: bool
    have_gradient: Sequence[bool]


def check_on_all_ranks(
    voters: Voters, groups: Sequence[Group], rules: Mapping[str, Rule], *, is_first: bool
) -> Verdict:
    """The checks of a step on all ranks; a collective that changes nothing.

    Raises:
        RuntimeError: on every rank, what is wrong on any.
    """
    voters.refuse_join()
    error: RuntimeError | None = None
    makes_state = False
    try:
        check_gradients(groups, groups, rules, rest_may_have_changed=False)
        check_finite(groups, here=True)
        makes_state = is_first and only_makes_state(groups, here=True)
    except RuntimeError as raised:
        error = raised
    params = [param for group in groups for param in group["params"]]
    flags = [error is not None, not makes_state, *(param.grad is not None for param in params)]
    has_failed, moves, *have_gradient = voters.on_any(flags, local_views(params[:1])[0].device)
    if has_failed:
        messages = enumerate(voters.gather(None if error is None else str(error)))
        found = "; ".join(f"rank {rank}: {message}" for rank, message in messages if message is not None)
        raise RuntimeError(f"no rank can step: {found}") from error
    return Verdict(not moves, have_gradient)


def warn_of_equal_gradients(voters: Voters, groups: Sequence[Group], rules: Mapping[str, Rule]) -> None:
    """Warn, at the first step with gradients to vote on, where they are the same on every rank; a collective."""
    if voters.has_compared:
        return
    params = [param for group in groups if rules[group["rule"]].votes for param in group["params"]]
    grads = [param.grad.detach() for param in params if param.grad is not None]
    sums = [(torch.view_as_real(grad) if grad.is_complex() else grad).double().sum() for grad in grads]
    said = voters.gather(str(torch.stack(sums).tolist()) if sums else None)
    voters.has_compared = any(said)
    if len(set(said)) == 1 and any(sums):
        warn(
            "the gradients that ranks are to vote on are the same on all of them, so the vote decides nothing. Either "
            "DistributedDataParallel has averaged them, because it came after the optimizer, as in transformers' "
            "Trainer and accelerate: build STAC of the wrapped model, STAC(ddp_model, vote=...), or leave out vote. Or "
            "all ranks train on the same data"
        )


def share_gradients_(voters: Voters, groups: Sequence[Group], rules: Mapping[str, Rule], verdict: Verdict) -> None:
    """Let rules find the same gradients on every rank; a collective.

    Those that only some ranks have become zeros on the others; those that are not voted on, the mean over ranks.
    """
    params = [param for group in groups for param in group["params"]]
    for param, is_wanted in zip(params, verdict.have_gradient, strict=True):
        if is_wanted and param.grad is None:
            param.grad = torch.zeros_like(param)
    if not verdict.only_makes_state:
        voters.average_gradients_(
            param for group in groups if not rules[group["rule"]].votes for param in group["params"]
        )
