"""Guests that keep state in objects of their own."""

from __future__ import annotations

from torch.optim import Optimizer

from stac_optimizer.roles.guests import Guest

__all__ = ["OwnStateGuest", "keeps_own_state"]


def keeps_own_state(optimizer: Optimizer) -> bool:
    """Whether there is more to it than ``state`` and plain group dicts, so that a host cannot share these."""
    is_overridden = type(optimizer).state_dict is not Optimizer.state_dict
    return is_overridden or any(type(group) is not dict for group in optimizer.param_groups)


class OwnStateGuest(Guest):
    """See above."""
