"""Parameters as stacks of matrices, and what of all of them is computed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stac_optimizer.optim.muon.newton_schulz import signs_of_stack
from stac_optimizer.rule import Group
from stac_optimizer.tensors.torch_private import has_fast_bfloat16

__all__ = ["RATIOS", "matrices_shape", "signs_of_matrices"]

# Liu et al. (https://arxiv.org/abs/2502.16982): the root mean square of AdamW's steps, about 0.2, whatever the shape.
RMS_OF_ADAMW = 0.2

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


def signs_of_matrices(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Of each tensor the signs of its matrices, times the ratio of their shape.

    Matrices of one shape, or of its transpose, are multiplied as one stack; on the single-tensor path one parameter's.
    """
    stacks = [tensor.reshape(matrices_shape(tensor.shape, group)) for tensor in tensors]
    are_tall = [stack.shape[1] > stack.shape[2] for stack in stacks]
    wide = [stack.mT if is_tall else stack for stack, is_tall in zip(stacks, are_tall, strict=True)]
    alike: dict[object, list[int]] = {}
    for index, stack in enumerate(wide):
        alike.setdefault(index if group["foreach"] is False else stack.shape[1:], []).append(index)
    results: dict[int, Tensor] = {}
    for indices in alike.values():
        some = [wide[index] for index in indices]
        signs = _signs(some[0] if len(some) == 1 else torch.cat(some), group)
        results.update(zip(indices, signs.split([stack.shape[0] for stack in some]), strict=True))
    ratio = RATIOS[group["adjust_lr"]]
    made = []
    for index, (tensor, stack) in enumerate(zip(tensors, stacks, strict=True)):
        signs = results[index].mT if are_tall[index] else results[index]
        made.append((signs * (ratio(*stack.shape[1:]) if stack.numel() else 1.0)).reshape(tensor.shape))
    return made


def _signs(stack: Tensor, group: Group) -> Tensor:
    return signs_of_stack(stack, group["ns_steps"], group["ns_coefficients"], _dtype_of_products(stack, group))


def _dtype_of_products(stack: Tensor, group: Group) -> torch.dtype:
    """As asked for; else bfloat16 where the device multiplies it faster, but for what is more than float32."""
    if group["ns_dtype"] is not None:
        chosen: torch.dtype = getattr(torch, group["ns_dtype"])
        return chosen
    return torch.bfloat16 if stack.dtype == torch.float32 and has_fast_bfloat16(stack.device) else stack.dtype
