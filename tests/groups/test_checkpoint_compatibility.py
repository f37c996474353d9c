"""Checkpoints beside the rest: hooks of the user, schedulers, wrapped models, files of stac-optimizer 0.1.2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import SWALR

from stac_optimizer import STAC
from tests.runs import assert_equal_runs, built, process_group, stepped
from tests.support import assert_same_bits, take_steps, through_file

LEGACY = sorted((Path(__file__).parents[1] / "data").glob("stac-0.1.2-*.pt"))


def test_hooks_of_the_user_run_in_order_and_see_the_whole() -> None:
    _, source = stepped()
    _, target = stepped(0)
    seen: list[Any] = []

    def rename(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        seen.append(("first pre", len(saved["state"]), saved["param_groups"][0]["layer_names"], len(target.state)))
        groups = [{**group, "layer_names": target.param_groups[i]["layer_names"]} for i, group in enumerate(changed)]
        return {**saved, "param_groups": groups}

    target.register_load_state_dict_post_hook(lambda _: seen.append(("second post", len(target.state))))
    target.register_load_state_dict_post_hook(lambda _: seen.append(("post", len(target.state))), prepend=True)
    target.register_load_state_dict_pre_hook(rename)
    target.register_load_state_dict_pre_hook(
        lambda _, saved: seen.append(("second pre", saved["param_groups"][0]["layer_names"]))
    )
    source.register_state_dict_pre_hook(lambda _: seen.append("state_dict pre"))
    source.register_state_dict_post_hook(lambda _, saved: seen.append("state_dict post"))
    saved = source.state_dict()
    changed = [{**group, "layer_names": ("old",)} for group in saved["param_groups"]]
    target.load_state_dict({**saved, "param_groups": changed})
    assert seen == [
        "state_dict pre",
        "state_dict post",
        ("first pre", 6, ("old",), 0),
        ("second pre", ("0", "1")),
        ("post", 6),
        ("second post", 6),
    ]
    assert_same_bits(target.state_dict(), {key: saved[key] for key in ("state", "param_groups")})


def test_loading_again_sees_nothing_of_earlier_loads() -> None:
    saved, unstepped = (stepped(steps)[1].state_dict() for steps in (3, 0))
    _, optimizer = stepped(0)
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, saved: {**saved, "param_groups": []})
    with pytest.raises(ValueError, match="has 0 parameter groups"):
        optimizer.load_state_dict(saved)
    handle.remove()
    for each in (saved, saved, unstepped):
        optimizer.load_state_dict(each)
        assert_same_bits(optimizer.state_dict(), each)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_resumed_scheduler_continues_bit_identically(attached: str) -> None:
    def scheduled(optimizer: STAC, last_epoch: int = -1) -> LambdaLR:
        return LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch), last_epoch)

    def run(model: nn.Module, optimizer: STAC, scheduler: LambdaLR) -> None:
        for seed in range(3):
            take_steps(model, optimizer, [seed])
            scheduler.step()

    model, optimizer = stepped(0)
    scheduler = scheduled(optimizer)
    run(model, optimizer, scheduler)
    weights, saved, schedule = through_file((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    resumed_model, resumed = stepped(0, seed=1)
    resumed_model.load_state_dict(weights)
    if attached == "before":
        resumed_scheduler = scheduled(resumed)
        resumed.load_state_dict(saved)
        resumed_scheduler.load_state_dict(schedule)
    else:
        resumed.load_state_dict(saved)
        resumed_scheduler = scheduled(resumed, last_epoch=scheduler.last_epoch - 1)
    run(model, optimizer, scheduler)
    run(resumed_model, resumed, resumed_scheduler)
    assert_equal_runs((model, optimizer), (resumed_model, resumed))


def test_group_keys_of_schedulers_survive() -> None:
    model, optimizer = stepped(0)
    OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=10)
    SWALR(optimizer, swa_lr=0.05)
    take_steps(model, optimizer, range(2))
    added = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
    _, fresh = stepped(0)
    assert set(optimizer.param_groups[0]) - set(fresh.param_groups[0]) == added
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_bits(fresh.state_dict(), optimizer.state_dict())


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def _checkpointed(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in model.children()))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("to_wrapped", [True, False], ids=["bare-to-wrapped", "wrapped-to-bare"])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.parallel.DistributedDataParallel, id="ddp"),
        pytest.param(nn.DataParallel, id="data-parallel"),
        pytest.param(torch.compile, id="compile"),
        pytest.param(_checkpointed, id="activation-checkpointing"),
        pytest.param(lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)), id="compile-ddp"),
    ],
)
def test_checkpoints_of_wrapped_and_bare_models_are_interchangeable(
    wrap: Callable[[nn.Module], nn.Module], to_wrapped: bool
) -> None:
    def wrapped(model: nn.Module, *, really: bool) -> STAC:
        return STAC(wrap(model) if really else model, lr=1e-2)

    model, source = built(lambda model: wrapped(model, really=not to_wrapped))
    take_steps(model, source, range(2))
    other_model, target = built(lambda model: wrapped(model, really=to_wrapped), seed=1)
    other_model.load_state_dict(model.state_dict())
    target.load_state_dict(through_file(source.state_dict()))
    assert_equal_runs((model, source), (other_model, target))


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}], ids=["single", "foreach"])
@pytest.mark.parametrize("file", LEGACY, ids=lambda file: file.stem)
def test_checkpoint_of_0_1_2_continues_as_recorded(file: Path, path: dict[str, Any]) -> None:
    recorded = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.load_state_dict(recorded["model_before"])
    optimizer = STAC(model, **recorded["arguments"], **path)
    keys = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(recorded["optimizer"])
    for gradients in recorded["next_gradients"]:
        for name, param in model.named_parameters():
            param.grad = gradients[name]
        optimizer.step()

    for name, param in model.named_parameters():
        expected = recorded["model_after"][name]
        if name.rpartition(".")[0] in optimizer.partition.trunk_layer_names:
            assert_same_bits(param, expected, name)
        else:
            torch.testing.assert_close(param.data, expected, rtol=0, atol=1e-6)
    saved = through_file(optimizer.state_dict())
    assert [set(group) for group in saved["param_groups"]] == keys
    average = {"step", "exp_avg"}
    cap = average | {"exp_avg_sq"} | ({"max_exp_avg_sq"} if recorded["arguments"].get("amsgrad") else set())
    roles = {number: group["stac_role"] for group in saved["param_groups"] for number in group["params"]}
    assert {n: set(state) for n, state in saved["state"].items()} == {
        n: average if role == "trunk" else cap for n, role in roles.items()
    }
    assert [state["step"].item() for state in saved["state"].values()] == [8.0] * 8
    twin_model = copy.deepcopy(model)
    twin = STAC(twin_model, **recorded["arguments"], **path)
    twin.load_state_dict(saved)
    assert_equal_runs((model, optimizer), (twin_model, twin))


def test_both_checkpoints_of_0_1_2_are_there() -> None:
    assert len(LEGACY) == 2
