"""The cap's rule, AdamW or AMSGrad: the state is declared here, the arithmetic is torch's functional entry.

Decoupled Weight Decay Regularization (Loshchilov and Hutter), https://arxiv.org/abs/1711.05101, and On the Convergence
of Adam and Beyond (Reddi et al.), https://openreview.net/forum?id=ryQu7f-RZ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stac_optimizer import _rounding, _tensors, _units
from stac_optimizer._units import Piece, Unit
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

    def skips_by_itself(self, group: Group) -> bool:
        params = _tensors.local_views(group["params"])
        is_fused = group["fused"] and not group["stochastic_rounding"]
        return is_fused and not any(param.is_cpu for param in params) and all(map(_tensors.is_dense, params))

    def update(self, inputs: StepInputs) -> None:
        """Call torch, on the path that the flags ask for."""
        params, grads = _tensors.local_views(inputs.params), _tensors.local_views(inputs.grads, inputs.params)
        states = [_tensors.local_views(tensors) for tensors in inputs.states]
        work = Work(params, grads, states, inputs.group, inputs.grad_scale, inputs.found_inf)
        if inputs.group["stochastic_rounding"]:
            _rounding_adamw(work, inputs.positions)
        elif inputs.group["fused"]:
            _fused_adamw(work)
        elif self.path(inputs.params, inputs.group) == "single":
            _single_tensor_adamw(work)
        else:
            _adamw(work, fused=inputs.group["fused"], foreach=inputs.group["foreach"])


class Work(NamedTuple):
    """The update of some parameters of one group: local tensors, list by list; ``states`` starts with the counters."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    group: Group
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def only(self, chosen: Sequence[int]) -> Work:
        """The same for the parameters at these positions."""
        params, grads, *states = [[tensors[i] for i in chosen] for tensors in (self.params, self.grads, *self.states)]
        return self._replace(params=params, grads=grads, states=states)


# Note [Fused AdamW and layouts]
# torch's fused kernels walk memory, not indices: where the layouts of parameter, gradient and state differ they compute
# wrong values or write outside the parameter. Gradients are brought to the parameter's layout; a parameter with gaps in
# memory, such as a slice, takes the single-tensor path.
def _fused_adamw(work: Work) -> None:
    dense = list(map(_tensors.is_dense, work.params))
    some = work.only([index for index, is_dense in enumerate(dense) if is_dense])
    # torch's kernel writes the unscaled gradients back, so with a scale it gets copies.
    grads = [
        _tensors.in_layout_of(param, grad if work.grad_scale is None else grad.clone())
        for param, grad in zip(some.params, some.grads, strict=True)
    ]
    if some.params:
        _adamw(some._replace(grads=grads), fused=True)
    rest = work.only([index for index, is_dense in enumerate(dense) if not is_dense])
    if rest.params:
        _single_tensor_adamw(rest)


def _single_tensor_adamw(work: Work) -> None:
    """Small parameters in one call; large ones block by block, see Note [Units of work]."""
    numels = [_block_numel(param) for param in work.params]
    is_small = [param.numel() <= numel for param, numel in zip(work.params, numels, strict=True)]
    if any(is_small):
        _adamw(work.only([index for index, small in enumerate(is_small) if small]), foreach=False)
    for index, small in enumerate(is_small):
        if not small:
            for block, _ in _blocks(work.only([index])):
                _adamw(block, foreach=False)


def _block_numel(param: Tensor) -> int:
    is_whole = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return param.numel() if is_whole else _units.block_numel(param)


def _blocks(work: Work) -> Iterator[tuple[Work, Piece]]:
    """The blocks of one parameter, each to be stepped from the same count of steps."""
    (step,), *states = work.states
    before = step.clone()
    tensors = [*work.params, *work.grads, *(tensor for (tensor,) in states)]
    for piece in _units.blocks(*tensors, numel=_block_numel(work.params[0])):
        step.copy_(before)
        params, grads, *held = [[tensor] for tensor in piece.tensors]
        yield work._replace(params=params, grads=grads, states=[[step], *held]), piece


def _rounding_adamw(work: Work, positions: Sequence[int]) -> None:
    """In float32, block by block; what is stored is rounded stochastically, each kind of tensor by bits of its own."""
    for index, position in enumerate(positions):
        for block, piece in _blocks(work.only([index])):
            (step,), *states = block.states
            stored = [*block.params, *(tensor for (tensor,) in states)]
            weight, *held = (tensor.float() for tensor in stored)
            in_float32 = block._replace(
                params=[weight], grads=[block.grads[0].float()], states=[[step], *([t] for t in held)]
            )
            _adamw(in_float32, foreach=False)
            for kind, (result, tensor) in enumerate(zip((weight, *held), stored, strict=True)):
                if tensor.dtype == torch.bfloat16:
                    salt = _rounding.salts(work.group["rounding_seed"], [position], [step], kind=kind)
                    noise = _rounding.noise_of(piece, Unit([piece], (0,)), salt)
                    _rounding.round_into(result, tensor, noise)
                else:  # of a checkpoint, which keeps its dtype
                    tensor.copy_(result)


def _adamw(work: Work, *, fused: bool | None = None, foreach: bool | None = None) -> None:
    group = work.group
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    grads = work.grads if fused else _tensors.unscaled(work.grads, work.grad_scale)
    # torch wants one dtype. A checkpoint may have brought state of another, which it keeps: work in the wider one then.
    stored = [work.params, *work.states[1:]]
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
        work.states[0],
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
