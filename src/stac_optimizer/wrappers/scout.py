"""Scout: slow weights that go the further to the fast ones, the less the base's steps have been alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import real_parts, sums_over_shards
from stac_optimizer.rule import Group
from stac_optimizer.tensors.precision import arithmetic_dtype, downcast, foreach_upcast, upcast, widest_dtype
from stac_optimizer.tensors.units.cutting import BLOCK_NUMEL, filled
from stac_optimizer.tensors.units.pieces import Lists
from stac_optimizer.wrappers.base.loading import Own
from stac_optimizer.wrappers.base.parts import by_kind, copy_all, units_of_lists
from stac_optimizer.wrappers.slow_weights import SlowWeights

__all__ = ["Scout"]

# The statistics of a period, each like the parameter: what the steps of each weight were at most and at least, and the
# sum of the squares of their deviations from their mean.
MOST, LEAST, SQUARES = STATISTICS = ("scout_most", "scout_least", "scout_squares")

# Steps count as the same up to so many units in the last place of the weight: each is a difference of two rounded ones.
SAME = 4


class Scout(SlowWeights):
    r"""Lookahead with a rate that it finds by itself, as holocron's class of this name.

    Of the steps :math:`u_1, \dots, u_k` that the base has taken in a period, for each weight :math:`e`, and all weights
    :math:`E_j` of a parameter :math:`j` whose steps were not all the same up to their rounding:

    .. math::
        \rho_e &= \frac{\operatorname{std}(u_{1e}, \dots, u_{ke})}{\max_i |u_{ie} - \bar u_e|},
        \qquad \kappa = \operatorname{mean}_j \operatorname{mean}_{e \in E_j} \rho_e \\
        \alpha &= \max(1 - \kappa, \text{sync\_rate}) \\
        \phi &\leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    with the standard deviation over :math:`k - 1`. For a period of :math:`k` steps :math:`\rho` lies between
    :math:`\sqrt k / (k - 1)` and :math:`\sqrt{k / (k - 1)}`; for 6 steps :math:`1 - \kappa` is 0.51 at most, where each
    weight has had one step that is unlike five others. So at the default rate it is all but Lookahead: it differs
    where ``sync_rate`` is small.

    A weight whose steps were all the same, idle ones among them, tells nothing, and is left out; where all are,
    :math:`\alpha` is ``sync_rate``. There holocron's class has 0 / 0, and then throws all weights back to the start of
    the period. Nor does a period of one step tell anything.

    Costs four tensors a weight where holocron's keeps k + 1, and a copy of the weights during a step. What is written
    to weights between steps is taken for a part of the steps. All else is as in
    :class:`stac_optimizer.wrappers.Lookahead`.

    Args:
        base: any optimizer.
        sync_rate: how far the slow weights go towards the fast ones at least, from 0 to 1.
        sync_period: after how many steps.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stac_optimizer.wrappers import Scout
        >>> model = nn.Linear(4, 1)
        >>> optimizer = Scout(torch.optim.AdamW(model.parameters(), lr=1e-3), sync_rate=0.2)
        >>> for _ in range(7):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().mean().backward()
        ...     optimizer.step()
    """

    own: ClassVar[Own] = Own(weights=("scout_slow", *STATISTICS), counter=("scout_step",), wide=STATISTICS)

    def _begin(self, params: Sequence[Tensor], weights: Mapping[Tensor, Tensor] | None = None) -> None:
        super()._begin(params, weights)
        for param in params:
            for key in STATISTICS:
                dtype = self.own.dtype_of(key, param)
                self.state[param][key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _watched(self, held: Mapping[Tensor, Tensor], step: int) -> Iterable[Tensor]:
        periods = {param: group["sync_period"] for group in self.param_groups for param in group["params"]}
        return [param for param in held if periods[param] > 1]

    def _look(self, before: Mapping[Tensor, Tensor], step: int) -> None:
        for group in self.param_groups:
            place = (step - 1) % group["sync_period"] + 1
            if group["sync_period"] > 1:
                params = [param for param in self._held(self._slow_key, group["params"]) if param in before]
                states = [[self.state[param][key] for param in params] for key in (self._slow_key, *STATISTICS)]
                for now, then, slow, most, *rest in by_kind(params, [before[param] for param in params], *states):
                    for parts in units_of_lists(Lists(most, now, [*rest, then, slow])):
                        _add(place, *parts)

    def _sync(self, groups: Sequence[Group]) -> None:
        pairs = [(group, self._synced(group)) for group in groups]
        measured = [(params, group["sync_period"]) for group, (params, _) in pairs if group["sync_period"] > 1]
        coherence = self._coherence(measured)
        for group, (params, slow) in pairs:
            for fast, theirs in by_kind(params, slow):
                rate = torch.full((), group["sync_rate"], dtype=widest_dtype(fast[0].device), device=fast[0].device)
                if coherence is not None:
                    rate = torch.fmax(1 - coherence.to(rate), rate)
                rate = rate.to(arithmetic_dtype(fast[0].dtype))
                for tensor, target in zip(theirs, fast, strict=True):
                    wide = upcast(tensor)
                    downcast(wide.lerp_(upcast(target), rate), tensor)
            copy_all(slow, params)

    def _coherence(self, measured: Sequence[tuple[Sequence[Tensor], int]]) -> Tensor | None:
        """How alike the steps of these parameters were, NaN where they do not tell; on the device of the first."""
        everything = [param for params, _ in measured for param in params]
        if not everything:
            return None
        sums = [each for params, period in measured for each in self._ratios(params, period)]
        totals, counts = torch.stack(sums_over_shards([each.to(sums[0].device) for each in sums], everything)).unbind(1)
        return torch.nanmean(totals / counts)

    def _ratios(self, params: Sequence[Tensor], period: int) -> Iterator[Tensor]:
        """For each parameter the sum of the ratios of this rank's weights, and how many that are."""
        lists = [list(params), *([self.state[p][key] for p in params] for key in (self._slow_key, *STATISTICS))]
        parts = [real_parts(tensors) for tensors in lists]
        for places in filled(range(len(params)), [part.numel() for part in parts[0]], BLOCK_NUMEL):
            now, slow, most, least, squares = ([upcast(tensors[place]) for place in places] for tensors in parts)
            means = torch._foreach_sub(now, slow)
            torch._foreach_div_(means, period)
            furthest = list(torch._foreach_sub(most, means))
            torch._foreach_maximum_(furthest, torch._foreach_sub(means, least))
            ratios = torch._foreach_div(squares, period - 1)
            torch._foreach_sqrt_(ratios)
            torch._foreach_div_(ratios, furthest)
            # Of steps that were the same in truth, the weights' own rounding makes different ones.
            rounding = list(torch._foreach_abs(now))
            torch._foreach_maximum_(rounding, torch._foreach_abs(slow))
            torch._foreach_mul_(rounding, [SAME * torch.finfo(parts[0][place].dtype).eps for place in places])
            spans = torch._foreach_sub(most, least)
            for ratio, span, limit in zip(ratios, spans, rounding, strict=True):
                told, dtype = span > limit, widest_dtype(ratio.device)
                total = torch.where(told, ratio, 0.0).sum(dtype=dtype)
                yield torch.stack([total, told.sum(dtype=dtype)])


def _add(
    place: int,
    most: list[Tensor],
    now: list[Tensor],
    least: list[Tensor],
    squares: list[Tensor],
    then: list[Tensor],
    slow: list[Tensor],
) -> None:
    """Take a step to the statistics of its period, of which it is the first or a later one."""
    now, then, slow = (foreach_upcast(tensors) for tensors in (now, then, slow))
    step = torch._foreach_sub(now, then)
    if place == 1:
        torch._foreach_copy_(most, step)
        torch._foreach_copy_(least, step)
        torch._foreach_zero_(squares)
        return
    torch._foreach_maximum_(most, step)
    torch._foreach_minimum_(least, step)
    # From the mean of the steps before, and from that with this one. Steps add up to how far the weights have gone, so
    # their mean needs no tensor of its own.
    of_before = torch._foreach_sub(then, slow)
    torch._foreach_div_(of_before, 1 - place)
    torch._foreach_add_(of_before, step)
    of_now = torch._foreach_sub(now, slow)
    torch._foreach_div_(of_now, -place)
    torch._foreach_add_(of_now, step)
    torch._foreach_addcmul_(squares, of_before, of_now)
