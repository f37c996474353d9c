"""The cap's rule, AdamW or AMSGrad: the state is declared here, the arithmetic is torch's functional entry.

Decoupled Weight Decay Regularization (Loshchilov and Hutter), https://arxiv.org/abs/1711.05101, and On the Convergence
of Adam and Beyond (Reddi et al.), https://openreview.net/forum?id=ryQu7f-RZ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stac_optimizer import _tensors
from stac_optimizer._validation import boolean, non_negative, pair_of_fractions
from stac_optimizer.rules._rule import Group, Hyperparameter, Rule, StateTensor, StepInputs

__all__ = ["AdamW"]


class AdamW(Rule):
    """``torch.optim.AdamW`` to the bit, on each of its paths.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the parameter), with ``amsgrad`` also
    ``max_exp_avg_sq``. One lr moves a weight by about lr.
    """

    name = "adamw"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "amsgrad": Hyperparameter(default=False, check=boolean),
    }
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
    paths = frozenset({"single", "foreach", "fused"})

    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        """The counter and two averages, three tensors under ``amsgrad``."""
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        return StateTensor(key="step", counter=True), *(StateTensor(key=key) for key in keys)

    def refusal(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """What torch's AdamW would find out in the middle of its update."""
        reason = super().refusal(param, grad, group)
        if reason is not None:
            return reason
        if grad.dtype != param.dtype:
            return f"is {param.dtype} and its gradient {grad.dtype}; AdamW needs one dtype, so convert the gradient"
        device = param.device.type
        if group["fused"] and not (device in _tensors.fused_devices() and param.is_floating_point()):
            return f"is {param.dtype} on {device!r}, for which torch has no fused AdamW; use fused=False"
        if group["capturable"] and not torch.compiler.is_compiling() and device not in _tensors.capturable_devices():
            return f"is on {device!r}, which cannot be captured; use capturable=False"
        return None

    def update(self, inputs: StepInputs) -> None:
        """Call torch, on the path that the flags ask for."""
        group, grad_scale = inputs.group, inputs.grad_scale
        params, grads = _tensors.local_views(inputs.params), _tensors.local_views(inputs.grads, inputs.params)
        states = [_tensors.local_views(tensors) for tensors in inputs.states]
        if not group["fused"]:
            grads = _tensors.unscaled(grads, grad_scale)
            _adamw(params, grads, states, group, fused=group["fused"], foreach=group["foreach"])
            return
        # Note [Fused AdamW and layouts]
        # torch's fused kernels walk memory, not indices: where the layouts of parameter, gradient and state differ they
        # compute wrong values or write outside the parameter. Gradients are brought to the parameter's layout; a
        # parameter with gaps in memory, such as a slice, takes the single-tensor path.
        dense = [_tensors.has_layout_of(exp_avg, param) for param, exp_avg in zip(params, states[1], strict=True)]
        for fused in (True, False):
            chosen = [index for index, is_dense in enumerate(dense) if is_dense is fused]
            if not chosen:
                continue
            some_params, some_grads = [params[i] for i in chosen], [grads[i] for i in chosen]
            some_states = [[tensors[i] for i in chosen] for tensors in states]
            if fused:
                # torch's kernel writes the unscaled gradients back, so with a scale it gets copies.
                in_layout = [
                    _in_layout_of(param, grad if grad_scale is None else grad.clone())
                    for param, grad in zip(some_params, some_grads, strict=True)
                ]
                _adamw(some_params, in_layout, some_states, group, fused=True, grad_scale=grad_scale)
            else:
                _adamw(some_params, _tensors.unscaled(some_grads, grad_scale), some_states, group, foreach=False)


def _in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    return grad if _tensors.has_layout_of(grad, param) else torch.empty_like(param).copy_(grad)


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[list[Tensor]],
    group: Group,
    *,
    fused: bool | None = None,
    foreach: bool | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    # torch wants one dtype. A checkpoint may have brought state of another, which it keeps: work in the wider one then.
    dtypes = [
        reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        for tensors in zip(params, *states[1:], strict=True)
    ]
    stored = [params, *states[1:]]
    weights, exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = working = [_converted(tensors, dtypes) for tensors in stored]
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        _converted(grads, dtypes),
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs[0] if max_exp_avg_sqs else [],
        states[0],
        foreach=foreach,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=fused,
        grad_scale=grad_scale,
        has_complex=any(param.is_complex() for param in params),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for results, tensors in zip(working, stored, strict=True):
        for result, tensor in zip(results, tensors, strict=True):
            _tensors.downcast(result, tensor)


def _converted(tensors: list[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
