"""The trunk's update on lists of tensors: the operations of ``arithmetic.py``, in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.optim.signum.arithmetic import Coefficients, SignUpdate, wider
from stac_optimizer.tensors.layouts import indices_by_device_and_dtype
from stac_optimizer.tensors.precision import foreach_downcast, foreach_upcast
from stac_optimizer.tensors.units.cutting import buckets
from stac_optimizer.tensors.units.pieces import Lists

__all__ = ["multi_tensor"]


def multi_tensor(work: SignUpdate) -> None:
    """Update lists of tensors, a bucket at a time. Masks, codes and stochastic rounding have no such form."""
    for indices in indices_by_device_and_dtype(work.lists.flat()):
        some = work.lists.only(indices)
        coefficients = work.coefficients(some.params[0].device)
        # torch.compile fuses the operations by itself.
        for bucket in [some] if torch.compiler.is_compiling() else buckets(some):
            _multi_tensor_bucket(bucket, coefficients, maximize=work.group["maximize"])


def _multi_tensor_bucket(bucket: Lists, coefficients: Coefficients, *, maximize: bool) -> None:
    averages = _multi_tensor_average(bucket.grads, bucket.states, coefficients, maximize=maximize)
    weights = foreach_upcast(bucket.params)
    decay_factor = coefficients.decay_factor
    if decay_factor is not None:
        decay_factor = decay_factor.to(weights[0].dtype) if isinstance(decay_factor, Tensor) else decay_factor
        torch._foreach_mul_(weights, decay_factor)
    directions = list(torch._foreach_sign(averages))
    torch._foreach_add_(directions, averages, alpha=0)  # Note [Non-finite averages]
    directions = foreach_upcast(directions, torch.promote_types(directions[0].dtype, weights[0].dtype))
    torch._foreach_mul_(directions, coefficients.lr)
    torch._foreach_sub_(weights, directions)
    foreach_downcast(weights, bucket.params)


def _multi_tensor_average(
    grads: list[Tensor], exp_avgs: Sequence[list[Tensor]], coefficients: Coefficients, *, maximize: bool
) -> list[Tensor]:
    """Update and return the averages, in arithmetic precision, of lists of one device and dtype."""
    grads = foreach_upcast(grads)
    if coefficients.grad_scale is not None:
        grads = list(torch._foreach_div(grads, coefficients.grad_scale))
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if not exp_avgs:
        return grads
    averages = foreach_upcast(exp_avgs[0], wider(exp_avgs[0][0], grads[0]))
    differences = torch._foreach_sub(grads, averages)
    torch._foreach_mul_(differences, coefficients.change_factor)
    torch._foreach_add_(averages, differences)
    foreach_downcast(averages, exp_avgs[0])
    return averages
