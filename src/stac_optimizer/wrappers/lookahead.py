"""Lookahead: slow weights that now and then go a part of the way to fast ones, which then begin there anew.

Reference: Lookahead Optimizer: k steps forward, 1 step back (Zhang, Lucas, Hinton, Ba), https://arxiv.org/abs/1907.08610.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from stac_optimizer.rule import Group
from stac_optimizer.wrappers.base.loading import Own
from stac_optimizer.wrappers.base.parts import by_kind, copy_all
from stac_optimizer.wrappers.slow_weights import SlowWeights

__all__ = ["Lookahead"]


class Lookahead(SlowWeights):
    r"""Algorithm 1 of the paper around any optimizer.

    The base steps; after each :math:`k` steps

    .. math::
        \phi &\leftarrow \phi + \alpha (\theta - \phi) \\
        \theta &\leftarrow \phi

    ==================== ====================================================================================
    paper                here
    ==================== ====================================================================================
    :math:`\alpha, k`    ``sync_rate``, ``sync_period``; in groups, which may differ
    :math:`\theta`       the parameters, moved by ``base``
    :math:`\phi`         state ``lookahead_slow``, begun with the weights that the first step finds
    ==================== ====================================================================================

    The base keeps its own averages at a synchronization, as the authors' code does by default. A parameter gets slow
    weights with its first gradient. One that is frozen by then stays where it is.

    It is an optimizer, and one with its base (``optimizer.base``): a scheduler or ``zero_grad`` of either is of both,
    and a checkpoint of it holds both; its own ``step`` alone, a scaler's too, looks after the slow weights. Unlike
    holocron's class of this name, in whose place a scheduler changed nothing, and hooks, ``state_dict`` and
    ``add_param_group`` raised. Closures go to the base, so that LBFGS works.
    ``torch.compile`` of a step is not supported; compile the model.

    Args:
        base: any optimizer, STAC and those that :func:`stac_optimizer.wrappers.mechanize` makes among them.
        sync_rate: how far the slow weights go towards the fast ones, from 0 to 1.
        sync_period: after how many steps.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stac_optimizer import STAC
        >>> from stac_optimizer.wrappers import Lookahead
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = Lookahead(STAC(model, lr=1e-3), sync_rate=0.5, sync_period=5)
        >>> for _ in range(7):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> with optimizer.slow_weights(), torch.no_grad():
        ...     loss = model(torch.ones(2, 4)).square().mean()
    """

    own: ClassVar[Own] = Own(weights=("lookahead_slow",), counter=("lookahead_step",))

    def _sync(self, groups: Sequence[Group]) -> None:
        for group in groups:
            params, slow = self._synced(group)
            for fast, theirs in by_kind(params, slow):
                # A model may have been cast since.
                alike = [weight.to(own.dtype) for weight, own in zip(fast, theirs, strict=True)]
                torch._foreach_lerp_(theirs, alike, group["sync_rate"])
            copy_all(slow, params)
