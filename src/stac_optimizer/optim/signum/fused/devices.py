"""Which kernels ``fused=True`` means for the trunk: on the CPU those of C++, on CUDA those of Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded, real_parts
from stac_optimizer.optim.signum.arithmetic import LEAST_MASK_MEAN, SignUpdate
from stac_optimizer.optim.signum.fused.cpu import kernels_for, step_on_cpu
from stac_optimizer.optim.signum.single import single_tensor
from stac_optimizer.rule import Group
from stac_optimizer.tensors.codes import BLOCK, matrix_shape, scales_shape
from stac_optimizer.tensors.kinds import PLAIN_TYPES, can_walk, has_data, has_own_operations
from stac_optimizer.tensors.layouts import (
    has_layout_of,
    in_layout_of,
    indices_by_device_and_dtype,
    is_dense,
    overlap,
)
from stac_optimizer.tensors.units.pieces import Tensors

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
            by_cpp(some)
        else:
            by_triton(some)


def by_cpp(work: SignUpdate) -> None:
    """Update parameters of one dtype on the CPU; those that kernels do not fit by torch's operations."""
    fitting: SignUpdate | None = work
    if not _all_fit(work):
        if overlap(work.lists.params):  # and so are to be updated in their order
            single_tensor(work)
            return
        held = map(work.lists.at, range(len(work.params)))
        fits = [_fits(each, each.flat(), param, work.group) for each, param in zip(held, work.params, strict=True)]
        fitting = _only_fitting(work, fits)
    if fitting is None:
        return
    kernels = kernels_for(fitting)
    if kernels is None:
        single_tensor(fitting)
    else:
        step_on_cpu(fitting, kernels)


def _all_fit(work: SignUpdate) -> bool:
    """Whether all parameters, of one dtype, are such as most are: asked list by list, for there may be thousands."""
    lists, held = work.lists, work.lists.flat()
    if work.group["cautious"] and any(map(is_sharded, work.params)):
        return False
    are_plain = all(
        tensors[0].is_cpu and PLAIN_TYPES.issuperset(map(type, tensors)) and all(map(Tensor.is_contiguous, tensors))
        for tensors in held
    )
    shapes = [tensor.shape for tensor in lists.params]
    are_alike = are_plain and all([tensor.shape for tensor in tensors] == shapes for tensors in held[1:])
    if not (are_alike and all(map(_have_memory, held))):
        return False
    dtypes = {tensors[0].dtype for tensors in held}
    if lists.scales is None:
        return torch.int8 not in dtypes
    return WIDEST not in dtypes and all(map(_is_scale_of, lists.scales, lists.params))


def _only_fitting(work: SignUpdate, fits: Sequence[bool]) -> SignUpdate | None:
    """Update by torch's operations what kernels do not fit, and return the rest, if there is any."""
    if not all(fits):
        single_tensor(work.only([index for index, fit in enumerate(fits) if not fit]))
    chosen = [index for index, fit in enumerate(fits) if fit]
    return work.only(chosen) if chosen else None


def by_triton(work: SignUpdate) -> None:
    """Update parameters of one device and dtype in one launch; those that it does not fit by torch's operations."""
    from stac_optimizer.optim.signum.fused.triton import fused_signum  # noqa: PLC0415 - triton is not everywhere

    fits = [fits_triton(work.lists.at(index), param, work.group) for index, param in enumerate(work.params)]
    fitting = _only_fitting(work, fits)
    if fitting is None:
        return
    work = fitting
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
    """Whether Triton's kernels can update a parameter, whose gradient is brought into its layout.

    Args:
        tensors: what of it and of its state is on this rank.
        param: the parameter itself.
        group: its group.
    """
    has_whole_blocks = tensors.scale is None or matrix_shape(tensors.param)[1] % BLOCK == 0
    fits = has_whole_blocks and _fits(tensors, tensors.written(), param, group)
    return fits and not _is_wider(tensors.state, tensors.param)


def _fits(tensors: Tensors, walked: Sequence[Tensor], param: Tensor, group: Group) -> bool:
    """Whether kernels, which ask nothing themselves, can walk the memory of these, element for element.

    What does not belong together is left to torch's operations, which say so. Means over shards are none of a kernel's.
    """
    local = tensors.param
    if (group["cautious"] and is_sharded(param)) or not all(map(has_data, walked)):
        return False
    if any(has_own_operations(tensor) or tensor.device != local.device for tensor in walked):
        return False
    if not (all(tensor.shape == local.shape for tensor in walked) and _have_memory(walked)):
        return False
    if tensors.scale is not None:  # and all is computed in float32
        is_single = all(tensor.dtype != WIDEST and tensor.is_contiguous() for tensor in walked)
        return is_single and _is_scale_of(tensors.scale, local)
    is_coded = any(tensor.dtype == torch.int8 for tensor in tensors.state)
    return not is_coded and is_dense(local) and all(has_layout_of(tensor, local) for tensor in walked)


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.data_ptr, tensors)) or all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)


def _is_scale_of(scale: Tensor, local: Tensor) -> bool:
    """Whether a kernel finds a scale for each block of a parameter's codes."""
    is_whole = scale.shape == scales_shape(local) and scale.is_contiguous()
    return is_whole and scale.dtype == torch.float32 and scale.device == local.device


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
