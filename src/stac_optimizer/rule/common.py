"""What many rules do alike, on lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.rule.hyperparameters import Group
from stac_optimizer.rule.preparation import Sums

__all__ = ["LEAST_MASK_MEAN", "decay_", "mask_", "signs"]

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


def mask_(directions: Sequence[Tensor], grads: Sequence[Tensor], sums: Sums) -> None:
    """Let pass what agrees with the present gradient, divided by the share of that (https://arxiv.org/abs/2411.16085).

    By signs, for the product may underflow; the share is a count over a number, so it is exact however a parameter is
    cut. Signs are constants for derivatives.
    """
    masks = [
        torch.sign(direction.detach()).mul_(torch.sign(grad.detach())).clamp_min_(0)
        for direction, grad in zip(directions, grads, strict=True)
    ]
    counts = sums.over_shards([mask.count_nonzero() for mask in masks])
    for direction, mask, count, numel in zip(directions, masks, counts, sums.numels, strict=True):
        # By a tensor: on CUDA a quotient by a number is a product with its reciprocal, and rounds twice.
        mean = count.to(mask.dtype)
        mean = mean.div_(torch.full_like(mean, max(numel, 1))).clamp_(min=LEAST_MASK_MEAN)
        direction.mul_(mask.div_(mean))
