"""What a step warns of once: one learning rate for all groups, a role that is idle, no gradient at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from stac_optimizer import STAC, named, vectors
from stac_optimizer.optim import Lion, Muon
from stac_optimizer.stepping import watch
from tests.support import seeded_loss, set_gradients, small_model, take_steps

ERASED = "all groups have the learning rate"


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def messages_of(run: Callable[[], object]) -> list[str]:
    """The warnings that a run gives, but for torch's own of what its schedulers do to each other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="The epoch parameter")
        run()
    return [str(warning.message) for warning in caught]


def with_schedule(make: Callable[[STAC], Any], steps: int = 6, **arguments: Any) -> tuple[STAC, Callable[[], None]]:
    model = small_model()
    optimizer = STAC(model, **{"lr": 0.1, **arguments})
    schedule = make(optimizer)

    def run() -> None:
        for seed in range(steps):
            set_gradients(model, seed)
            optimizer.step()
            schedule.step(1.0) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()

    return optimizer, run


def _halves(optimizer: STAC) -> Any:
    return [rate / 2 for rate in rates(optimizer)]  # torch's annotation forgets that it takes a list


KEEP_RATIO: dict[str, Callable[[STAC], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    # A list, one value a group.
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=rates(o), total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=[rate / 10 for rate in rates(o)], max_lr=rates(o), step_size_up=3
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=_halves(o), anneal_epochs=4),
}


class FromFirstRate:
    """A schedule as timm and others have them: from ``initial_lr``, which it keeps itself."""

    def __init__(self, optimizer: STAC) -> None:
        self.optimizer, self.steps = optimizer, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * min(self.steps, 3) / 3 / self.steps
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate


KEEP_RATIO["from initial_lr"] = FromFirstRate
KEEP_RATIO["warm-up from zero"] = lambda o: lr_scheduler.LambdaLR(o, lambda step: min(step, 3) / 3 if step < 4 else 0.5)

SETTINGS: dict[str, dict[str, Any]] = {
    "roles": {},
    "tensor lr": {"lr": torch.tensor(0.1)},
    "rule in the trunk": {"trunk_optimizer": Lion, "trunk_lr": 0.075},
    "rule of matrices in the trunk": {"trunk_optimizer": Muon, "trunk_lr": 0.075},
    "rule in the cap": {"cap_optimizer": Lion},
    "foreign trunk": {"trunk_optimizer": torch.optim.SGD, "trunk_lr": 0.075},
    "overrides": {"overrides": [(vectors(), {"lr_ratio": 0.5})]},
    "overrides with a frozen group": {"overrides": [(named("0"), {"lr_ratio": 0.0}), (vectors(), {"lr_ratio": 2.0})]},
}


@pytest.mark.parametrize("arguments", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KEEP_RATIO)
def test_scheduler_keeps_the_ratio_of_the_roles(name: str, arguments: dict[str, Any]) -> None:
    first = rates(STAC(small_model(), **{"lr": 0.1, **copy.deepcopy(arguments)}))
    optimizer, run = with_schedule(KEEP_RATIO[name], steps=5, **copy.deepcopy(arguments))
    before = rates(optimizer)
    assert messages_of(run) == []
    left = [rate / began for rate, began in zip(rates(optimizer), first, strict=True) if began]
    assert left == pytest.approx([left[0]] * len(left))
    assert rates(optimizer) != before


def _of_adamw(optimizer: STAC) -> Any:
    """A schedule with the state of one over a single group, brought to two by hand."""
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [0.1, 0.1]})
    return schedule


ERASE_RATIO: dict[str, Callable[[STAC], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear"),
    "LambdaLR of a state that was AdamW's": _of_adamw,
}


@pytest.mark.parametrize("name", [name for name in ERASE_RATIO if name != "SWALR"])
def test_one_lr_for_all_groups_warns_once_with_the_cure(name: str) -> None:
    _, run = with_schedule(ERASE_RATIO[name], steps=8)
    found = messages_of(run)
    assert len(found) == 1
    assert ERASED in found[0]
    assert "max_lr=[group['lr'] for group in optimizer.param_groups]" in found[0]
    assert "trunk_lr=" in found[0]


def test_common_floor_is_no_erased_ratio() -> None:
    optimizer, run = with_schedule(ERASE_RATIO["SWALR"], steps=8)
    assert messages_of(run) == []
    assert len(set(rates(optimizer))) == 1
    _, run = with_schedule(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3, eta_min=1e-3), steps=4)
    assert messages_of(run) == []


def test_loop_over_groups_warns_once() -> None:
    model = small_model()
    optimizer = STAC(model, lr=0.1)

    def run() -> None:
        for step in range(1, 6):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / step
            take_steps(model, optimizer, [step])

    assert [ERASED in message for message in messages_of(run)] == [True]


def test_erased_overrides_warn_too() -> None:
    model = small_model()
    optimizer = STAC(model, trunk_lr=0.1, cap_lr=0.1, overrides=[(named("0"), {"lr_ratio": 0.5})])

    def run() -> None:
        for step in range(1, 4):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / step
            take_steps(model, optimizer, [step])

    assert len(messages_of(run)) == 1


def test_groups_whose_lr_is_zero_do_not_hide_one_lr_of_the_rest() -> None:
    model = small_model()
    optimizer = STAC(model, lr=0.1, overrides=[(named("0"), {"lr": 0.0})])

    def run() -> None:
        for step in range(1, 4):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / step if group["lr"] else 0.0
            take_steps(model, optimizer, [step])

    assert [ERASED in message for message in messages_of(run)] == [True]


@pytest.mark.parametrize("arguments", [{"trunk_lr": 0.1}, {"last_n_layers": 0}], ids=["equal", "one role"])
def test_rates_that_were_one_at_construction_warn_never(arguments: dict[str, Any]) -> None:
    _, run = with_schedule(ERASE_RATIO["OneCycleLR"], **arguments)
    assert messages_of(run) == []


def test_warm_up_from_zero_is_no_erased_ratio() -> None:
    _, run = with_schedule(lambda o: lr_scheduler.LambdaLR(o, lambda step: min(step, 3) / 3))
    assert messages_of(run) == []


def test_idle_role_warns_once_and_names_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = small_model()
    optimizer = STAC(model)

    def run() -> None:
        for seed in range(8):
            set_gradients(model, seed, skip=("3.weight", "3.bias"))
            optimizer.step()

    found = messages_of(run)
    assert len(found) == 1
    assert "the cap ('3') has had no gradient for 4 steps while the other role had" in found[0]


class Pooled(nn.Module):
    """An encoder whose last module serves another task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pooler = small_model(), nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(inputs)
        return result


class Averaged(Pooled):
    """A model that holds a copy of itself for averages."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = copy.deepcopy(self.encoder)  # type: ignore[assignment]


def _replaced(model: nn.Module) -> None:
    model.get_submodule("encoder").add_module("3", nn.Linear(5, 3))


IDLE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, Any], str]] = {
    "unused pooler": (Pooled, id, {}, "'pooler'"),
    "copy for averages": (Averaged, id, {}, "'pooler.3'"),
    "replaced head": (lambda: nn.ModuleDict({"encoder": small_model()}), _replaced, {}, "'encoder.3'"),
    "foreign cap": (Pooled, id, {"cap_optimizer": torch.optim.SGD}, "'pooler'"),
    "foreign trunk": (Pooled, id, {"trunk_optimizer": torch.optim.SGD}, "'pooler'"),
    "overrides": (Pooled, id, {"overrides": [(vectors(), {"lr_ratio": 0.5})]}, "'pooler'"),
}


@pytest.mark.parametrize(("build", "change", "arguments", "name"), IDLE.values(), ids=IDLE)
def test_cap_that_never_trains_warns_once_with_its_layers(
    build: Callable[[], Any],
    change: Callable[[nn.Module], Any],
    arguments: dict[str, Any],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = build()
    optimizer = STAC(model, **arguments)
    change(model)

    def run() -> None:
        for seed in range(9):
            seeded_loss(model["encoder"] if isinstance(model, nn.ModuleDict) else model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    (message,) = messages_of(run)
    assert f"the cap ({name}" in message
    assert "has had no gradient for 4 steps" in message
    assert "cap=" in message


def test_idle_parameters_without_names_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = STAC([{"params": params[:1], "stac_role": "trunk"}, {"params": params[1:], "stac_role": "cap"}])
    params[0].grad = torch.ones(2)
    (message,) = messages_of(lambda: [optimizer.step() for _ in range(5)])
    assert "the cap (2 parameters without names) has had no gradient" in message


@pytest.mark.parametrize("arguments", [{}, {"trunk_optimizer": Lion}], ids=["signum", "lion"])
def test_role_that_is_idle_while_gradients_are_released_warns(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = small_model()
    unused = nn.Linear(2, 2)
    model.append(unused)
    optimizer = STAC(model, **arguments)

    def run() -> None:
        with optimizer.release_gradients(model):
            for seed in range(8):
                seeded_loss(model[:4], seed).backward()
                optimizer.step()

    (message,) = messages_of(run)
    assert "the cap ('4') has had no gradient for 4 steps" in message


def test_roles_that_train_while_gradients_are_released_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = small_model()
    optimizer = STAC(model)

    def run() -> None:
        with optimizer.release_gradients(model):
            for seed in range(8):
                seeded_loss(model, seed).backward()
                optimizer.step()

    assert messages_of(run) == []


def test_one_lr_for_all_groups_warns_while_gradients_are_released_too() -> None:
    model = small_model()
    optimizer = STAC(model, lr=0.1)

    def run() -> None:
        with optimizer.release_gradients(model):
            for step in range(1, 6):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 / step
                seeded_loss(model, step).backward()
                optimizer.step()

    assert [ERASED in message for message in messages_of(run)] == [True]


def test_role_that_is_idle_for_a_while_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = small_model()
    optimizer = STAC(model)

    def run() -> None:
        for seed in range(12):
            set_gradients(model, seed, skip=() if seed % 4 == 3 else ("3.weight", "3.bias"))
            optimizer.step()

    assert messages_of(run) == []


def test_role_that_is_frozen_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a head is trained on a body that will be unfrozen later."""
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 4)
    model = small_model()
    model[:2].requires_grad_(False)
    optimizer = STAC(model, include_frozen=True)
    assert messages_of(lambda: take_steps(model, optimizer, range(8))) == []
    model[:2].requires_grad_(True)

    def run() -> None:
        for seed in range(8):
            set_gradients(model, seed, skip=[name for name, _ in model.named_parameters() if name[0] != "3"])
            optimizer.step()

    (message,) = messages_of(run)
    assert "the trunk ('0', '1') has had no gradient for 4 steps" in message


def test_idle_steps_are_hundreds_and_fewer_than_a_thousand() -> None:
    assert 100 <= watch.IDLE_ROLE_STEPS <= 1000


def test_steps_without_any_gradient_warn_once_and_never_raise() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = STAC(model)

    def run() -> None:
        for _ in range(10):
            optimizer.step()

    found = messages_of(run)
    assert len(found) == 1
    assert "has had a gradient in 3 steps" in found[0]
