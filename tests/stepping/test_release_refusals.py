"""What gradient release refuses, at its beginning, in backward and from step, with a message that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC
from tests.runs import Run, assert_equal_runs, process_group, stepped, train, twins
from tests.support import assert_same_bits, parameter_state, seeded_loss, snapshot

each_path = pytest.mark.parametrize("arguments", [{}, {"fused": True}], ids=["default", "fused"])


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def _without_a_layer(model: nn.Module, optimizer: STAC) -> Any:
    return nn.Sequential(*list(model.children())[1:])


def _with_a_gradient(model: nn.Module, optimizer: STAC) -> Any:
    weight = model.get_parameter("1.weight")
    weight.grad = torch.zeros_like(weight)
    return model


def _released(model: nn.Module, optimizer: STAC) -> Any:
    optimizer.release_gradients(model)
    return model


AT_RELEASE = [
    pytest.param({}, lambda model, _: [model], TypeError, ["model must be the module", "list"], id="no-module"),
    pytest.param({}, _without_a_layer, ValueError, ["'0.weight'", "pass the module"], id="another-module"),
    pytest.param({}, _with_a_gradient, RuntimeError, ["'1.weight'", "already", "zero_grad()"], id="gradient-there"),
    pytest.param({}, _released, RuntimeError, ["released already", "remove()"], id="twice"),
    pytest.param(
        {"differentiable": True}, lambda model, _: model, RuntimeError, ["differentiable=False"], id="differentiable"
    ),
    pytest.param(
        {"error_if_nonfinite": True},
        lambda model, _: model,
        RuntimeError,
        ["error_if_nonfinite=False", "nothing changes"],
        id="error-if-nonfinite",
    ),
]


def _assert_release_refused(run: Run, model: Any, kind: type[Exception], words: list[str]) -> None:
    """The message has these words, and the optimizer is as before."""
    held = run[1]._release
    before = snapshot(*run)
    with pytest.raises(kind) as raised:
        run[1].release_gradients(model)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert run[1]._release is held
    hooks = [param._post_accumulate_grad_hooks or {} for param in run[0].parameters()]
    assert [len(of_one) for of_one in hooks] == [int(held is not None)] * len(hooks)
    assert_same_bits(snapshot(*run), before)


@pytest.mark.parametrize(("arguments", "prepare", "kind", "words"), AT_RELEASE)
def test_release_refuses_what_it_cannot_serve(
    arguments: dict[str, Any], prepare: Callable[[nn.Module, STAC], Any], kind: type[Exception], words: list[str]
) -> None:
    run, _ = twins(**arguments)
    _assert_release_refused(run, prepare(*run), kind, words)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("around", [lambda ddp: ddp, nn.Sequential], ids=["itself", "inside"])
def test_distributed_data_parallel_is_refused(around: Callable[[nn.Module], nn.Module]) -> None:
    model, optimizer = stepped(0)
    ddp = around(DistributedDataParallel(model))
    _assert_release_refused(
        (model, optimizer), ddp, RuntimeError, ["DistributedDataParallel", "averaged", "step() after backward"]
    )


@pytest.mark.usefixtures("ranks")
def test_several_ranks_are_refused_also_where_they_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped(0)
    with optimizer.release_gradients(model):  # one rank has nothing to average
        seeded_loss(model, 0).backward()
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match=r"2 ranks, .* each rank alone"):
            optimizer.step()
    _assert_release_refused((model, optimizer), model, RuntimeError, ["2 ranks", "averaged", "step() after backward"])


@pytest.mark.usefixtures("ranks")
def test_sharded_parameters_are_refused() -> None:
    model = nn.Linear(4, 2)
    weight = DTensor.from_local(model.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
    model.weight = nn.Parameter(weight)
    optimizer = STAC(model)
    with pytest.raises(RuntimeError, match=r"'weight' is a DTensor, as FSDP2 makes them.* step\(\) after backward"):
        optimizer.release_gradients(model)
    assert optimizer._release is None


def test_second_backward_before_step_is_refused_until_step_ends_the_iteration() -> None:
    (model, optimizer), _ = twins()
    with optimizer.release_gradients(model):
        seeded_loss(model, 0).backward()
        before = snapshot(model, optimizer)
        with pytest.raises(RuntimeError, match=r"'3.bias' has a second gradient .* Call step\(\) after each backward"):
            seeded_loss(model, 1).backward()
        with pytest.raises(RuntimeError, match=r"'3.bias' has a second gradient"):
            optimizer.step()
        assert_same_bits(snapshot(model, optimizer), before)
        optimizer.zero_grad()
        optimizer.step()
        train((model, optimizer), range(1, 2))
    assert parameter_state(optimizer, model, "3.bias")["step"] == 2


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_sparse_gradient_is_refused_in_backward(role: str) -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = STAC([{"params": list(embedding.named_parameters()), "stac_role": role}])
    before = snapshot(embedding, optimizer)
    with optimizer.release_gradients(embedding):
        with pytest.raises(RuntimeError, match=rf"'weight' \({role}\) has .*sparse=False. It was not changed"):
            embedding(torch.tensor([1])).sum().backward()
        assert_same_bits(snapshot(embedding, optimizer), before)
        with pytest.raises(RuntimeError, match="It was not changed"):  # until zero_grad drops it
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("flag", ["error_if_nonfinite", "differentiable"])
def test_flag_that_a_checkpoint_brings_is_refused_in_backward(flag: str) -> None:
    model, optimizer = stepped(1)
    optimizer.zero_grad()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group[flag] = True
    with optimizer.release_gradients(model):
        optimizer.load_state_dict(saved)
        before = snapshot(model, optimizer)
        with pytest.raises(RuntimeError, match=rf"{flag}=True \(cap\).*{flag}=False"):
            seeded_loss(model, 0).backward()
        assert_same_bits(snapshot(model, optimizer), before)


def test_gradient_that_another_release_has_freed_is_refused() -> None:
    (model, optimizer), _ = twins()
    other = STAC(model)
    with other.release_gradients(model), optimizer.release_gradients(model):
        with pytest.raises(RuntimeError, match=r"the gradient of '3.bias' is gone .* another optimizer"):
            seeded_loss(model, 0).backward()
        assert not optimizer.state


def test_closure_is_refused_before_it_runs() -> None:
    model, optimizer = stepped(0)

    def closure() -> float:
        raise AssertionError

    with optimizer.release_gradients(model), pytest.raises(RuntimeError, match=r"closure.*without a closure"):
        optimizer.step(closure)


@each_path
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_scaler_is_refused_and_leaves_no_trace(arguments: dict[str, Any], unscale: bool) -> None:
    model, optimizer = stepped(0, **arguments)
    scaler = GradScaler("cpu", init_scale=4.0)
    with optimizer.release_gradients(model):
        scaler.scale(seeded_loss(model, 0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"GradScaler .* still multiplied .* without a scaler"):
                scaler.step(optimizer)
            assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        optimizer.step()
    seeded_loss(model, 1).backward()
    optimizer.step()
    assert parameter_state(optimizer, model, "0.weight")["step"] == 2


@each_path
def test_disabled_scaler_works(arguments: dict[str, Any]) -> None:
    released, ordinary = twins(**arguments)
    scaler = GradScaler("cpu", enabled=False)
    with released[1].release_gradients(released[0]):
        for seed in range(3):
            for model, optimizer in (released, ordinary):
                optimizer.zero_grad()
                scaler.scale(seeded_loss(model, seed)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
    assert_equal_runs(released, ordinary)
