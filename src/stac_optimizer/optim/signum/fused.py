"""Which kernels ``fused=True`` means for the trunk: on the CPU those of torch.compile, on CUDA those of Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded, real_parts
from stac_optimizer.optim.signum.arithmetic import LEAST_MASK_MEAN, SignUpdate
from stac_optimizer.optim.signum.compiled import step_compiled
from stac_optimizer.optim.signum.single import single_tensor
from stac_optimizer.rule import Group
from stac_optimizer.tensors.codes import has_whole_blocks
from stac_optimizer.tensors.kinds import can_walk, has_data
from stac_optimizer.tensors.layouts import has_layout_of, in_layout_of, indices_by_device_and_dtype, is_dense
from stac_optimizer.tensors.pieces import Tensors

__all__ = ["fused", "has_fused", "skips_by_itself"]

# bfloat16 arithmetic, and the kernels' 16-byte accesses.
LEAST_CAPABILITY = (8, 0)
WIDEST = torch.float64


def has_fused(params: Sequence[Tensor]) -> bool:
    """Whether there are such kernels for the devices of all of these; torch.compile fuses by itself."""
    if torch.compiler.is_compiling() or not can_walk(params):
        return False
    return all(param.is_cpu or has_triton(param.device) for param in params)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device. Triton comes with torch's builds for CUDA."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return (
        is_nvidia
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def fused(work: SignUpdate) -> None:
    """Update by the kernels of each device."""
    for indices in indices_by_device_and_dtype(work.lists.flat()):
        some = work.only(indices)
        first = some.lists.at(0)
        # On CUDA not by the gradient: skips_by_itself, which knows none, has to find the same.
        if _is_wider([first.grad, *first.state] if first.param.is_cpu else first.state, first.param):
            single_tensor(some)
        elif first.param.is_cpu:
            step_compiled(some)
        else:
            by_triton(some)


def by_triton(work: SignUpdate) -> None:
    """Update parameters of one device and dtype in one launch; those that it does not fit one by one."""
    fits = [fits_triton(work.lists.at(index), param, work.group) for index, param in enumerate(work.params)]
    if not all(fits):
        single_tensor(work.only([index for index, fit in enumerate(fits) if not fit]))
    chosen = [index for index, fit in enumerate(fits) if fit]
    if not chosen:
        return
    from stac_optimizer.optim.signum.triton import fused_signum  # noqa: PLC0415 - triton is not everywhere

    work = work.only(chosen)
    lists = work.lists
    device = lists.params[0].device
    coefficients = work.coefficients(device)
    fused_signum(
        lists.params,
        list(map(in_layout_of, lists.params, lists.grads)),
        lists.states[0] if lists.states else [],
        lists.scales or [],
        lr=coefficients.lr,
        decay_factor=coefficients.decay_factor,
        change_factor=1 - work.group["momentum"],
        cautious_floor=LEAST_MASK_MEAN if work.group["cautious"] else None,
        maximize=work.group["maximize"],
        grad_scale=coefficients.grad_scale,
        found_inf=None if work.found_inf is None else work.found_inf.to(device),
        noise_seeds=None if work.noise_seeds is None else work.noise_seeds.to(device),
        rounds=work.group["stochastic_rounding"],
    )


def fits_triton(tensors: Tensors, param: Tensor, group: Group) -> bool:
    """Whether Triton's kernels, which walk memory, can update a parameter.

    Args:
        tensors: what of it and of its state is on this rank; the gradient does not matter.
        param: the parameter itself; means over shards are not for one launch.
        group: its group.
    """
    if (group["cautious"] and is_sharded(param)) or not all(map(has_data, tensors.written())):
        return False
    if tensors.scale is not None:
        return has_whole_blocks([*tensors.written(), tensors.scale])
    is_alike = all(has_layout_of(average, tensors.param) for average in tensors.state)
    return is_dense(tensors.param) and is_alike and not _is_wider(tensors.state, tensors.param)


def _is_wider(tensors: Sequence[Tensor], param: Tensor) -> bool:
    """Whether one of these, such as an average that a checkpoint brought, is wider than the kernels' arithmetic."""
    return any(tensor.dtype == WIDEST != param.dtype for tensor in tensors)


def skips_by_itself(group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
    """Whether kernels read ``found_inf`` for every parameter."""
    params = group["params"]
    if not (group["fused"] and has_fused(params)) or any(param.is_cpu for param in params):
        return False
    return all(
        fits_triton(_held(local, states.get(param, {})), param, group)
        for param, local in zip(params, real_parts(params), strict=True)
    )


def _held(local: Tensor, state: Mapping[str, Tensor]) -> Tensors:
    """A parameter and its state before a step, without a gradient."""
    average = tuple(real_parts([state["exp_avg"]])) if "exp_avg" in state else ()
    is_coded = bool(average) and average[0].dtype == torch.int8
    return Tensors(local, local, average, real_parts([state["exp_avg_scale"]])[0] if is_coded else None)
