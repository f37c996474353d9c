"""The precision that tensors are computed in, and gradient scales. Knows no rule."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LOW_PRECISION",
    "arithmetic_dtype",
    "arithmetic_lr",
    "downcast",
    "foreach_downcast",
    "foreach_upcast",
    "unscaled",
    "upcast",
    "widest_dtype",
]

LOW_PRECISION = (torch.bfloat16, torch.float16)


# Note [Low-precision arithmetic]
# bfloat16 and float16 tensors are computed in float32 and rounded once, when the result is stored. In their own dtype
# each operation rounds, and paths disagree: torch's foreach operations round a Python scalar to the dtype first,
# its single-tensor operations do not.
def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of this dtype are computed in (Note [Low-precision arithmetic])."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def arithmetic_lr(lr: Tensor) -> Tensor:
    """A one-element learning rate as a tensor of no dimension, in float32 at least: 1 - lr * decay is 1 in bfloat16."""
    return lr.reshape(()).to(torch.promote_types(lr.dtype, torch.float32))


def upcast(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of a low-precision one."""
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype that a device computes in, where squares and sums of what float32 holds do not overflow."""
    return torch.float32 if device.type == "mps" else torch.float64


def downcast(result: Tensor, stored: Tensor) -> None:
    """Round what was computed on an :func:`upcast` copy into the stored tensor."""
    if result is not stored:
        stored.copy_(result)


def foreach_upcast(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """:func:`upcast` for a list of one dtype, or the conversion to another."""
    dtype = dtype or arithmetic_dtype(tensors[0].dtype)
    if tensors[0].dtype == dtype:
        return tensors
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def foreach_downcast(results: list[Tensor], stored: list[Tensor]) -> None:
    """:func:`downcast` for a list of one dtype."""
    if results[0] is not stored[0]:
        torch._foreach_copy_(stored, results)


def unscaled(grads: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """Gradients divided by a scale, as copies: in arithmetic precision, or what the scale saved would underflow."""
    if grad_scale is None:
        return grads
    return [upcast(grad) / grad_scale.to(grad.device) for grad in grads]
