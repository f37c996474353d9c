"""Foreign optimizers in a role, and own ones: torch.distributed.checkpoint, loads that are refused, copies, resets."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from stac_optimizer import STAC
from stac_optimizer.stepping import watch

from ..support import assert_same_bits, parameter_state, set_gradients, snapshot, take_steps
from .guests import CLASSES, LR, Function, two_layers

MOMENTUM = partial(optim.SGD, momentum=0.9)


def run(function: Function, steps: int = 2, **arguments: Any) -> tuple[nn.Sequential, STAC]:
    """A model with a guest in its trunk, and gradients that are gone, as they are when a checkpoint is made."""
    model = two_layers()
    optimizer = STAC(model, lr=LR, trunk_optimizer=function, **arguments)
    take_steps(model, optimizer, range(steps))
    optimizer.zero_grad()
    return model, optimizer


KINDS = {"full": StateDictOptions(full_state_dict=True), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["Adagrad", "NAdam", "SGD"])
def test_state_dict_of_torch_distributed_resumes_guest_and_cap(name: str, options: StateDictOptions) -> None:
    """Also of a class that makes state at once, so that torch's own hidden step would find some."""
    model, optimizer = run(CLASSES[name])
    resumed, fresh = run(CLASSES[name], steps=0)
    resumed.load_state_dict(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(resumed, fresh, saved, options=options)
    assert_same_bits(resumed.state_dict(), model.state_dict())
    for each in ((model, optimizer), (resumed, fresh)):
        take_steps(*each, range(5, 7))
    assert_same_bits(snapshot(resumed, fresh), snapshot(model, optimizer))


def test_optimizer_that_has_not_stepped_holds_no_state() -> None:
    """What torch.distributed.checkpoint asks before it makes state by a hidden step, which is not counted then."""
    model, optimizer = run(optim.Adagrad, steps=0)
    assert not optimizer.state
    get_optimizer_state_dict(model, optimizer)
    assert parameter_state(optimizer, model, "2.weight")["step"] == 0
    take_steps(model, optimizer, [0])
    assert parameter_state(optimizer, model, "2.weight")["step"] == 1
    assert parameter_state(optimizer, model, "0.weight")["sum"].any()


def first_state(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda saved: change(saved["state"][0])


def first_group(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["param_groups"][0].update(values)


# What updates the trunk, a change to the checkpoint, the error, and what its message holds.
REFUSED: dict[str, tuple[Any, Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "lr-nan": (MOMENTUM, first_group(lr=float("nan")), ValueError, "checkpoint group 0: lr must be .* got nan"),
    "lr-none": (MOMENTUM, first_group(lr=None), TypeError, "checkpoint group 0: lr must be .* got None"),
    "decay": (MOMENTUM, first_group(weight_decay=-1.0), ValueError, "checkpoint group 0: weight_decay must be"),
    "shape": (
        MOMENTUM,
        first_state(lambda state: state.update(momentum_buffer=torch.zeros(7, 4))),
        ValueError,
        r"'momentum_buffer' of a parameter of shape \(5, 4\) \(trunk\) has shape .*7, 4",
    ),
    "no-tensor": (
        MOMENTUM,
        first_state(lambda state: state.update(momentum_buffer="zzz")),
        ValueError,
        "'momentum_buffer' of a parameter .* has shape str",
    ),
    "lacks": (
        optim.Adam,
        first_state(lambda state: state.pop("exp_avg_sq")),
        ValueError,
        r"state of a parameter of shape \(5, 4\) \(trunk\) lacks 'exp_avg_sq', which torch.Adam needs",
    ),
    "flags": (optim.Adam, first_group(foreach=True, fused=True), ValueError, "fused=True .* foreach=True"),
    "no-dict": (
        MOMENTUM,
        lambda saved: saved["state"].update({0: 5}),
        TypeError,
        "state of parameter 0 must be a dict",
    ),
    # Of the own trunk, which does not read them; schedulers do.
    "betas-none": (
        None,
        first_group(betas=None),
        TypeError,
        "checkpoint group 0: betas must be a tuple of two numbers",
    ),
}


@pytest.mark.parametrize(("function", "change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_checkpoint_that_a_step_could_not_use_changes_nothing(
    function: Any, change: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    model, optimizer = run(function)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(model, optimizer), before)


class Hoarder(optim.SGD):
    """Keeps things beside its state, one of them under a name that LBFGS uses too."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.history: list[int] = []
        self._params = {"a": 1}

    def step(self, closure: Any = None) -> Any:
        self.history.append(len(self._params))
        return super().step(closure)


def test_attributes_of_a_guest_are_its_own() -> None:
    """Neither sharing groups and state writes to them, nor the step without data that counts bytes."""
    made: list[Hoarder] = []

    def function(groups: Any) -> Hoarder:
        made.append(Hoarder(groups))
        return made[-1]

    model, optimizer = run(function, steps=0)
    assert optimizer.partition.trunk_layers[0].state_bytes == optimizer.state_bytes() - 8 - 2 * 4 * 18 == 0
    assert made[0].history == []
    take_steps(model, optimizer, range(2))
    assert made[0].history == [1, 1]


@pytest.mark.parametrize("steps", [0, 2])
def test_state_may_be_put_in_its_place(steps: int) -> None:
    """As loops do that start anew; the guest goes on with the new one."""
    model, optimizer = run(MOMENTUM, steps)
    optimizer.state = defaultdict(dict)
    take_steps(model, optimizer, [7])
    grad = model.get_parameter("0.weight").grad
    assert grad is not None
    assert_same_bits(parameter_state(optimizer, model, "0.weight")["momentum_buffer"], grad)


class Averages(optim.Optimizer):
    """Keeps its averages outside of ``state``, and says so."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.averages: dict[Tensor, Tensor] = {}
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("never asked")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    average = self.averages.setdefault(param, torch.zeros_like(param))
                    param.sub_(average.lerp_(param.grad, 0.1), alpha=group["lr"])


def _cut(data: dict[str, Any]) -> None:
    data["nodes"] = data["nodes"][:2]


def _emptied(data: dict[str, Any]) -> None:
    data["nodes"][1] = {}


def _miscounted(data: dict[str, Any]) -> None:
    data["written"] = 5


@pytest.mark.parametrize("damage", [_cut, _emptied, _miscounted], ids=["cut", "empty", "count"])
def test_damaged_state_of_its_own_is_refused_with_words(damage: Callable[[dict[str, Any]], object]) -> None:
    model, optimizer = run(Averages)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["guests"]["trunk"])
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"the checkpoint's tests\.Averages"):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(model, optimizer), before)


def test_hidden_step_that_makes_state_leaves_an_own_state_alone() -> None:
    model, optimizer = run(Averages, steps=0)
    before = copy.deepcopy(optimizer.state_dict()["guests"])
    get_optimizer_state_dict(model, optimizer)
    assert_same_bits(optimizer.state_dict()["guests"], before)


def test_copies_warn_of_what_the_original_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a role without gradients, and of one lr for all groups."""
    monkeypatch.setattr(watch, "IDLE_ROLE_STEPS", 2)
    original = run(MOMENTUM, steps=1, trunk_lr=0.1)
    for model, optimizer in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        for seed in range(2):
            set_gradients(model, seed, skip=("2.weight", "2.bias"))
            with pytest.warns(UserWarning, match=r"the cap \('2'\) has had no gradient") if seed else nullcontext():
                optimizer.step()
        for lr in (0.5, 0.25):
            for group in optimizer.param_groups:
                group["lr"] = lr
            with pytest.warns(UserWarning, match="all groups have the learning rate") if lr < 0.5 else nullcontext():
                take_steps(model, optimizer, [3])


def test_state_that_was_thrown_away_is_made_anew_for_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 2))
    optimizer = STAC(model, trunk_state_dtype="int8")
    set_gradients(model, 0)
    optimizer.step()
    model.zero_grad()
    model.double()
    optimizer.state.clear()
    set_gradients(model, 1)
    optimizer.step()
    assert parameter_state(optimizer, model, "0.weight")["exp_avg"].dtype == torch.float64


def test_average_of_an_adamw_that_went_the_other_way_is_refused() -> None:
    model = two_layers()
    ascending = optim.AdamW(model.parameters(), maximize=True)
    set_gradients(model, 0)
    ascending.step()
    saved = ascending.state_dict()
    with pytest.raises(ValueError, match="give both the same maximize"):
        STAC(model).load_adamw_state_dict(saved, model)
    optimizer = STAC(model, maximize=True)
    optimizer.load_adamw_state_dict(saved, model)
    loaded = parameter_state(optimizer, model, "0.weight")["exp_avg"]
    assert_same_bits(loaded, saved["state"][0]["exp_avg"])
