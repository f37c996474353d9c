"""Whether the ranks of a process group have built the same optimizer. Asked once, at construction.

Ranks that differ would not fail by themselves: they drift apart, or one waits for a collective that the others never
call. Asked are only ranks that must agree (:func:`scopes_of`), about the parameters that they share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.model.names import named_parameters

__all__ = ["Scope", "check_agreement", "scope_of", "scopes_of"]

# What the parameters tell, or what does not change a step.
UNCOMPARED_KEYS = frozenset({"params", "param_names", "stac_role", "name", "layer_names", "layer_types"})
# Of ranks, and of what they say, in a message.
SHOWN = 4

Group = Mapping[str, Any]

Description = list[dict[str, str]]
"""What a rank's optimizer is, part by part: of what, what."""


class Scope(NamedTuple):
    """Ranks that must agree, and on what.

    Args:
        process_group: the ranks.
        params: the parameters that they share. Groups with none of them are left out.
        device: where the process group takes its tensors.
    """

    process_group: Any
    params: Collection[Tensor]
    device: torch.device


def scope_of(process_group: Any, params: Collection[Tensor], device: torch.device) -> Scope:
    """The scope of a process group, of all ranks for None, that takes tensors of this device."""
    process_group = dist.group.WORLD if process_group is None else process_group
    is_on_host = dist.get_backend(process_group) == "gloo"  # whose collectives on other devices are few
    return Scope(process_group, params, torch.device("cpu") if is_on_host else device)


def scopes_of(model: Any, groups: Iterable[Group], voters: Any = None) -> list[Scope]:
    """Who must agree: the ranks of each DDP in a model, those along each dimension of the meshes of DTensors, voters.

    Plain parameters tell nothing by themselves: those of pipeline stages and of ZeRO's partitions differ on purpose.
    So ``ddp_model.module`` and named parameters are not compared either.

    Args:
        model: what the optimizer was given; not necessarily a module.
        groups: its parameter groups.
        voters: the process group that votes on all parameters, or None.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    found: dict[Any, Scope] = {}
    # What ranks share out of plain parameters they must all have.
    shared = [group for group in groups if group.get("share_work")]
    sharing = _all_of(shared, dist.group.WORLD if shared else None)
    for process_group, params, device in (*_replicas(model), *_shards(groups), *_all_of(groups, voters), *sharing):
        known = found[process_group].params if process_group in found else ()
        found[process_group] = scope_of(process_group, [*known, *params], device)
    return [scope for group, scope in found.items() if dist.get_world_size(group) > 1]


def _replicas(model: Any) -> Iterator[tuple[Any, list[Tensor], torch.device]]:
    """The process group of each DDP, what it keeps alike, and on which device."""
    for ddp in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(ddp, DistributedDataParallel):
            named = list(ddp.module.named_parameters())
            kept = [param for name, param in named if name not in ddp.parameters_to_ignore]
            yield ddp.process_group, kept, named[0][1].device


def _shards(groups: Iterable[Group]) -> Iterator[tuple[Any, list[Tensor], torch.device]]:
    """The process group of each dimension of a mesh, what is on the mesh, and on which device."""
    on_mesh: dict[Any, list[Any]] = {}
    for _, param, _ in named_parameters(groups):
        if is_sharded(param):
            sharded: Any = param
            on_mesh.setdefault(sharded.device_mesh, []).append(param)
    for mesh in sorted(on_mesh, key=_mesh_order):
        if mesh.get_coordinate() is not None:  # this rank is in it
            params = on_mesh[mesh]
            # Offloaded weights lie on another device than the one that the mesh is for.
            is_there = params[0].device.type == mesh.device_type
            device = params[0].device if is_there else torch.device(mesh.device_type)
            yield from ((mesh.get_group(dim), params, device) for dim in range(mesh.ndim))


def _all_of(groups: Iterable[Group], process_group: Any) -> Iterator[tuple[Any, list[Tensor], torch.device]]:
    if process_group is not None:
        params = [param for group in groups for param in group["params"]]
        yield process_group, params, params[0].device if params else torch.device("cpu")


def _mesh_order(mesh: Any) -> tuple[int, tuple[str, ...], tuple[int, ...]]:
    """Meshes in one order on all ranks, whatever the order of parameters; a mesh before its slices."""
    return -mesh.ndim, mesh.mesh_dim_names or (), tuple(mesh.shape)


# Note [Agreement without a hang]
# A collective hangs when some ranks of its group do not call it, so no rank may leave early or ask less than another.
# Each goes through all its process groups in an order that is the same everywhere; whether descriptions follow the
# digests is known from the digests, which all of the group have; and errors are raised at the end. What a rank has
# found so far is part of what it tells next. So over the dimensions of a mesh, one after the other, every rank learns
# of a difference: where a line along the present dimension holds a rank that knows, the whole line learns it; where
# none knows, the ranks of each earlier slice are alike, so all lines differ where one does.
def check_agreement(groups: Sequence[Group], scopes: Iterable[Scope]) -> None:
    """Compare the optimizers of several ranks (Note [Agreement without a hang]). A collective of all these ranks.

    A rank that does not call it, because it died, raised before, or holds DTensors on other meshes, makes the others
    wait: for the time-out of the process group at most, after which torch raises.

    Args:
        groups: this rank's parameter groups.
        scopes: who must agree, and on which parameters, in one order on all ranks.

    Raises:
        ValueError: on every rank, naming the first difference.
    """
    problem = ""
    for scope in scopes:
        problem = _compare(_describe(groups, scope.params), problem, scope)
    if problem:
        raise ValueError(problem)


def _describe(groups: Sequence[Group], shared: Collection[Tensor]) -> Description:
    """Parameters in their order, then what groups say, all as text."""
    ids = {id(param) for param in shared}
    held = [(name, param, group) for name, param, group in named_parameters(groups) if id(param) in ids]
    parameters: dict[str, str] = {}
    for index, (name, param, group) in enumerate(held):
        parameters[f"parameter {index}"] = f"{name!r} ({_role(group)})"
        parameters.update({f"{what} of {name!r}": text for what, text in _tensor_texts(param)})
    counted = [(group, sum(id(param) in ids for param in group["params"])) for group in groups]
    sharing = [(group, count) for group, count in counted if count]
    rest = {"the number of groups": str(len(sharing))}
    for index, (group, count) in enumerate(sharing):
        where = f"of group {index} ({_role(group)})"
        rest[f"the number of parameters {where}"] = str(count)
        # What updates the group first, for all else follows from it.
        for name in sorted(group.keys() - UNCOMPARED_KEYS, key=lambda name: (name != "rule", name)):
            rest[f"{name} {where}"] = _text(group[name])
    return [parameters, rest]


def _role(group: Group) -> str:
    return str(group.get("stac_role", group["rule"]))


def _text(value: Any) -> str:
    """A value as text that is the same on every rank: that of objects would tell where in memory they are."""
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    is_plain = value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device)
    return repr(value) if is_plain else getattr(value, "__qualname__", type(value).__qualname__)


def _tensor_texts(param: Any) -> Iterator[tuple[str, str]]:
    yield "the shape", str(tuple(param.shape))
    yield "the dtype", str(param.dtype)
    if is_sharded(param):
        yield "the mesh's shape", str(tuple(param.device_mesh.shape))
        yield "the placement", repr(param.placements)
    else:
        yield "the strides", str(param.stride())  # votes follow one another as weights do in memory


def _compare(description: Description, problem: str, scope: Scope) -> str:
    """Tell and hear; what was found before, or else the first difference, or nothing."""
    told = json.dumps([problem, description]).encode()
    digest = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big", signed=True)
    heads = _gathered([digest, len(told)], torch.int64, scope)
    if all(head == heads[0] for head in heads):
        return problem
    longest = max(length for _, length in heads)
    texts = _gathered([*told, *bytes(longest - len(told))], torch.uint8, scope)
    heard = [json.loads(bytes(text[:length])) for text, (_, length) in zip(texts, heads, strict=True)]
    known = [problem for problem, _ in heard if problem]
    if known:
        return str(known[0])
    ranks = dist.get_process_group_ranks(scope.process_group)
    return _difference({rank: description for rank, (_, description) in zip(ranks, heard, strict=True)})


def _gathered(values: list[int], dtype: torch.dtype, scope: Scope) -> list[list[int]]:
    """The values of every rank of the process group; all have equally many."""
    mine = torch.tensor(values, dtype=dtype, device=scope.device)
    if type(mine) is not Tensor:
        return [values]  # a dry run under a mode whose tensors hold no data
    # Copies, not empty: the backend that fakes other ranks for a dry run leaves them as they are.
    gathered = [mine.clone() for _ in range(dist.get_world_size(scope.process_group))]
    dist.all_gather(gathered, mine, group=scope.process_group)
    return [tensor.tolist() for tensor in gathered]


def _difference(descriptions: Mapping[int, Description]) -> str:
    """The first difference between the descriptions of these ranks."""
    for parts in zip(*descriptions.values(), strict=True):
        for label in dict.fromkeys(label for part in parts for label in part):
            ranks_by_text: dict[str, list[int]] = {}
            for rank, part in zip(descriptions, parts, strict=True):
                ranks_by_text.setdefault(part.get(label, "absent"), []).append(rank)
            if len(ranks_by_text) > 1:
                shown = [f"{text} on {_named(ranks)}" for text, ranks in islice(ranks_by_text.items(), SHOWN)]
                return f"ranks disagree on the optimizer: {label} is {'; '.join(shown)}"
    raise AssertionError("descriptions with different digests are equal")


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN]))
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
