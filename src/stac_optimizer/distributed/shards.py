"""Parameters cut over ranks, DTensors: the local parts of whole ones, and sums over them. Knows no rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import PLAIN_TYPES
from stac_optimizer.tensors.layouts import is_dense, real_views
from stac_optimizer.tensors.torch_private import local_shape_and_offsets

__all__ = [
    "conjugated",
    "is_cut",
    "is_sharded",
    "is_sharded_by_row",
    "is_sharded_in_runs",
    "local_views",
    "real_parts",
    "roots_of_sums_over_shards",
    "row_sums_over_shards",
    "run_offset",
    "sum_over_ranks",
    "sum_over_shards",
    "sums_over_rows",
    "sums_over_shards",
    "waited",
    "which_are_cut",
    "zeros_by_row",
]


def real_parts(tensors: list[Tensor], likes: list[Tensor] | None = None) -> list[Tensor]:
    """What this rank holds of tensors, as :func:`local_views` gives it, in real numbers."""
    parts = local_views(tensors, likes)
    if not any(map(Tensor.is_complex, parts)):
        return parts
    return real_views(parts if likes is None else conjugated(parts))


def conjugated(grads: list[Tensor]) -> list[Tensor]:
    """Gradients that torch has put off to conjugate, conjugated: of such there are no views as real numbers."""
    return [grad.resolve_conj() for grad in grads] if any(map(Tensor.is_complex, grads)) else grads


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
    return waited(tensor)


def waited(tensor: Any) -> Tensor:
    """The tensor once a collective has filled it: kernels that walk memory would not wait."""
    return cast(Tensor, tensor.wait() if hasattr(tensor, "wait") else tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def zeros_by_row(param: Tensor, rows: int, columns: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of zeros with a row for each row of a parameter, and sharded as that is.

    One without columns is not: there is nothing to shard, and torch 2.6 cannot gather it.
    """
    if not is_sharded(param) or not columns:
        return torch.zeros((rows, columns), dtype=dtype, device=param.device)
    sharded: Any = param
    local_rows = sharded.to_local().shape[:1].numel()  # 1 for a scalar
    local = torch.zeros((local_rows, columns), dtype=dtype, device=param.device)
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


def is_cut(param: Any) -> bool:
    """Whether ranks hold different parts of the parameter; replicas of a DTensor are whole."""
    return any(dim is not None for dim in _cut_dims(param))


def which_are_cut(params: Sequence[Any]) -> list[int]:
    """The places of those parameters of which ranks hold different parts."""
    if not torch.compiler.is_compiling() and PLAIN_TYPES.issuperset(map(type, params)):
        return []
    return [index for index, param in enumerate(params) if is_cut(param)]


def is_sharded_in_runs(param: Tensor) -> bool:
    """Whether what each rank holds of the parameter is one run of the whole's memory."""
    if not is_cut(param):
        return True
    are_rows_outermost = not is_dense(param) or param.shape[0] < 2 or param.stride(0) == max(param.stride())
    return is_sharded_by_row(param) and are_rows_outermost


def run_offset(param: Any) -> int:
    """The index, within the whole's memory, of the first element that this rank holds of a parameter.

    Args:
        param: sharded in runs, or not at all.
    """
    if not is_cut(param) or not param.numel():
        return 0
    row = local_shape_and_offsets(param)[1][0]
    return int(row) * (int(param.numel()) // int(param.shape[0]))


def sum_over_shards(value: Tensor, param: Any) -> Tensor:
    """What each shard of a parameter contributes to a sum, added up; ``value`` itself for a plain parameter."""
    if not is_sharded(param):
        return value
    return sum_over_ranks(value, param, is_summed=[dim is not None for dim in _cut_dims(param)])


def roots_of_sums_over_shards(norms: Sequence[Tensor], params: Sequence[Any]) -> list[Tensor]:
    """The norms of whole parameters, given those of this rank's shards; one collective for all that are cut alike."""
    cut = which_are_cut(params)
    sums = sums_over_shards([norms[index].square() for index in cut], [params[index] for index in cut])
    wholes = list(norms)
    for index, squares in zip(cut, sums, strict=True):
        wholes[index] = squares.sqrt()
    return wholes


def sums_over_shards(values: Sequence[Tensor], params: Sequence[Any]) -> list[Tensor]:
    """:func:`sum_over_shards` for each of several parameters, values of one shape; one collective for all cut alike."""
    return _summed_together(values, params, [[dim is not None for dim in _cut_dims(param)] for param in params])


def row_sums_over_shards(rows: Tensor, param: Any) -> Tensor:
    """Sums over this rank's part of each row, made those of whole rows, where ranks hold parts of rows."""
    is_summed = [dim not in (0, None) for dim in _cut_dims(param)]
    return sum_over_ranks(rows, param, is_summed=is_summed) if any(is_summed) else rows


def sums_over_rows(values: Sequence[Tensor], params: Sequence[Any]) -> list[Tensor]:
    """What the rows on this rank contribute to sums over all rows, added up; one collective for all cut alike.

    Args:
        values: for each parameter, all of one shape.
        params: the parameters.
    """
    return _summed_together(values, params, [[dim == 0 for dim in _cut_dims(param)] for param in params])


def _summed_together(
    values: Sequence[Tensor], params: Sequence[Any], are_summed: Sequence[Sequence[bool]]
) -> list[Tensor]:
    """Values of one shape added up, each over these dimensions of its parameter's mesh."""
    wholes = list(values)
    alike: dict[Any, list[int]] = {}
    for index, (param, is_summed) in enumerate(zip(params, are_summed, strict=True)):
        if any(is_summed):
            alike.setdefault((param.device_mesh, tuple(is_summed)), []).append(index)
    for (_, is_summed), indices in alike.items():
        sums = sum_over_ranks(
            torch.stack([values[index] for index in indices]), params[indices[0]], is_summed=is_summed
        )
        for index, whole in zip(indices, sums.unbind(), strict=True):
            wholes[index] = whole
    return wholes


def sum_over_ranks(value: Tensor, sharded: Any, *, is_summed: Sequence[bool]) -> Tensor:
    """Add up a value over those dimensions of a DTensor's mesh; over the others all ranks have the same."""
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415 - costs time that few need to spend

    placements = [Partial() if summed else Replicate() for summed in is_summed]
    return cast(Tensor, type(sharded).from_local(value, sharded.device_mesh, placements).full_tensor())
