"""Parameters cut over ranks, DTensors: their local parts, and what all ranks must find alike. Knows no rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stac_optimizer import _tensors

__all__ = [
    "are_zero",
    "first_nonfinite",
    "is_sharded",
    "is_sharded_by_row",
    "is_sharded_in_runs",
    "local_views",
    "places_at_end",
    "real_parts",
    "run_offset",
    "sum_over_shards",
    "zeros_by_row",
]


def first_nonfinite(grads: Sequence[Tensor | None], params: Sequence[Tensor], *, here: bool) -> int | None:
    """The position of the first gradient with NaN or infinity; None where there is none.

    Args:
        grads: gradients, None where absent.
        params: for each the parameter whose placement it is brought to: what is partial here may be infinite as a sum.
        here: whether to look at this rank's parts alone.
    """
    present = [(grad, param) for grad, param in zip(grads, params, strict=True) if grad is not None]
    local = real_parts([grad for grad, _ in present], [param for _, param in present])
    is_bad = not _are_finite(local)
    if not (is_bad if here else _on_any_rank([is_bad], params)[0]):
        return None
    parts = iter(local)
    flags = [grad is not None and not _are_finite([next(parts)]) for grad in grads]
    return (flags if here else list(_on_any_rank(flags, params))).index(True)


def real_parts(tensors: list[Tensor], likes: list[Tensor] | None = None) -> list[Tensor]:
    """What this rank holds of tensors, as :func:`local_views` gives it, in real numbers."""
    return _tensors.real_views(local_views(tensors, likes))


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    suspects = [tensor for tensor in tensors if tensor.numel() and not (tensor.is_cpu and _has_finite_sum(tensor))]
    # The largest magnitude tells, and unlike a sum it cannot overflow.
    return not suspects or bool(torch.nn.utils.get_total_norm(suspects, norm_type=math.inf).isfinite())


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether all elements are finite for certain. On the CPU a sum takes a tenth of the time of a maximum."""
    return math.isfinite(tensor.sum(dtype=_tensors.arithmetic_dtype(tensor.dtype)).item())


def are_zero(tensors: Sequence[Tensor], *, here: bool) -> bool:
    """Whether all tensors hold nothing but zeros, in every shard of them, or in this rank's."""
    flags: Sequence[bool] = [any(bool(tensor.any()) for tensor in local_views(list(tensors)))]
    return not (flags if here else _on_any_rank(flags, tensors))[0]


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
    return all(dim in (0, None) for dim in _cut_dims(param))


def _cut_dims(param: Any) -> list[int | None]:
    """For each dimension of a parameter's mesh the dimension of the parameter that it cuts, or None.

    Strided shards, though they cut, say that they are no shards.
    """
    return [getattr(placement, "dim", None) for placement in param.placements] if is_sharded(param) else []


def _is_cut(param: Any) -> bool:
    """Whether ranks hold different parts of the parameter; replicas of a DTensor are whole."""
    return any(dim is not None for dim in _cut_dims(param))


def is_sharded_in_runs(param: Tensor) -> bool:
    """Whether what each rank holds of the parameter is one run of the whole's memory."""
    if not _is_cut(param):
        return True
    are_rows_outermost = not _tensors.is_dense(param) or param.shape[0] < 2 or param.stride(0) == max(param.stride())
    return is_sharded_by_row(param) and are_rows_outermost


def places_at_end(param: Any, numel: int) -> list[int]:
    """Of the last elements of a whole parameter, those left over by runs of ``numel``, the places that this rank holds.

    Args:
        param: a contiguous DTensor. What is held of its end is the end of what is held of it, in the same order.
        numel: of a run.
    """
    start = param.numel() - param.numel() % numel
    shape, offsets = _tensors.local_shape_and_offsets(param)
    held = torch.arange(start, param.numel(), device="cpu")
    for size, length, offset, stride in zip(param.shape, shape, offsets, param.stride(), strict=True):
        along = held.div(stride, rounding_mode="floor") % size - offset
        held = held[(along >= 0) & (along < length)]
    places: list[int] = (held - start).tolist()
    return places


def run_offset(param: Any) -> int:
    """The index, within the whole's memory, of the first element that this rank holds of a parameter.

    Args:
        param: sharded in runs, or not at all.
    """
    if not _is_cut(param) or not param.numel():
        return 0
    row = _tensors.local_shape_and_offsets(param)[1][0]
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
