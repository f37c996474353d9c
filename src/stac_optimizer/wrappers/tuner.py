"""The arithmetic of Mechanic: its few numbers, and how weights move by them. Knows no optimizer.

Note [Which tensor is kept]. The paper keeps for each weight the reference x_ref and Delta, the sum of the base's
updates; the weight is x_ref + s Delta. Of the three, two give the third. To keep x_ref alone and find Delta as
(x - x_ref) / (s + eps), as the authors' code does, loses what rounding swallows anew in each step, and while s is about
eps, half of Delta: it is another algorithm then. To keep Delta alone loses no more than a step of any optimizer does.
So the one tensor is Delta, and a step adds s' Delta' - s Delta = (s' - s) Delta' + s u to the weight. Then a weight
that somebody has written, or that had no gradient for a while, goes on from where it is; it is the reference that has
moved. With x_ref kept too, a step rounds x_ref + s' Delta' once, and what is small beside the weight is not lost; a
change by somebody else is told by comparing, and goes to x_ref.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import real_parts, sum_over_shards
from stac_optimizer.rule import Group
from stac_optimizer.tensors.precision import arithmetic_dtype, foreach_downcast, foreach_upcast, widest_dtype
from stac_optimizer.tensors.units.pieces import Lists
from stac_optimizer.wrappers.base.parts import by_kind, units_of_lists
from stac_optimizer.wrappers.base.sums import places_of_alike, products

__all__ = ["SCALE", "first_numbers", "inner_product", "move_", "next_numbers"]

EPS = 1e-8
# The first row of the tensor of numbers: s, r, m and v, with a column for each of the betas.
SCALE = 0
# Of weights, gradients and Delta, those that are multiplied.
PRODUCTS = ((1, 1), (0, 0), (2, 1), (2, 0))


def first_numbers(count: int, s_init: float, param: Tensor) -> Tensor:
    """The numbers before the first step, s, r, m and v, where this parameter is."""
    device = real_parts([param])[0].device
    dtype = widest_dtype(device)
    numbers = torch.zeros((4, count), dtype=dtype, device=device)
    numbers[SCALE] = s_init
    return numbers


def next_numbers(numbers: Tensor, h: Tensor, betas: Tensor, s_init: float) -> Tensor:
    """The numbers after a step.

    Args:
        numbers: those before.
        h: the inner product of the gradient and of how far the weights have gone against the base's updates.
        betas: one for each column.
        s_init: as of Mechanic.
    """
    scale, reward, most, squares = numbers.unbind()
    clipped = torch.minimum(torch.maximum(h, -most), most)
    most = torch.maximum(betas * most, h.abs() + EPS)
    squares = betas.square() * squares + h.square()
    reward = betas * reward + clipped * scale
    wealth = most * (s_init / len(betas)) + reward.clamp(min=0)
    return torch.stack([wealth / (squares.sqrt() + EPS), reward, most, squares])


def inner_product(
    stepped: Mapping[Tensor, Group], deltas: Mapping[Tensor, Tensor], everything: Sequence[Tensor], numbers: Tensor
) -> Tensor:
    """The h of a step, over all parameters and shards of them.

    Args:
        stepped: parameters with a gradient, and the group of each.
        deltas: by parameter, of those that have one.
        everything: all parameters, for all ranks must take part in the same collectives.
        numbers: of before the step.
    """
    sums = torch.zeros(4, dtype=numbers.dtype, device=numbers.device)
    for places in places_of_alike(everything).values():
        alike = [everything[place] for place in places]
        sums = sums + sum_over_shards(_sums({p: stepped[p] for p in alike if p in stepped}, deltas, numbers), alike[0])
    gradient, weight, of_gradient, of_decay = sums.unbind()
    decay = numbers[SCALE].sum() * gradient.sqrt() / (weight.sqrt() + EPS) * of_decay
    return -(of_gradient + decay)  # for updates go against the gradient


def _sums(stepped: Mapping[Tensor, Group], deltas: Mapping[Tensor, Tensor], like: Tensor) -> Tensor:
    """What this rank has of <g, g>, <x, x>, <Delta, g> and s_decay <Delta, x>."""
    total = torch.zeros(4, dtype=like.dtype, device=like.device)
    alike: dict[tuple[bool, float, bool], list[Tensor]] = {}
    for param, group in stepped.items():
        kind = (bool(group.get("maximize")), group["s_decay"], param in deltas)
        alike.setdefault(kind, []).append(param)
    for (maximize, decay, has_delta), some in alike.items():
        lists = [some, [cast(Tensor, param.grad) for param in some]]
        lists += [[deltas[param] for param in some]] if has_delta else []
        pairs = PRODUCTS if has_delta else PRODUCTS[:2]
        factors = (1.0, 1.0, -1.0 if maximize else 1.0, decay)
        for parts in by_kind(*lists):
            found = products(parts, pairs).to(total).unbind()
            total[: len(pairs)] += torch.stack([each * factor for each, factor in zip(found, factors, strict=False)])
    return total


def move_(
    weights: list[Tensor],
    before: list[Tensor],
    states: Sequence[list[Tensor]],
    scale: Tensor,
    next_scale: Tensor,
) -> None:
    """Add the base's updates to Delta, and put weights where the next scale has them.

    Args:
        weights: after the base's step; local and real, of one device and dtype, as the other lists.
        before: the weights before it; written to.
        states: Delta, in arithmetic precision, and x_ref where that is kept.
        scale: s of before the step.
        next_scale: that of after it.
    """
    dtype, device = arithmetic_dtype(weights[0].dtype), weights[0].device
    scales = [each.to(device=device, dtype=dtype) for each in (scale, next_scale, next_scale - scale)]
    for now, then, *rest in units_of_lists(Lists(weights, before, states)):
        if len(rest) == 1:
            _move_by_change(now, then, rest[0], *scales)
        else:
            _move_from_reference(now, then, rest[0], rest[1], *scales[:2])


def _move_by_change(
    weights: list[Tensor], before: list[Tensor], deltas: list[Tensor], scale: Tensor, _: Tensor, change: Tensor
) -> None:
    now, then = foreach_upcast(weights), foreach_upcast(before)
    torch._foreach_sub_(now, then)
    torch._foreach_add_(deltas, now)
    torch._foreach_mul_(now, scale)
    torch._foreach_add_(then, now)
    torch._foreach_copy_(now, deltas)
    torch._foreach_mul_(now, change)
    torch._foreach_add_(now, then)
    foreach_downcast(now, weights)


def _move_from_reference(
    weights: list[Tensor],
    before: list[Tensor],
    deltas: list[Tensor],
    references: list[Tensor],
    scale: Tensor,
    next_scale: Tensor,
) -> None:
    # What the last step wrote, rounded as it was: where it still stands, exactly 0 goes to the reference.
    written = _placed(references, deltas, scale)
    for reference, was, wrote in zip(references, before, written, strict=True):
        rounded = wrote.to(was.dtype).to(wrote.dtype)
        reference.copy_(reference + (was - rounded))
    now, then = foreach_upcast(weights), foreach_upcast(before)
    torch._foreach_sub_(now, then)
    torch._foreach_add_(deltas, now)
    torch._foreach_copy_(weights, _placed(references, deltas, next_scale))


def _placed(references: Sequence[Tensor], deltas: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Where weights are, in arithmetic precision."""
    placed = list(torch._foreach_mul(list(deltas), scale))
    torch._foreach_add_(placed, foreach_upcast(list(references)))
    return placed
