"""The trunk's update on a CUDA device: all tensors of a group in one Triton launch, two where it is cautious.

It is bound by the bytes it moves: a dozen operations on a weight, its gradient and its average, each of which is read
once and each result written once, where operations of torch would carry every intermediate through memory. A launch has
one program for each chunk of :data:`CHUNK` consecutive elements of a tensor's memory; a program looks up its tensor
in rows of addresses on the device and walks its chunk block by block. A block is as many 16-byte loads as keep memory
busy while few enough values live for many programs to share a core.

Importing this file imports triton, which torch's builds without CUDA lack: import it only where it is there.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_optimizer.optim.signum.fused.triton_kernels import CHUNK, OPTIONS, count_kernel, update_kernel
from stac_optimizer.tensors.device_tables import integers, numbers, owners
from stac_optimizer.tensors.precision import arithmetic_dtype

__all__ = ["fused_signum"]

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def fused_signum(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    scales: list[Tensor],
    *,
    lr: float | Tensor,
    decay_factor: float | Tensor | None,
    change_factor: float,
    cautious_floor: float | None,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    noise_seeds: Tensor | None,
    rounds: bool,
) -> None:
    """Update tensors of one device, each list of one dtype, in place; nothing waits for the device.

    Args:
        params: real tensors without gaps in their memory.
        grads: read-only, of the parameters' layouts.
        exp_avgs: likewise; int8 ones have a multiple of 128 elements. Empty without momentum.
        scales: for int8 averages alone, a float32 for each 128 elements.
        lr: a number, or a 0-dim tensor.
        decay_factor: what weights are multiplied by before the step, or None.
        change_factor: the share of the new gradient in an average.
        cautious_floor: the least mean of a mask; None for a step that is not cautious.
        maximize: whether to ascend.
        grad_scale: what the gradients were multiplied by, in one element.
        found_inf: one element; unless it is 0, nothing changes.
        noise_seeds: int32, one for each tensor, where weights or averages are rounded by chance.
        rounds: whether weights are, and bfloat16 averages.
    """
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device
        chunks = [triton.cdiv(tensor.numel(), CHUNK.value) for tensor in params]
        if not any(chunks):
            return
        device, dtype = params[0].device, arithmetic_dtype(params[0].dtype)
        numels = integers([tensor.numel() for tensor in params], device)
        work = (owners(chunks, device), integers(list(accumulate(chunks, initial=0)), device), numels)
        addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in (params, grads, exp_avgs, scales)]
        weight_row, *rows = [integers(row, device) if row else None for row in addresses]
        coefficients = numbers([lr, 1.0 if decay_factor is None else decay_factor, change_factor], dtype, device)
        arguments = {
            "grad_dtype": DTYPES[grads[0].dtype],
            "average_dtype": DTYPES[exp_avgs[0].dtype] if exp_avgs else None,
            "arithmetic": DTYPES[dtype],
            "maximize": maximize,
            "is_aligned": not any(address % 16 for row in addresses[:3] for address in row),
            **OPTIONS,
        }
        factors = None
        if cautious_floor is not None:
            counts = torch.zeros_like(numels)
            count_kernel[(sum(chunks),)](counts, *work, *rows, coefficients, grad_scale, found_inf, **arguments)
            factors = (counts.to(dtype) / numels).clamp_(min=cautious_floor).reciprocal_()
        update_kernel[(sum(chunks),)](
            *work, weight_row, *rows, noise_seeds, factors, coefficients, grad_scale, found_inf,
            weight_dtype=DTYPES[params[0].dtype], decays=decay_factor is not None, rounds=rounds, **arguments,
        )  # fmt: skip
