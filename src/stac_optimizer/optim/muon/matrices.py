"""Parameters as stacks of matrices, and what of all of them is computed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer.optim.muon.newton_schulz import normalized, signs_of_stack
from stac_optimizer.rule import Group
from stac_optimizer.tensors.torch_private import has_fast_bfloat16
from stac_optimizer.tensors.units.pieces import is_recorded

__all__ = ["RATIOS", "dtype_of_products", "matrices_shape", "ratio_of", "rms_of", "signs_of_matrices"]

# Liu et al. (https://arxiv.org/abs/2502.16982): the root mean square of AdamW's steps, about 0.2, whatever the shape.
RMS_OF_ADAMW = 0.2

# Matrices of fewer rows, or columns, gain nothing by products in bfloat16, and lose precision.
LEAST_IN_BFLOAT16 = 64

RATIOS: Mapping[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: RMS_OF_ADAMW * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
}
"""By name what a sign of so many rows and columns is multiplied by."""


def matrices_shape(shape: Sequence[int], group: Group) -> tuple[int, int, int]:
    """How many matrices a parameter of this shape holds, and the rows and columns of each."""
    batch_dims, row_blocks = group["batch_dims"], group["row_blocks"]
    rows, *rest = shape[batch_dims:]
    return math.prod(shape[:batch_dims]) * row_blocks, rows // row_blocks, math.prod(rest)


def ratio_of(shape: Sequence[int], group: Group) -> float:
    """What the signs of the matrices of a parameter are multiplied by."""
    _, rows, columns = matrices_shape(shape, group)
    return RATIOS[group["adjust_lr"]](rows, columns) if rows and columns else 1.0


def rms_of(shape: Sequence[int], group: Group) -> float:
    """The root mean square of what a step of lr 1 adds to the elements of a parameter."""
    return ratio_of(shape, group) / math.sqrt(max(1, *matrices_shape(shape, group)[1:]))


def signs_of_matrices(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Of each tensor the signs of its matrices, in the dtype of the products.

    Matrices of one shape, or of its transpose, are multiplied as one stack; on the single-tensor path one parameter's.
    """
    stacks = [tensor.reshape(matrices_shape(tensor.shape, group)) for tensor in tensors]
    wide = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    alike: dict[object, list[int]] = {}
    for index, stack in enumerate(wide):
        alike.setdefault(index if group["foreach"] is False else stack.shape[1:], []).append(index)
    results: dict[int, Tensor] = {}
    for indices in alike.values():
        first = indices[0]
        dtype = dtype_of_products(tensors[first], tensors[first].shape, group)
        together = _stacked([wide[index] for index in indices], dtype)
        signs = signs_of_stack(together, group["ns_steps"], group["ns_coefficients"])
        results.update(zip(indices, signs.split([wide[index].shape[0] for index in indices]), strict=True))
    return [
        (results[index] if wide[index] is stack else results[index].mT).reshape(tensor.shape)
        for index, (tensor, stack) in enumerate(zip(tensors, stacks, strict=True))
    ]


def _stacked(stacks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One stack of them all, in this dtype."""
    if stacks[0].dtype == torch.float64 != dtype and stacks[0].numel():
        stacks = [normalized(stack) for stack in stacks]  # or what float32 cannot hold would be lost
    if len(stacks) == 1 and not is_recorded():  # else the next step would write to what the graph keeps
        return stacks[0].to(dtype).contiguous()
    sizes = [stack.shape[0] for stack in stacks]
    result = stacks[0].new_empty((sum(sizes), *stacks[0].shape[1:]), dtype=dtype)
    start = 0
    for size, stack in zip(sizes, stacks, strict=True):
        result[start : start + size].copy_(stack)  # parts made by split could not be written to under autograd
        start += size
    return result


def dtype_of_products(tensor: Tensor, shape: Sequence[int], group: Group) -> torch.dtype:
    """As asked for; else bfloat16 where the device multiplies matrices of this size faster in it.

    Args:
        tensor: tells device and dtype.
        shape: of the whole parameter.
        group: of the parameter.
    """
    if group["ns_dtype"] is not None:
        chosen: torch.dtype = getattr(torch, group["ns_dtype"])
        return chosen
    is_large = min(matrices_shape(shape, group)[1:]) >= LEAST_IN_BFLOAT16
    is_faster = is_large and tensor.dtype == torch.float32 and has_fast_bfloat16(tensor.device)
    return torch.bfloat16 if is_faster else tensor.dtype
