"""Every learning-rate scheduler of torch, and weight averaging: each group moves as torch.optim.AdamW's would."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR, AveragedModel

from stac_optimizer import STAC
from tests.runs import stepped
from tests.support import assert_same_bits, set_gradients, small_model, take_steps, through_file

STEPS = 12

ROWS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 4),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8, 1e-3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [0.01, 0.02], [0.1, 0.2], step_size_up=2),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 6),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 7], 0.5),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.95),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, [0.1, 0.2], STEPS + 1),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 10, 2.0),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=2),
    "SWALR": lambda optimizer: SWALR(optimizer, 0.05, anneal_epochs=5),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[4],
    ),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
}

# SequentialLR hands over to the next scheduler by an argument that torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


def test_every_scheduler_of_torch_has_a_row() -> None:
    classes = vars(lr_scheduler).items()
    found = {name for name, kind in classes if inspect.isclass(kind) and issubclass(kind, LRScheduler)}
    assert set(ROWS) == found - {"LRScheduler", "_LRScheduler"} | {"SWALR"}


def _advance(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("name", ROWS)
def test_scheduler_moves_every_group_as_for_adamw(name: str, tensor_lr: bool) -> None:
    model = small_model()
    optimizer = STAC(model, lr=torch.tensor(0.02) if tensor_lr else 0.02, trunk_momentum=0.0)
    held = [group["lr"] for group in optimizer.param_groups]
    twin_model = copy.deepcopy(model)
    weights = list(twin_model.parameters())
    twin_held = copy.deepcopy(held)
    shares = zip((weights[:4], weights[4:]), twin_held, strict=True)
    twin = AdamW([{"params": params, "lr": lr} for params, lr in shares], weight_decay=0.0)
    scheduler, reference = ROWS[name](optimizer), ROWS[name](twin)
    seen: list[set[float]] = [set(), set()]
    for seed in range(STEPS):
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        assert lrs == [float(group["lr"]) for group in twin.param_groups]
        betas = [group["betas"] for group in optimizer.param_groups]
        assert betas == [group["betas"] for group in twin.param_groups]
        before = model.get_parameter("0.weight").detach().clone()
        take_steps(model, optimizer, [seed])
        take_steps(twin_model, twin, [seed])
        after = before - torch.sign(_gradient(model, "0.weight")) * torch.tensor(lrs[0])
        assert_same_bits(model.get_parameter("0.weight"), after)
        assert_same_bits(model.get_parameter("3.weight"), twin_model.get_parameter("3.weight"))
        for values, lr in zip(seen, lrs, strict=True):
            values.add(lr)
        _advance(scheduler)
        _advance(reference)
    assert all(len(values) > 1 for values in seen)
    if tensor_lr:  # kept wherever torch itself keeps it, for a compiled step to see
        assert _kept(optimizer, held) == _kept(twin, twin_held)


def _kept(optimizer: Optimizer, held: list[Any]) -> list[bool]:
    return [group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True)]


def _gradient(model: nn.Module, name: str) -> Tensor:
    grad = model.get_parameter(name).grad
    assert grad is not None
    return grad


CYCLES: list[Any] = [
    pytest.param(
        lambda optimizer: OneCycleLR(optimizer, [0.1, 0.2], 10, pct_start=0.5, div_factor=10, final_div_factor=100),
        {0: (0.1, 0.95), 4: (1.0, 0.85), 9: (0.001, 0.95)},
        id="OneCycleLR",
    ),
    pytest.param(
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, [0.01, 0.02], [0.1, 0.2], 2, base_momentum=0.7),
        {0: (0.1, 0.9), 2: (1.0, 0.7), 4: (0.1, 0.9), 6: (1.0, 0.7), 8: (0.1, 0.9)},
        id="CyclicLR",
    ),
]


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize(("build", "expected"), CYCLES)
def test_cycled_momentum_moves_the_first_beta_and_no_trunk_momentum(
    build: Callable[[Optimizer], LRScheduler], expected: dict[int, tuple[float, float]], tensor_lr: bool
) -> None:
    model, optimizer = stepped(0, lr=torch.tensor(0.02) if tensor_lr else 0.02)
    scheduler = build(optimizer)
    for step in range(max(expected) + 1):
        if step in expected:
            share, beta = expected[step]
            assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1 * share, 0.2 * share])
            assert [group["betas"] for group in optimizer.param_groups] == [(pytest.approx(beta), 0.999)] * 2
        assert [group.get("momentum") for group in optimizer.param_groups] == [0.9, None]
        take_steps(model, optimizer, [step])
        if step < max(expected):
            scheduler.step()


def test_weight_averaging_ends_at_the_mean_of_the_weights() -> None:
    model, optimizer = stepped()
    averaged = AveragedModel(model)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2, anneal_strategy="linear")
    history = []
    for seed in range(4):
        take_steps(model, optimizer, [seed])
        averaged.update_parameters(model)
        history.append(copy.deepcopy(model.state_dict()))
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, torch.stack([weights[name] for weights in history]).mean(0))


def test_checkpoint_of_a_schedule_that_ended_at_zero_loads() -> None:
    model, optimizer = stepped()
    scheduler = lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=4)
    for seed in range(4):
        take_steps(model, optimizer, [seed])
        scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.0, abs=1e-17)
    _, resumed = stepped(0)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


def test_scheduler_of_a_wrapper_around_the_optimizer_moves_the_groups() -> None:
    class Wrapper(Optimizer):
        """As accelerate's: an Optimizer that hands everything on, and whose constructor is never run."""

        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)
        defaults = property(lambda self: self.optimizer.defaults)

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model, optimizer = stepped(0)
    wrapper = Wrapper(optimizer)
    scheduler = OneCycleLR(wrapper, [0.1, 0.2], 10, pct_start=0.5)
    for seed in range(4):
        set_gradients(model, seed)
        wrapper.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])
    assert [group["betas"][0] for group in optimizer.param_groups] == pytest.approx([0.85, 0.85])
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "momentum")} == {
        "lr": 0.01,
        "betas": (0.9, 0.999),
        "momentum": 0.9,
    }


def test_rates_of_a_checkpoint_are_those_that_a_schedule_may_not_level() -> None:
    """They began as one: nothing was erased."""
    model = small_model()
    optimizer = STAC(model)
    optimizer.load_state_dict(STAC(model, trunk_lr=1e-3, cap_lr=1e-3).state_dict())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for seed in range(4):
        take_steps(model, optimizer, [seed])
        scheduler.step()
