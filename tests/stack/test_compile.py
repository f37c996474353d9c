"""``torch.compile`` of the step: one graph, no recompilation under a schedule, and the bits of the eager trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from stac_optimizer import STAC
from tests.runs import stepped
from tests.support import assert_same_bits, parameter_state, set_gradients, snapshot

# A compiled step is not the one that a scheduler watches, so the scheduler believes that there was none.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")

ARGUMENTS = [
    pytest.param({}, id="default"),
    pytest.param({"trunk_momentum": 0.0}, id="momentum-0"),
    pytest.param({"trunk_cautious": True}, id="cautious"),
    pytest.param({"last_n_layers": 0}, id="all-trunk"),
    pytest.param({"last_n_layers": 9}, id="all-cap"),
    pytest.param({"weight_decay": 0.1, "amsgrad": True, "maximize": True}, id="decay-amsgrad-maximize"),
    pytest.param({"foreach": False}, id="single"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compare(
    compiled: tuple[nn.Module, STAC], eager: tuple[nn.Module, STAC], step: Callable[[], Any], steps: int = 20
) -> None:
    """Step both under one schedule. A compiled cap is torch's capturable arithmetic, so it is close, not equal."""
    schedules: list[LRScheduler] = [ExponentialLR(optimizer, 0.9) for _, optimizer in (compiled, eager)]
    for seed in range(steps):
        for model, _ in (compiled, eager):
            set_gradients(model, seed)
        step()
        eager[1].step()
        for schedule in schedules:
            schedule.step()
    trunk = {name for layer in eager[1].partition.trunk_layers for name in layer.parameter_names}
    for name, expected in eager[0].named_parameters():
        param = compiled[0].get_parameter(name)
        if name in trunk:
            assert_same_bits(param, expected, name)
            assert_same_bits(parameter_state(compiled[1], compiled[0], name), parameter_state(eager[1], eager[0], name))
        else:
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_compiled_step_is_one_graph_and_equals_the_eager_one(arguments: dict[str, Any]) -> None:
    model, optimizer = stepped(0, lr=torch.tensor(1e-2), **arguments)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    _compare((model, optimizer), stepped(0, lr=torch.tensor(1e-2), **arguments), step)
    assert counter.frame_count == 1


def test_compiled_step_survives_functionalization() -> None:
    compiled, eager = stepped(0, lr=torch.tensor(1e-2)), stepped(0, lr=torch.tensor(1e-2))
    _compare(compiled, eager, torch.compile(compiled[1].step, fullgraph=True, backend="aot_eager"), steps=3)


# torch 2.6 warns of its own configuration while it logs what it compiles.
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")
@pytest.mark.slow
def test_step_compiled_by_inductor_equals_the_eager_one() -> None:
    arguments: dict[str, Any] = {"weight_decay": 0.1}
    model, optimizer = stepped(0, lr=torch.tensor(1e-2), **arguments)
    step = torch.compile(optimizer.step, fullgraph=True)
    _compare((model, optimizer), stepped(0, lr=torch.tensor(1e-2), **arguments), step)


def test_compiled_step_goes_on_from_a_checkpoint() -> None:
    compiled, eager = stepped(lr=torch.tensor(1e-2)), stepped(lr=torch.tensor(1e-2))
    for _, optimizer in (compiled, eager):
        optimizer.load_state_dict(optimizer.state_dict())
    _compare(compiled, eager, torch.compile(compiled[1].step, fullgraph=True, backend="eager"), steps=3)


@pytest.mark.slow
def test_compiled_fused_step_equals_the_eager_one() -> None:
    compiled, eager = stepped(0, fused=True), stepped(0, fused=True)
    _compare(compiled, eager, torch.compile(compiled[1].step, backend="eager"), steps=3)


def test_compiled_step_skips_parameters_without_gradient() -> None:
    compiled, eager = stepped(0), stepped(0)
    step = torch.compile(compiled[1].step, fullgraph=True, backend="eager")
    for seed, skip in enumerate(((), ("0.weight", "3.bias"), ())):
        for model, _ in (compiled, eager):
            set_gradients(model, seed, skip=skip)
        step()
        eager[1].step()
    for name in ("0.weight", "3.bias", "1.bias", "3.weight"):
        states = [parameter_state(optimizer, model, name) for model, optimizer in (compiled, eager)]
        assert [float(state["step"]) for state in states] == [3.0 - (name in ("0.weight", "3.bias"))] * 2
    assert_same_bits(compiled[0].get_parameter("0.weight"), eager[0].get_parameter("0.weight"))


def test_compiled_step_raises_on_a_gradient_that_is_not_finite() -> None:
    model, optimizer = stepped(error_if_nonfinite=True)
    step = torch.compile(optimizer.step, backend="eager")
    set_gradients(model, 3)
    step()
    before = snapshot(model, optimizer)
    set_gradients(model, 4)
    model.get_parameter("1.bias").grad = torch.full((5,), torch.nan)
    with pytest.raises(RuntimeError, match=r"'1.bias' \(trunk\) holds NaN"):
        step()
    assert_same_bits(snapshot(model, optimizer), before)
