"""``ZeroRedundancyOptimizer``: each rank's STAC gets copies of the groups with some of the parameters, or none."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

from stac_optimizer import STAC, last_layers, norms, partition_trainable_layers
from tests.ranks import run_ranks
from tests.support import assert_same_bits, set_gradients, through_file, wide_model

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum-0": {"trunk_momentum": 0.0},
    "cautious-amsgrad-decay": {"trunk_cautious": True, "amsgrad": True, "weight_decay": 0.1},
    "int8-state": {"trunk_state_dtype": "int8"},
    "bfloat16-state": {"trunk_state_dtype": "bfloat16"},
    "foreach": {"foreach": True},
    "bucket-views": {"parameters_as_bucket_view": True},
}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the page on frameworks says: unnamed parameters, and a learning rate for each role."""
    partition = partition_trainable_layers(model)
    return [
        {"params": list(partition.trunk_parameters), "stac_role": "trunk", "lr": 0.75e-2},
        {"params": list(partition.cap_parameters), "stac_role": "cap", "lr": 1e-2},
    ]


def _runs(model: nn.Module, arguments: dict[str, Any]) -> tuple[tuple[nn.Module, Any], tuple[nn.Module, STAC]]:
    """A model whose optimizer is sharded, and its twin whose optimizer is not."""
    whole = copy.deepcopy(model)
    kept = {key: value for key, value in arguments.items() if key != "parameters_as_bucket_view"}
    optimizer = ZeroRedundancyOptimizer(_groups(model), STAC, lr=1e-2, **arguments)
    return (model, optimizer), (whole, STAC(whole, lr=1e-2, **kept))


def _step(run: tuple[nn.Module, Any], seeds: range) -> None:
    model, optimizer = run
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def _consolidated(optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    """The state dict of all ranks, which rank 0 has alone, on all of them."""
    optimizer.consolidate_state_dict(to=0)
    held = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held)
    saved: dict[str, Any] = through_file(held[0])
    return saved


def _train_and_resume() -> None:
    for case, arguments in ARGUMENTS.items():
        run, twin = _runs(wide_model(), arguments)
        schedulers = [
            OneCycleLR(optimizer, max_lr=[0.75e-2, 1e-2], total_steps=9, cycle_momentum=False)
            for _, optimizer in (run, twin)
        ]
        for seed in range(4):
            for each, scheduler in zip((run, twin), schedulers, strict=True):
                _step(each, range(seed, seed + 1))
                scheduler.step()
        assert_same_bits(run[0].state_dict(), twin[0].state_dict(), case)
        assert 0 < len(run[1].optim.state) < len(twin[1].state)
        saved = _consolidated(run[1])
        assert_same_bits(saved["state"], twin[1].state_dict()["state"], case)
        fresh = _runs(run[0], arguments)[0]
        fresh[1].load_state_dict(copy.deepcopy(saved))
        whole = STAC(_groups(twin[0]), lr=0.5)
        whole.load_state_dict(saved)
        for each in (fresh, (twin[0], whole)):
            _step(each, range(4, 7))
        assert_same_bits(fresh[0].state_dict(), twin[0].state_dict(), case)


@pytest.mark.parametrize("world_size", [2, 4])
def test_optimizer_sharded_over_ranks_equals_the_whole_one(world_size: int) -> None:
    run_ranks(_train_and_resume, world_size)


def _train_with_idle_ranks() -> None:
    torch.manual_seed(0)
    run, twin = _runs(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)), {"fused": False})
    assert [len(group["params"]) for group in run[1].optim.param_groups] == [
        [1, 0],
        [0, 1],
        [0, 0],
    ][dist.get_rank()]
    for each in (run, twin):
        _step(each, range(3))
    assert_same_bits(run[0].state_dict(), twin[0].state_dict())
    assert_same_bits(_consolidated(run[1])["state"], twin[1].state_dict()["state"])


def test_rank_without_parameters_steps_harmlessly() -> None:
    run_ranks(_train_with_idle_ranks, 3)


def _train_under_ddp() -> None:
    model = wide_model()
    run, twin = _runs(model, {})
    ddp = DistributedDataParallel(nn.Sequential(model[2], model[3]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        batch = torch.randn(2, 3, 5, generator=generator)
        ddp(batch[dist.get_rank()]).square().mean().backward()
        for param, whole in zip(model.parameters(), twin[0].parameters(), strict=True):
            whole.grad = param.grad
        for _, optimizer in (run, twin):
            optimizer.step()
        run[1].zero_grad()
    assert_same_bits(model.state_dict(), twin[0].state_dict())


def test_optimizer_sharded_beside_ddp_equals_the_whole_one() -> None:
    run_ranks(_train_under_ddp, 2)


def _refuse_what_is_for_models() -> None:
    model = wide_model()
    arguments: dict[str, Any]
    for name in ("trunk_lr", "cap_weight_decay"):
        arguments = {name: 0.1}
        with pytest.raises(ValueError, match=f"^group 0: unknown key '{name}'"):
            ZeroRedundancyOptimizer(_groups(model), STAC, lr=1e-2, **arguments)


def test_arguments_of_one_role_are_refused() -> None:
    run_ranks(_refuse_what_is_for_models, 1)


def _run_page(code: str) -> None:
    model = wide_model()
    namespace: dict[str, Any] = {"model": model}
    exec(compile(code, "frameworks.md", "exec"), namespace)
    twin = STAC(copy.deepcopy(model), lr=1e-3, cap=last_layers(1) | norms(), weight_decay=1e-2)
    pairs = [
        (param, own)
        for group, dealt in zip(twin.param_groups, namespace["groups"], strict=True)
        for param, own in zip(group["params"], dealt["params"], strict=True)
    ]
    for param, own in pairs:
        param.grad = own.grad = torch.ones_like(own)
    for optimizer in (twin, namespace["optimizer"]):
        optimizer.step()
    for param, own in pairs:
        assert_same_bits(own.detach(), param.detach())


def test_documented_recipe_equals_the_whole_optimizer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
    codes = re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (code,) = [code for code in codes if "ZeroRedundancyOptimizer" in code]
    run_ranks(_run_page, 2, code)
