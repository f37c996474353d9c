"""A run of AdamW that had a schedule goes on under STAC: what is warned of where the schedule is not where it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from stac_optimizer import STAC, vectors
from tests.support import small_model, take_steps

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}
STEPS = 3

# SequentialLR hands over to the next scheduler by an argument that torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


def advance(schedule: Any, steps: int, *optimizers: tuple[nn.Module, Optimizer]) -> None:
    for seed in range(steps):
        for model, optimizer in optimizers:
            take_steps(model, optimizer, [seed])
        schedule.step()


def adamw_run(make: Callable[[Optimizer], Any]) -> tuple[Optimizer, Any]:
    model = small_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = make(adamw)
    advance(schedule, STEPS, (model, adamw))
    return adamw, schedule


def heard(run: Callable[[], object]) -> list[str]:
    """What is warned of, but for what torch says of its schedulers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="The epoch parameter")
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        run()
    return [str(warning.message) for warning in caught]


def continued(adamw: Optimizer, **arguments: Any) -> tuple[nn.Module, STAC]:
    model = small_model()
    optimizer = STAC(model, lr=0.1, **arguments)
    optimizer.load_adamw_state_dict(adamw.state_dict(), model)
    return model, optimizer


@pytest.mark.parametrize("arguments", [{}, {"overrides": [(vectors(), {"lr_ratio": 0.5})]}], ids=["roles", "overrides"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_state_of_adamws_scheduler_draws_one_warning(name: str, arguments: dict[str, Any]) -> None:
    adamw, old = adamw_run(SCHEDULES[name])
    model, optimizer = continued(adamw, **arguments)
    schedule = SCHEDULES[name](optimizer)
    schedule.load_state_dict(old.state_dict())
    (message,) = heard(lambda: take_steps(model, optimizer, range(3)))
    assert "do not load its state: it is of 1 group, and here are" in message
    assert "for _ in range(scheduler_state['last_epoch']): scheduler.step()" in message


@pytest.mark.parametrize("arguments", [{}, {"overrides": [(vectors(), {"lr_ratio": 0.5})]}], ids=["roles", "overrides"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_warning_says_to_write_goes_on_as_adamws_would(name: str, arguments: dict[str, Any]) -> None:
    adamw, old = adamw_run(SCHEDULES[name])
    first = [group["lr"] for group in STAC(small_model(), lr=0.1, **arguments).param_groups]

    def run() -> None:
        model, optimizer = continued(adamw, **arguments)
        scheduler = SCHEDULES[name](optimizer)
        for _ in range(old.state_dict()["last_epoch"]):
            scheduler.step()
        for _ in range(3):
            left = adamw.param_groups[0]["lr"] / 0.1
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([left * rate for rate in first])
            take_steps(model, optimizer, [7])
            scheduler.step()
            adamw.step()
            old.step()

    assert heard(run) == []


@pytest.mark.parametrize("has_schedule", [False, True])
def test_runs_without_a_schedule_of_either_are_quiet(has_schedule: bool) -> None:
    adamw: Optimizer = torch.optim.AdamW(small_model().parameters(), lr=0.1)
    if has_schedule:
        adamw, _ = adamw_run(SCHEDULES["StepLR"])
    model, optimizer = continued(adamw)
    assert heard(lambda: take_steps(model, optimizer, range(3))) == []
    model, optimizer = continued(torch.optim.AdamW(small_model().parameters()))
    SCHEDULES["StepLR"](optimizer)
    assert heard(lambda: take_steps(model, optimizer, range(3))) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_copies_know_of_the_schedule_too(copied: Callable[[Any], Any]) -> None:
    adamw, _ = adamw_run(SCHEDULES["StepLR"])
    run = continued(adamw)
    for group in run[1].param_groups:
        group["initial_lr"] = group["lr"]  # as a new scheduler keeps it
    model, optimizer = copied(run)
    assert len(heard(lambda: take_steps(model, optimizer, range(3)))) == 1
