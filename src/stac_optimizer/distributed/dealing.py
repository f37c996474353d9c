"""What is computed of whole tensors, dealt out over the ranks that hold them or parts of them. Knows no rule.

Note [Dealing]. What needs whole matrices would be computed by every rank alike. Instead each tensor has one owner among
the ranks: all gather it, one after the other so that memory is bounded, the owner keeps it and computes, and the result
goes back as a sum over ranks of which all others contribute zeros. So torch alone says how placements cut, whatever the
mesh, and a result is the same bits as on one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from stac_optimizer.distributed.shards import is_cut, is_sharded, waited

__all__ = ["DtypeOf", "WholeFunction", "dealt_out", "ranks_to_deal_to"]

WholeFunction: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
"""From whole tensors to as many of the same shapes."""

DtypeOf: TypeAlias = Callable[[Tensor, Sequence[int]], torch.dtype]
"""From a part, and the shape of the whole, to the dtype of what such a function makes of that."""


def ranks_to_deal_to(params: Sequence[Tensor], *, shares: bool) -> int:
    """How many ranks compute beside each other: those of the largest mesh, or all where they share out the work."""
    meshes: list[Any] = [param for param in params if is_cut(param)]
    sizes: list[int] = [sharded.device_mesh.size() for sharded in meshes]
    return max([1, *sizes, _world_size() if shares else 1])


def dealt_out(
    function: WholeFunction,
    parts: Sequence[Tensor],
    params: Sequence[Tensor],
    dtype_of: DtypeOf,
    *,
    shares: bool,
) -> list[Tensor]:
    """This rank's parts of what a function makes of whole tensors; a collective (Note [Dealing]).

    Args:
        function: what to compute.
        parts: this rank's parts of the tensors.
        params: for each the parameter that it is placed as.
        dtype_of: tells the dtype of the results, in which they travel.
        shares: whether ranks of the default process group, which all hold the same plain tensors, share out the work.
    """
    # However they lie: products of other strides are rounded otherwise.
    parts = [part.contiguous() for part in parts]
    kinds: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        kinds.setdefault(getattr(param, "device_mesh", None) if is_cut(param) else None, []).append(index)
    results: dict[int, Tensor] = {}
    for mesh, indices in kinds.items():
        some, likes = [parts[index] for index in indices], [params[index] for index in indices]
        if mesh is not None:
            made = _over_mesh(function, some, likes, dtype_of)
        elif shares and _world_size() > 1 and not any(map(is_sharded, likes)):
            made = _over_world(function, some, dtype_of)
        else:
            made = function(some)
        results.update(zip(indices, made, strict=True))
    return [results[index] for index in range(len(params))]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _owners(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """For each tensor the rank that computes it: the largest first, each to who has least to do."""
    loads, owners = [0] * ranks, [0] * len(shapes)
    numels = [math.prod(shape) for shape in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -numels[index]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += numels[index]
    return owners


def _over_world(function: WholeFunction, tensors: list[Tensor], dtype_of: DtypeOf) -> list[Tensor]:
    """All ranks have the same tensors; owners send what they have computed."""
    owners, rank = _owners([tensor.shape for tensor in tensors], _world_size()), dist.get_rank()
    mine = [index for index, owner in enumerate(owners) if owner == rank]
    made = dict(zip(mine, function([tensors[index] for index in mine]), strict=True))
    results = [
        made[index].contiguous()
        if index in made
        else torch.empty(tensor.shape, dtype=dtype_of(tensor, tensor.shape), device=tensor.device)
        for index, tensor in enumerate(tensors)
    ]
    sent = [dist.broadcast(result, owner, async_op=True) for result, owner in zip(results, owners, strict=True)]
    for work in sent:
        if work is not None:
            work.wait()
    return results


def _over_mesh(function: WholeFunction, parts: list[Tensor], params: Sequence[Any], dtype_of: DtypeOf) -> list[Tensor]:
    """Each rank of a mesh has a part."""
    mesh = params[0].device_mesh
    owners, rank = _owners([param.shape for param in params], mesh.size()), _place_in(mesh)
    wholes = {index: whole for index, whole in enumerate(_gathered(parts, params)) if owners[index] == rank}
    made = dict(zip(wholes, function(list(wholes.values())), strict=True))
    results = []
    for index, (part, param) in enumerate(zip(parts, params, strict=True)):
        zeros = None if index in made else part.new_zeros(param.shape, dtype=dtype_of(part, param.shape))
        results.append(_cut(made[index] if zeros is None else zeros, param))
    return results


def _gathered(parts: list[Tensor], params: Sequence[Any]) -> Iterator[Tensor]:
    """The whole tensors, of which the next is on its way while one is looked at."""
    pending = None
    for part, param in zip(parts, params, strict=True):
        begun = _whole(part, param)
        if pending is not None:
            yield waited(pending)
        pending = begun
    if pending is not None:
        yield waited(pending)


def _whole(part: Tensor, param: Any) -> Any:
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 - costs time that few need to spend

    stride = torch.empty(param.shape, device="meta").stride()
    sharded = type(param.data).from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )
    return sharded.redistribute(placements=[Replicate()] * param.device_mesh.ndim, async_op=True).to_local()


def _cut(whole: Tensor, param: Any) -> Tensor:
    """This rank's part of the sum over ranks."""
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415 - as above

    mesh = param.device_mesh
    summands = type(param.data).from_local(whole.contiguous(), mesh, [Partial()] * mesh.ndim, run_check=False)
    if any(hasattr(placement, "split_factor") for placement in param.placements):
        # Rows that are cut twice, by FSDP2 over tensor parallelism: torch 2.6 gives ranks each other's parts of sums.
        summands = summands.redistribute(placements=[Replicate()] * mesh.ndim)
    return waited(summands.redistribute(placements=param.placements).to_local())


def _place_in(mesh: Any) -> int:
    """This rank's place among all of a mesh."""
    place = 0
    for size, coordinate in zip(mesh.shape, mesh.get_coordinate(), strict=True):
        place = place * size + coordinate
    return place
