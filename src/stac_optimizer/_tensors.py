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

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach, _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

__all__ = [
    "LOW_PRECISION",
    "are_zero",
    "arithmetic_dtype",
    "capturable_devices",
    "count_step_",
    "downcast",
    "first_nonfinite",
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
    "is_sharded",
    "is_sharded_by_row",
    "is_sharded_in_runs",
    "local_views",
    "places_at_end",
    "real_views",
    "run_offset",
    "sum_over_shards",
    "unscaled",
    "upcast",
    "zeros_by_row",
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


def first_nonfinite(grads: Sequence[Tensor], params: Sequence[Tensor]) -> int | None:
    """The position of the first gradient with NaN or infinity in any shard of it; None where there is none.

    Args:
        grads: gradients.
        params: for each the parameter whose placement it is brought to: what is partial here may be infinite as a sum.
    """
    local = real_views(local_views(list(grads), list(params)))
    if not _on_any_rank([not _are_finite(local)], params)[0]:
        return None
    return _on_any_rank([not _are_finite([grad]) for grad in local], params).index(True)


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    suspects = [tensor for tensor in tensors if tensor.numel() and not (tensor.is_cpu and _has_finite_sum(tensor))]
    # The largest magnitude tells, and unlike a sum it cannot overflow.
    return not suspects or bool(torch.nn.utils.get_total_norm(suspects, norm_type=math.inf).isfinite())


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether all elements are finite for certain. On the CPU a sum takes a tenth of the time of a maximum."""
    return math.isfinite(tensor.sum(dtype=arithmetic_dtype(tensor.dtype)).item())


def are_zero(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors hold nothing but zeros, in every shard of them."""
    return not _on_any_rank([any(bool(tensor.any()) for tensor in local_views(list(tensors)))], tensors)[0]


def _on_any_rank(flags: Sequence[bool], tensors: Sequence[Tensor]) -> Sequence[bool]:
    """Which flags are set on any rank that holds a shard of these tensors: ranks must not disagree on a step.

    Flags, for a maximum over ranks can lose a NaN.
    """
    meshes: dict[Any, Any] = {getattr(tensor, "device_mesh", None): tensor for tensor in tensors}
    for mesh, sharded in meshes.items():
        if mesh is not None:
            values = torch.tensor(flags, dtype=torch.float32, device=sharded.device)
            flags = [count > 0 for count in _sum_over_ranks(values, sharded, is_summed=[True] * mesh.ndim).tolist()]
    return flags


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


PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def local_views(tensors: list[Tensor], likes: list[Tensor] | None = None) -> list[Tensor]:
    """The local parts of DTensors, the other tensors as they are. Elementwise updates run on them where they lie.

    Args:
        tensors: plain tensors and DTensors.
        likes: for each the tensor whose placement it must have, or None where it has it.
    """
    if not torch.compiler.is_compiling() and PLAIN_TYPES.issuperset(map(type, tensors)):
        return tensors
    return [_local(tensor, tensor if likes is None else likes[i]) for i, tensor in enumerate(tensors)]


def _local(tensor: Any, like: Any) -> Tensor:
    if is_sharded(tensor):
        if tensor.placements != like.placements:
            tensor = tensor.redistribute(like.device_mesh, like.placements)
        tensor = tensor.to_local()
    # What a collective has not filled yet: kernels that walk memory would not wait.
    return cast(Tensor, tensor.wait() if hasattr(tensor, "wait") else tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def is_joining(ddp: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether this is within the context of its ``join``."""
    return bool(ddp._join_config.enable)


def zeros_by_row(param: Tensor, rows: int, columns: int) -> Tensor:
    """A float32 matrix of zeros with a row for each row of a parameter, and sharded as that is.

    One without columns is not: there is nothing to shard, and torch 2.6 cannot gather it.
    """
    if not is_sharded(param) or not columns:
        return torch.zeros((rows, columns), dtype=torch.float32, device=param.device)
    sharded: Any = param
    local_rows = sharded.to_local().shape[:1].numel()  # 1 for a scalar
    local = torch.zeros((local_rows, columns), dtype=torch.float32, device=param.device)
    shape = torch.Size((rows, columns))
    zeros: Tensor = type(sharded.data).from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=(columns, 1)
    )
    return zeros


def is_sharded_by_row(param: Any) -> bool:
    """Whether every rank holds whole rows, indices of the first dimension, of the parameter."""
    return {0, None}.issuperset(_cut_dims(param))


def _cut_dims(param: Any) -> list[int | None]:
    """For each dimension of a parameter's mesh the dimension of the parameter that it cuts, or None.

    Strided shards, though they cut, say that they are no shards.
    """
    return [getattr(placement, "dim", None) for placement in param.placements] if is_sharded(param) else []


def is_sharded_in_runs(param: Tensor) -> bool:
    """Whether what each rank holds of the parameter is one run of the whole's memory."""
    if {None}.issuperset(_cut_dims(param)):
        return True
    are_rows_outermost = not is_dense(param) or param.shape[0] < 2 or param.stride(0) == max(param.stride())
    return is_sharded_by_row(param) and are_rows_outermost


def places_at_end(param: Any, numel: int) -> list[int]:
    """Of the last elements of a whole parameter, those left over by runs of ``numel``, the places that this rank holds.

    Args:
        param: a contiguous DTensor. What is held of its end is the end of what is held of it, in the same order.
        numel: of a run.
    """
    start = param.numel() - param.numel() % numel
    shape, offsets = _local_shape_and_offsets(param)
    held = torch.arange(start, param.numel(), device="cpu")
    for size, length, offset, stride in zip(param.shape, shape, offsets, param.stride(), strict=True):
        along = held.div(stride, rounding_mode="floor") % size - offset
        held = held[(along >= 0) & (along < length)]
    places: list[int] = (held - start).tolist()
    return places


def _local_shape_and_offsets(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of what this rank holds of a DTensor, and for each dimension the index at which that begins."""
    # Imported late: it costs time that few need to spend.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return shape, offsets


def run_offset(param: Any) -> int:
    """The index, within the whole's memory, of the first element that this rank holds of a parameter.

    Args:
        param: sharded in runs, or not at all.
    """
    if {None}.issuperset(_cut_dims(param)) or not param.numel():
        return 0
    row = _local_shape_and_offsets(param)[1][0]
    return int(row) * (int(param.numel()) // int(param.shape[0]))


def sum_over_shards(value: Tensor, param: Any) -> Tensor:
    """What each shard of a parameter contributes to a sum, added up; ``value`` itself for a plain parameter."""
    if not is_sharded(param):
        return value
    return _sum_over_ranks(value, param, is_summed=[dim is not None for dim in _cut_dims(param)])


def _sum_over_ranks(value: Tensor, sharded: Any, *, is_summed: Sequence[bool]) -> Tensor:
    """Add up a value over those dimensions of a DTensor's mesh; over the others all ranks have the same."""
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415 - costs time that few need to spend

    placements = [Partial() if summed else Replicate() for summed in is_summed]
    return cast(Tensor, type(sharded).from_local(value, sharded.device_mesh, placements).full_tensor())


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
