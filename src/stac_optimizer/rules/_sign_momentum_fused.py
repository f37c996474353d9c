"""Which kernels ``fused=True`` means for the trunk: on the CPU those of torch.compile, on CUDA those of Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer import _codes, _shards, _tensors
from stac_optimizer.rules._rule import Group
from stac_optimizer.rules._sign_momentum_compiled import compiled
from stac_optimizer.rules._sign_momentum_kernels import LEAST_AGREEMENT, Work
from stac_optimizer.rules._sign_momentum_single import single_tensor

__all__ = ["fused", "has_fused", "skips_by_itself"]

# bfloat16 arithmetic, and the kernels' 16-byte accesses.
LEAST_CAPABILITY = (8, 0)
WIDEST = torch.float64


def has_fused(params: Sequence[Tensor]) -> bool:
    """Whether there are such kernels for the devices of all of these; torch.compile fuses by itself."""
    return not torch.compiler.is_compiling() and all(param.is_cpu or has_triton(param.device) for param in params)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device. Triton comes with torch's builds for CUDA."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return (
        is_nvidia
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def fused(work: Work) -> None:
    """Update by the kernels of each device."""
    for indices in _tensors.indices_by_device_and_dtype(work.tensorlists):
        some = work.only(indices)
        param, grad, *state = (tensors[0] for tensors in some.tensorlists)
        # On CUDA not by the gradient: skips_by_itself, which knows none, has to find the same.
        if _is_wider([grad, *state] if param.is_cpu else state, param):
            single_tensor(some)
        elif param.is_cpu:
            compiled(some)
        else:
            by_triton(some)


def by_triton(work: Work) -> None:
    """Update parameters of one device and dtype in one launch; those that it does not fit one by one."""
    fits = [
        fits_triton(param, state, whole, work.group)
        for whole, param, _, *state in zip(work.wholes, *work.tensorlists, strict=True)
    ]
    if not all(fits):
        single_tensor(work.only([index for index, fit in enumerate(fits) if not fit]))
    chosen = [index for index, fit in enumerate(fits) if fit]
    if not chosen:
        return
    from stac_optimizer.rules._sign_momentum_triton import fused_sign_momentum  # noqa: PLC0415 - not everywhere there

    work = work.only(chosen)
    params, grads, *exp_avgs = work.tensorlists
    grads = list(map(_tensors.in_layout_of, params, grads))
    numbers = work.numbers(params[0].device)
    fused_sign_momentum(
        params,
        grads,
        exp_avgs[0] if exp_avgs else [],
        exp_avgs[1] if len(exp_avgs) > 1 else [],
        lr=numbers.lr,
        decay_factor=numbers.decay_factor,
        change_factor=1 - work.group["trunk_momentum"],
        cautious_floor=LEAST_AGREEMENT if work.group["trunk_cautious"] else None,
        maximize=work.group["maximize"],
        grad_scale=numbers.grad_scale,
        found_inf=None if work.found_inf is None else work.found_inf.to(params[0].device),
        salts=None if work.salt is None else work.salt.to(params[0].device),
    )


def fits_triton(param: Tensor, state: Sequence[Tensor], whole: Tensor, group: Group) -> bool:
    """Whether Triton's kernels, which walk memory, can update a parameter.

    Args:
        param: what of it is on this rank.
        state: of that the average, as codes with the scales.
        whole: the parameter itself; means over shards are not for one launch.
        group: its group.
    """
    if group["trunk_cautious"] and _shards.is_sharded(whole):
        return False
    if state and state[0].dtype == torch.int8:
        return _codes.has_whole_blocks([param, *state])
    is_alike = all(_tensors.has_layout_of(average, param) for average in state[:1])
    return _tensors.is_dense(param) and is_alike and not _is_wider(state, param)


def _is_wider(tensors: Sequence[Tensor], param: Tensor) -> bool:
    """Whether one of these, such as an average that a checkpoint brought, is wider than the kernels' arithmetic."""
    return any(tensor.dtype == WIDEST != param.dtype for tensor in tensors)


def skips_by_itself(group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Whether kernels read ``found_inf`` for every parameter."""
    wholes = group["params"]
    if not (group["fused"] and has_fused(wholes)) or any(param.is_cpu for param in wholes):
        return False
    keys = ("exp_avg", "exp_avg_scale")
    held = [[states[whole][key] for key in keys if key in states.get(whole, {})] for whole in wholes]
    params = zip(_shards.real_parts(wholes), map(_shards.real_parts, held), wholes, strict=True)
    return all(fits_triton(param, state, whole, group) for param, state, whole in params)
