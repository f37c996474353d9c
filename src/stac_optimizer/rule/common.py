"""What many rules do alike, on lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import local_views
from stac_optimizer.rule.execution.wholes import Wholes
from stac_optimizer.rule.hyperparameters import Group
from stac_optimizer.tensors.kinds import has_data, has_own_operations
from stac_optimizer.tensors.precision import LOW_PRECISION

__all__ = [
    "LEAST_MASK_MEAN",
    "decay_",
    "joined",
    "least_change",
    "mask_",
    "signs",
    "warning_of_lost_steps",
    "warning_of_stuck_averages",
]

# Liang et al. divide the masked step by the mean of the mask, floored by this.
LEAST_MASK_MEAN = 1e-3


def decay_(params: list[Tensor], group: Group) -> None:
    """Decoupled weight decay: p ← p · (1 − lr · weight_decay)."""
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


def signs(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """The sign of every element, NaN where that is NaN or infinite.

    Note [Non-finite averages]. torch.sign(nan) is 0, which would freeze a weight for ever without a word. sign(m) + 0 *
    m is sign(m) for every finite m, and NaN for NaN and infinity, so the weight shows what happened, as AdamW's would.
    """
    result = list(torch._foreach_sign(tensors))
    torch._foreach_add_(result, tensors, alpha=0)
    return result


def mask_(directions: Sequence[Tensor], grads: Sequence[Tensor], wholes: Wholes) -> None:
    """Let pass what agrees with the present gradient, divided by the share of that (https://arxiv.org/abs/2411.16085).

    By signs, for the product may underflow; the share is a count over a number, so it is exact however a parameter is
    cut. Signs are constants for derivatives.
    """
    masks = [
        torch.sign(direction.detach()).mul_(torch.sign(grad.detach())).clamp_min_(0)
        for direction, grad in zip(directions, grads, strict=True)
    ]
    counts = wholes.sums([mask.count_nonzero() for mask in masks])
    for direction, mask, count, numel in zip(directions, masks, counts, wholes.numels, strict=True):
        # By a tensor: on CUDA a quotient by a number is a product with its reciprocal, and rounds twice.
        mean = count.to(mask.dtype)
        mean = mean.div_(torch.full_like(mean, max(numel, 1))).clamp_(min=LEAST_MASK_MEAN)
        direction.mul_(mask.div_(mean))


def warning_of_lost_steps(
    names: Sequence[str], params: Sequence[Tensor], group: Group, lengths: Sequence[float] | None = None
) -> str | None:
    """Of a rule whose steps are lr long: which low-precision weights the lr cannot move, and what to do; or None.

    Args:
        names: of the parameters.
        params: they.
        group: of them.
        lengths: for each how long a step of lr 1 is; None where it is 1.
    """
    if group["stochastic_rounding"]:
        return None
    lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
    steps = [lr * length for length in lengths or [1.0] * len(params)]
    stuck = [name for name, param, step in zip(names, params, steps, strict=True) if _is_step_lost(param, step)]
    if not stuck:
        return None
    return (
        f"an lr of {lr:g} makes steps of less than half the spacing between neighbouring values for most weights of "
        f"{', '.join(map(repr, stuck))}, so their steps round to nothing. Use stochastic_rounding=True with bfloat16, "
        "keep float32 weights (and compute under torch.autocast) or raise the lr (in STAC trunk_lr)"
    )


def joined(*warnings: str | None) -> str | None:
    """Those that there are, as one."""
    return "; ".join(filter(None, warnings)) or None


def least_change(dtype: torch.dtype, group: Group) -> float:
    """The least share of itself by which an average held in a dtype can change; any, where it is rounded by chance."""
    is_by_chance = group["stochastic_rounding"] and dtype == torch.bfloat16
    return 0.0 if is_by_chance else torch.finfo(dtype).eps / 2


def warning_of_stuck_averages(
    names: Sequence[str], kinds: Sequence[str], changes: Sequence[float], key: str, decay: float
) -> str | None:
    """Of a rule that goes by the signs of averages: which of them could never turn, and what to do; or None.

    An average of which a step keeps the share ``decay`` loses 1 - decay of itself where the gradient is small beside
    it. Where rounding takes that back, it keeps its sign whatever the gradients are by now.

    Args:
        names: of the parameters.
        kinds: how their averages are held, in words.
        changes: for each the least share of itself by which an average so held can change.
        key: of the hyper-parameter.
        decay: its value.
    """
    stuck = [place for place, change in enumerate(changes) if 1 - decay < change]
    if not stuck:
        return None
    first = stuck[0]
    return (
        f"{key} is {decay:g}, and averages held in {kinds[first]} do not change by less than {changes[first]:.2g} of "
        f"themselves, so from {1 - changes[first]:.5g} on those of {', '.join(repr(names[place]) for place in stuck)} "
        "may keep their sign for ever. Lower it, hold averages in float32 (state_dtype=None beside float32 weights), "
        "or round bfloat16 weights and their averages by chance (stochastic_rounding=True)"
    )


def _is_step_lost(param: Tensor, lr: float) -> bool:
    if param.dtype not in LOW_PRECISION or not param.numel() or not lr:
        return False
    if not has_data(param) or has_own_operations(local_views([param])[0]):
        return False
    param = local_views([param.detach()])[0]
    weights = param.float()
    stays = ((weights - lr).to(param.dtype) == param) & ((weights + lr).to(param.dtype) == param)
    return bool(stays.float().mean() > 0.5)
