"""The trunk's update on lists of tensors: the operations of ``_sign_momentum_kernels.py``, in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer import _tensors
from stac_optimizer._units import buckets
from stac_optimizer.rules._sign_momentum_kernels import Numbers, Work, wider

__all__ = ["multi_tensor"]


def multi_tensor(work: Work) -> None:
    """Update lists of tensors, a bucket at a time. Masks, codes and stochastic rounding have no such form."""
    for indices in _tensors.indices_by_device_and_dtype(work.tensorlists):
        some = work.only(indices).tensorlists
        numbers = work.numbers(some[0][0].device)
        # torch.compile fuses the operations by itself.
        for bucket in [some] if torch.compiler.is_compiling() else buckets(some):
            _multi_tensor_bucket(bucket, numbers, maximize=work.group["maximize"])


def _multi_tensor_bucket(bucket: Sequence[list[Tensor]], numbers: Numbers, *, maximize: bool) -> None:
    params, grads, *exp_avgs = bucket
    averages = _multi_tensor_average(grads, exp_avgs, numbers, maximize=maximize)
    weights = _tensors.foreach_upcast(params)
    if numbers.decay_factor is not None:
        _tensors.foreach_mul_(weights, numbers.decay_factor)
    directions = list(_tensors.foreach_sign(averages))
    _tensors.foreach_add_(directions, averages, alpha=0)  # Note [Non-finite averages]
    _tensors.foreach_mul_(directions, numbers.lr)
    _tensors.foreach_sub_(weights, directions)
    _tensors.foreach_downcast(weights, params)


def _multi_tensor_average(
    grads: list[Tensor], exp_avgs: Sequence[list[Tensor]], numbers: Numbers, *, maximize: bool
) -> list[Tensor]:
    """Update and return the averages, in arithmetic precision, of lists of one device and dtype."""
    grads = _tensors.foreach_upcast(grads)
    if numbers.grad_scale is not None:
        grads = list(_tensors.foreach_div(grads, numbers.grad_scale))
    if maximize:
        grads = list(_tensors.foreach_neg(grads))
    if not exp_avgs:
        return grads
    averages = _tensors.foreach_upcast(exp_avgs[0], wider(exp_avgs[0][0], grads[0]))
    differences = _tensors.foreach_sub(grads, averages)
    _tensors.foreach_mul_(differences, numbers.change_factor)
    _tensors.foreach_add_(averages, differences)
    _tensors.foreach_downcast(averages, exp_avgs[0])
    return averages
