"""AdamW's update of some parameters, and the call of torch that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stac_optimizer.rule import Group
from stac_optimizer.tensors.layouts import has_layout_of, in_layout_of
from stac_optimizer.tensors.precision import arithmetic_lr, downcast, unscaled
from stac_optimizer.tensors.units.pieces import Tensors

__all__ = ["AdamWUpdate", "call_adamw"]


class AdamWUpdate(NamedTuple):
    """The update of some parameters of one group.

    Args:
        params: the parameters as the optimizer holds them, DTensors whole.
        weights: what of them is on this rank.
        grads: their gradients, likewise.
        steps: their counters.
        averages: by kind of average a list, likewise.
        group: their group.
        grad_scale: what a GradScaler left the gradients multiplied by.
        found_inf: not 0 where a GradScaler found NaN or infinity.
    """

    params: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    averages: list[list[Tensor]]
    group: Group
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def only(self, chosen: Sequence[int]) -> AdamWUpdate:
        """The same for the parameters at these positions."""
        held = (self.params, self.weights, self.grads, self.steps, *self.averages)
        params, weights, grads, steps, *averages = [[tensors[i] for i in chosen] for tensors in held]
        return AdamWUpdate(params, weights, grads, steps, averages, self.group, self.grad_scale, self.found_inf)

    def using(self, weights: list[Tensor], grads: list[Tensor], averages: list[list[Tensor]]) -> AdamWUpdate:
        """The same on other tensors; torch.compile of torch 2.6 knows no ``_replace``."""
        return AdamWUpdate(
            self.params, weights, grads, self.steps, averages, self.group, self.grad_scale, self.found_inf
        )

    def on(self, tensors: Tensors) -> AdamWUpdate:
        """The same on a part of one parameter."""
        return self.using([tensors.param], [tensors.grad], [[average] for average in tensors.state])

    def counting(self, steps: list[Tensor]) -> AdamWUpdate:
        """The same with other counters."""
        return AdamWUpdate(
            self.params, self.weights, self.grads, steps, self.averages, self.group, self.grad_scale, self.found_inf
        )

    def tensors(self) -> Tensors:
        """The tensors of one parameter."""
        (weight,), (grad,) = self.weights, self.grads
        return Tensors(weight, grad, tuple([average for (average,) in self.averages]))

    def in_layout(self) -> AdamWUpdate:
        """The same with gradients in the layout of their parameters."""
        return self.using(self.weights, list(map(in_layout_of, self.weights, self.grads)), self.averages)

    def needs_no_copy(self, index: int) -> bool:
        """Whether gradient and state of a parameter are of its dtype, and the gradient of its layout."""
        weight, grad = self.weights[index], self.grads[index]
        same_dtype = all(tensors[index].dtype == weight.dtype for tensors in (self.grads, *self.averages))
        return same_dtype and has_layout_of(grad, weight)


def call_adamw(work: AdamWUpdate, *, fused: bool | None = None, foreach: bool | None = None) -> None:
    """Let torch compute the update, on the path that is asked for."""
    group = work.group
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    grads = work.grads if fused else unscaled(work.grads, work.grad_scale)
    # torch wants one dtype. A checkpoint may have brought state of another, which it keeps: work in the wider one then.
    stored = [work.weights, *work.averages]
    dtypes = [
        reduce(torch.promote_types, (tensor.dtype for tensor in tensors)) for tensors in zip(*stored, strict=True)
    ]
    weights, exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = working = [_converted(tensors, dtypes) for tensors in stored]
    adamw(
        weights,
        _converted(grads, dtypes),
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs[0] if max_exp_avg_sqs else [],
        work.steps,
        foreach=foreach,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=fused,
        grad_scale=work.grad_scale if fused else None,
        found_inf=work.found_inf if fused else None,
        has_complex=any(param.is_complex() for param in weights),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=arithmetic_lr(lr) if isinstance(lr, Tensor) else lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for results, tensors in zip(working, stored, strict=True):
        for result, tensor in zip(results, tensors, strict=True):
            downcast(result, tensor)


def _converted(tensors: list[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
