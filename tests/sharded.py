"""Training a model whole and sharded, to compare them: gradients that are the same however it is sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from stac_optimizer import STAC
from tests.ranks import run_ranks
from tests.support import assert_same_bits, wide_model

__all__ = [
    "Gradients",
    "Sharding",
    "assert_shards_step_as_whole",
    "distributed",
    "full",
    "shard_each",
    "shard_in_part",
    "trained",
]

STEPS = 50

Sharding = Callable[[nn.Module], object]


class Gradients:
    """Random gradients for a model, the same whether and however it is sharded."""

    def __init__(self, model: nn.Module) -> None:
        self.places = {name: _places(param) for name, param in model.named_parameters()}
        self.model = model

    def set(self, seed: int) -> None:
        """Give every parameter that of this seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.model.named_parameters():
            whole = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = sharded_as(param, whole.flatten()[self.places[name]])


def distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that all ranks have, cut: without a message, on every torch without a warning."""
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(mesh, placements)


def shard_in_part(model: nn.Module) -> None:
    """Plain parameters beside sharded ones, in both groups."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plain = {model.get_parameter(name) for name in ("0.bias", "1.weight", "3.weight")}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param not in plain:
                module.register_parameter(name, nn.Parameter(distributed(param.detach(), mesh, [Shard(0)])))


def _places(param: Tensor) -> Tensor:
    """The index of each element that this rank has in the whole parameter."""
    places: Tensor = torch.arange(param.numel()).view(param.shape)
    if isinstance(param, DTensor):
        places = distributed(places, param.device_mesh, param.placements).to_local()
    return places


def sharded_as(param: Tensor, local: Tensor) -> Tensor:
    """A DTensor of these local elements where the parameter is one."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, others as they are."""
    if not isinstance(value, DTensor):
        return value
    # Older torch cannot gather what has no elements.
    return value.full_tensor() if value.numel() else torch.empty(value.shape, dtype=value.dtype)


def trained(shard: Sharding, arguments: dict[str, Any]) -> dict[str, Any]:
    """Weights and state by name, whole, of a model that was sharded and then stepped."""
    arguments = copy.deepcopy(arguments)
    model = arguments.pop("make", wide_model)(0, arguments.pop("dtype", torch.float32))
    shard(model)
    steps = arguments.pop("steps", STEPS)
    gradients, optimizer = Gradients(model), STAC(model, **{"lr": 1e-2, **arguments})
    for seed in range(steps):
        gradients.set(seed)
        optimizer.step()
    held = {name: (param.detach(), optimizer.state[param]) for name, param in model.named_parameters()}
    for name, (param, state) in held.items():
        for key, value in state.items():
            is_cut = isinstance(param, DTensor) and key != "step"
            assert isinstance(value, DTensor) == is_cut, (name, key)
    return {
        name: (full(param), {key: full(value) for key, value in state.items()}) for name, (param, state) in held.items()
    }


def _assert_trained_as(shard: Sharding, cases: dict[str, dict[str, Any]], folder: Path) -> None:
    """On one rank: each model ends as the whole one, whose weights and state a file holds."""
    differing = []
    for name, arguments in cases.items():
        ended = trained(shard, arguments)
        try:
            assert_same_bits(ended, torch.load(folder / f"{name}.pt"), name)
        except AssertionError as error:
            differing.append(str(error))
    assert not differing, "\n".join(differing)


def shard_each(model: nn.Module) -> None:
    """As a user would: every layer by itself, then the root."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for child in model.children():
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


def assert_shards_step_as_whole(
    shard: Sharding, world_size: int, cases: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Train models whole, and on every rank ones that were sharded: weights and state end the same.

    Args:
        shard: is called with each model on each rank; a function of a module's top level.
        world_size: how many ranks; they are started once, for all cases.
        cases: by name the arguments of STAC; besides them the model's ``dtype``, ``make`` to make it, and ``steps``.
        folder: for the files of the whole ones.
    """
    for name, arguments in cases.items():
        torch.save(trained(nn.Identity(), arguments), folder / f"{name}.pt")
    run_ranks(_assert_trained_as, world_size, shard, cases, folder, timeout=60.0 + 10.0 * len(cases))
