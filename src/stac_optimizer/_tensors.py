"""What rules share about tensors: grouping, real and local views, arithmetic precision. Home of private torch names.

Why each private name is used:

- ``torch._foreach_*``: one call, and on CUDA a few launches, for a whole list of tensors. Every optimizer of
  torch.optim is built from them; they have no public names.
- ``_default_to_fused_or_foreach``: torch's own answer to "is foreach safe and faster for these tensors?", which rests
  on lists of devices and tensor types that grow with its releases.
- ``_get_capturable_supported_devices``, ``_get_fused_kernels_supported_devices``: the device lists that torch's AdamW
  asserts in the middle of its update; here they are asked before anything has changed.
- ``DistributedDataParallel._join_config``: whether ranks may end before others, in the context of its ``join``.
- ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``: where in a whole tensor a shard begins.
  Only torch knows how each placement cuts, strided ones of FSDP2 beside tensor parallelism among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach, _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

__all__ = [
    "LOW_PRECISION",
    "arithmetic_dtype",
    "capturable_devices",
    "count_step_",
    "downcast",
    "foreach_add_",
    "foreach_copy_",
    "foreach_div",
    "foreach_downcast",
    "foreach_mul_",
    "foreach_neg",
    "foreach_sign",
    "foreach_sub",
    "foreach_sub_",
    "foreach_upcast",
    "fused_devices",
    "has_layout_of",
    "in_layout_of",
    "indices_by_device_and_dtype",
    "is_dense",
    "is_foreach_faster",
    "is_joining",
    "local_shape_and_offsets",
    "real_views",
    "unscaled",
    "upcast",
]

foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_sign = torch._foreach_sign
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
capturable_devices = _get_capturable_supported_devices
fused_devices = _get_fused_kernels_supported_devices

LOW_PRECISION = (torch.bfloat16, torch.float16)


def is_foreach_faster(tensors: Sequence[Tensor], *, differentiable: bool) -> bool:
    """Whether torch would take its foreach path for these parameters by default."""
    _, foreach = _default_to_fused_or_foreach(list(tensors), differentiable, use_fused=False)
    return foreach


def indices_by_device_and_dtype(tensorlists: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Group positions whose tensors, list for list, share device and dtype: what one foreach call can take."""
    if all(len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1 for tensors in tensorlists):
        return [list(range(len(tensorlists[0])))]
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, tensors in enumerate(zip(*tensorlists, strict=True)):
        key = tuple((tensor.device, tensor.dtype) for tensor in tensors)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def count_step_(steps: list[Tensor]) -> None:
    """Add one to each counter. On the CPU a tensor addend is four times faster: a scalar is wrapped anew for each."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        torch._foreach_add_(steps, torch.ones((), dtype=torch.float32, device="cpu"), alpha=1)
    else:
        torch._foreach_add_(steps, 1)


def real_views(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as views of real numbers, the others as they are."""
    if not any(map(Tensor.is_complex, tensors)):
        return tensors
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


# Note [Low-precision arithmetic]
# bfloat16 and float16 tensors are computed in float32 and rounded once, when the result is stored. In their own dtype
# each operation rounds, and paths disagree: torch's foreach operations round a Python scalar to the dtype first,
# its single-tensor operations do not.
def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of this dtype are computed in (Note [Low-precision arithmetic])."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def upcast(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of a low-precision one."""
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor


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


def is_joining(ddp: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether this is within the context of its ``join``."""
    return bool(ddp._join_config.enable)


def local_shape_and_offsets(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of what this rank holds of a DTensor, and for each dimension the index at which that begins."""
    # Imported late: it costs time that few need to spend.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return shape, offsets


def unscaled(grads: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """Gradients divided by a scale, as copies: in arithmetic precision, or what the scale saved would underflow."""
    if grad_scale is None:
        return grads
    return [upcast(grad) / grad_scale.to(grad.device) for grad in grads]


def has_layout_of(tensor: Tensor, other: Tensor) -> bool:
    """Whether both fill their memory without gaps, element for element in the same order."""
    if tensor.shape != other.shape:
        return False
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    return tensor.stride() == other.stride() and is_dense(other)


def in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or a copy, in the layout of a dense parameter."""
    return grad if has_layout_of(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True
