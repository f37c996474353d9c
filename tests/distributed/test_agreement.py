"""Ranks that build different optimizers are told what differs, every one of them; the others are asked once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from stac_optimizer import STAC, named
from stac_optimizer.distributed.agreement import check_agreement, scope_of
from stac_optimizer.optim import Lion
from tests.ranks import run_ranks
from tests.support import small_model

CPU = torch.device("cpu")


def _is_odd() -> bool:
    """Whether this rank is the one that differs: the last."""
    return dist.get_rank() == dist.get_world_size() - 1


def _sharded(model: nn.Module, **arguments: Any) -> nn.Module:
    fully_shard(model, **arguments)
    return model


def _placed(model: nn.Module, placement: Any) -> nn.Module:
    """The model with all it holds on each rank as the local part of a DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            local = DTensor.from_local(param.data, mesh, [placement], run_check=False)
            setattr(module, name, nn.Parameter(local))
    return model


def _frozen(model: nn.Module, name: str) -> nn.Module:
    model.get_parameter(name).requires_grad = False
    return model


def _message(build: Callable[[], STAC]) -> str:
    """What a rank is told when it builds an optimizer that others build otherwise."""
    try:
        build()
    except ValueError as error:
        return str(error)
    return "built"


# What the odd rank has instead, and what every rank is told of it; {0} are the other ranks, {1} is the odd one.
FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "last-n-layers": ({"last_n_layers": 2}, "parameter 2 is '1.weight' (trunk) on {0}; '1.weight' (cap) on {1}"),
    "no-cap": ({"last_n_layers": 0}, "parameter 4 is '3.weight' (cap) on {0}; '3.weight' (trunk) on {1}"),
    "momentum": ({"trunk_momentum": 0.5}, "momentum of group 0 (trunk) is 0.9 on {0}; 0.5 on {1}"),
    "cautious": ({"trunk_cautious": True}, "cautious of group 0 (trunk) is False on {0}; True on {1}"),
    "lr": ({"lr": 2e-3}, "lr of group 0 (trunk) is 0.00075 on {0}; 0.0015 on {1}"),
    "tensor-lr": ({"lr": torch.tensor(0.5)}, "lr of group 0 (trunk) is 0.00075 on {0}; 0.375 on {1}"),
    "cap-decay": ({"cap_weight_decay": 0.1}, "weight_decay of group 1 (cap) is 0.0 on {0}; 0.1 on {1}"),
    "amsgrad": ({"amsgrad": True}, "amsgrad of group 1 (cap) is False on {0}; True on {1}"),
    "seed": ({"rounding_seed": 7}, "rounding_seed of group 0 (trunk) is 0 on {0}; 7 on {1}"),
    "finite": ({"error_if_nonfinite": True}, "error_if_nonfinite of group 0 (trunk) is False on {0}; True on {1}"),
    "rule": ({"trunk_optimizer": Lion}, "rule of group 0 (trunk) is 'signum' on {0}; 'lion' on {1}"),
    "state": ({"trunk_state_dtype": "int8"}, "state_dtype of group 0 (trunk) is None on {0}; 'int8' on {1}"),
}


def _replicated(name: str) -> nn.Module:
    return DistributedDataParallel(nn.ModuleDict({name: nn.Linear(4, 4)}))


def _compiled(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "shape": (
        lambda: _sharded(nn.Linear(4, 4)),
        lambda: _sharded(nn.Linear(8, 4)),
        "the shape of 'weight' is (4, 4) on {0}; (4, 8) on {1}",
    ),
    "dtype": (
        lambda: _sharded(small_model()),
        lambda: _sharded(small_model(dtype=torch.bfloat16)),
        "the dtype of '0.weight' is torch.float32 on {0}; torch.bfloat16 on {1}",
    ),
    "placement": (
        lambda: _placed(nn.Linear(4 * dist.get_world_size(), 4, bias=False), Replicate()),
        lambda: _placed(nn.Linear(4, 4, bias=False), Shard(1)),
        "the placement of 'weight' is (Replicate(),) on {0}; (Shard(dim=1),) on {1}",
    ),
    "another-layer": (
        lambda: _sharded(small_model()),
        lambda: _sharded(small_model().append(nn.Linear(3, 3))),
        "parameter 4 is '3.weight' (cap) on {0}; '3.weight' (trunk) on {1}",
    ),
    "fewer-parameters": (
        lambda: _sharded(nn.Linear(4, 4)),
        lambda: _sharded(nn.Linear(4, 4, bias=False)),
        "parameter 1 is 'bias' (cap) on {0}; absent on {1}",
    ),
    "frozen": (
        lambda: _sharded(small_model()),
        lambda: _sharded(_frozen(small_model(), "0.weight")),
        "parameter 0 is '0.weight' (trunk) on {0}; '0.bias' (trunk) on {1}",
    ),
    "name": (
        lambda: _replicated("body"),
        lambda: _replicated("head"),
        "parameter 0 is 'body.weight' (cap) on {0}; 'head.weight' (cap) on {1}",
    ),
    "inside-wrappers": (
        lambda: _compiled(_replicated("body")),
        lambda: _compiled(_replicated("head")),
        "parameter 0 is 'body.weight' (cap) on {0}; 'head.weight' (cap) on {1}",
    ),
    "frozen-later": (
        lambda: DistributedDataParallel(small_model()),
        lambda: _frozen(DistributedDataParallel(small_model()), "module.3.bias"),
        "parameter 5 is '3.bias' (cap) on {0}; absent on {1}",
    ),
}


def _expected(message: str, world_size: int) -> list[str]:
    others = ", ".join(map(str, range(world_size - 1)))
    ranks = f"{'rank' if world_size == 2 else 'ranks'} {others}", f"rank {world_size - 1}"
    return ["ranks disagree on the optimizer: " + message.format(*ranks)] * world_size


def _with_flags(case: str) -> str:
    return _message(lambda: STAC(_sharded(small_model()), **(FLAGS[case][0] if _is_odd() else {})))


def _of_models(case: str) -> str:
    usual, odd, _ = MODELS[case]
    model = odd() if _is_odd() else usual()
    return _message(lambda: STAC(model, lr=0.5))


@pytest.mark.parametrize("case", FLAGS)
def test_rank_with_other_flags_is_told_on_every_rank(case: str) -> None:
    assert run_ranks(_with_flags, 2, case) == _expected(FLAGS[case][1], 2)


@pytest.mark.parametrize("case", MODELS)
def test_rank_with_another_model_is_told_on_every_rank(case: str) -> None:
    assert run_ranks(_of_models, 3, case) == _expected(MODELS[case][2], 3)


def _on_a_grid(odd: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    arguments: dict[str, Any] = {"amsgrad": True} if dist.get_rank() == odd else {}
    return _message(lambda: STAC(_sharded(small_model(), mesh=mesh), **arguments))


@pytest.mark.parametrize("odd", [0, 3])
def test_every_rank_of_a_mesh_learns_of_the_same_difference(odd: int) -> None:
    (message,) = set(run_ranks(_on_a_grid, 4, odd))
    assert message.startswith("ranks disagree on the optimizer: amsgrad of group 1 (cap) is ")
    assert f"True on rank {odd}" in message


def _of_other_groups() -> list[str]:
    """The first and the last of three ranks by a process group of their own, then all by the default one."""
    params = list(small_model().parameters())
    split = [params] if _is_odd() else [params[:2], params[2:]]
    groups = STAC([{"params": part, "stac_role": "trunk"} for part in split]).param_groups
    pair = dist.new_group([0, 2])
    found = []
    for process_group in [None] if dist.get_rank() == 1 else [pair, None]:
        try:
            check_agreement(groups, [scope_of(process_group, params, CPU)])
        except ValueError as error:
            found.append(str(error).partition(": ")[2])
    return found


def test_ranks_of_a_given_process_group_are_told_of_groups_that_differ_in_number() -> None:
    first, second, third = run_ranks(_of_other_groups, 3)
    assert first == third
    assert first[0] == "parameter 2 is '<group 1>.0' (trunk) on rank 0; '<group 0>.2' (trunk) on rank 2"
    assert (
        second == first[1:] == ["parameter 2 is '<group 1>.0' (trunk) on ranks 0, 1; '<group 0>.2' (trunk) on rank 2"]
    )


def _of_plain_models() -> list[str]:
    """What ranks build otherwise on purpose."""
    built = [_message(lambda: STAC(small_model(), last_n_layers=dist.get_rank()))]  # such as a pipeline's stages
    experts = nn.ModuleDict({"shared": nn.Linear(4, 4), f"expert{dist.get_rank()}": nn.Linear(2, 2)})
    fully_shard(experts["shared"])
    built.append(_message(lambda: STAC(experts, cap=named("shared"))))
    local = nn.ModuleDict({"shared": nn.Linear(4, 4), f"expert{dist.get_rank()}": nn.Linear(2, 2)})
    ignored = [name for name, _ in local.named_parameters() if name.startswith("expert")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(local, ignored)
    built.append(_message(lambda: STAC(DistributedDataParallel(local), last_n_layers=2)))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = DistributedDataParallel(small_model(), process_group=alone)
    built.append(_message(lambda: STAC(model, last_n_layers=dist.get_rank())))
    return built


def test_ranks_that_differ_on_purpose_are_let_alone() -> None:
    assert run_ranks(_of_plain_models, 2) == [["built"] * 4] * 2


def _collectives(make: Callable[[nn.Module], nn.Module]) -> dict[str, int]:
    model = make(small_model())
    with CommDebugMode() as construction:
        optimizer = STAC(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with CommDebugMode() as steps:
        for _ in range(3):
            optimizer.step()
    return {"construction": construction.get_total_counts(), "steps": steps.get_total_counts()}


@pytest.mark.parametrize("make", [DistributedDataParallel, _sharded])
def test_ranks_that_agree_are_asked_once(make: Callable[[nn.Module], nn.Module]) -> None:
    assert run_ranks(_collectives, 2, make) == [{"construction": 1, "steps": 0}] * 2


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
def test_dry_run_of_ranks_that_do_not_exist_builds(mode: Callable[[], AbstractContextManager[None]]) -> None:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (8,))
        with mode():
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
            assert STAC(_sharded(model, mesh=mesh)).partition.cap_layer_names == ("1",)
    finally:
        dist.destroy_process_group()
