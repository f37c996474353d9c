"""Freezing and growing: frozen parameters kept in groups, groups added later, in both roles and to other rules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, last_layers, norms, vectors
from stac_optimizer.optim import AdamW, Lion, Signum
from tests.support import (
    assert_same_bits,
    parameter_state,
    set_gradients,
    small_model,
    snapshot,
    take_steps,
    through_file,
)


def frozen_model() -> nn.Sequential:
    model = small_model()
    model[0].requires_grad_(False)
    return model


def new_layer() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(3, 2)


def group_of(layer: nn.Module, name: str = "4", **values: Any) -> dict[str, Any]:
    return {"params": [(f"{name}.{key}", param) for key, param in layer.named_parameters()], **values}


def test_frozen_parameters_are_left_out_by_default_and_kept_on_request() -> None:
    assert STAC(frozen_model()).partition.trunk_layer_names == ("1",)
    assert STAC(frozen_model(), include_frozen=True).partition.trunk_layer_names == ("0", "1")


def test_unfrozen_parameters_train_as_if_they_had_always_been_free() -> None:
    model, twin = frozen_model(), small_model()
    optimizer = STAC(model, lr=0.01, include_frozen=True)
    other = STAC(twin, lr=0.01)
    take_steps(model, optimizer, range(2))
    model[0].requires_grad_(True)
    for seed in range(2):
        set_gradients(twin, seed, skip=("0.weight", "0.bias"))
        for name, param in model.named_parameters():  # the random numbers of the frozen run
            twin.get_parameter(name).grad = None if param.grad is None else twin.get_parameter(name).grad
        other.step()
    assert_same_bits(model[0].state_dict(), twin[0].state_dict())
    take_steps(model, optimizer, [5])
    assert not torch.equal(model.get_parameter("0.weight"), twin.get_parameter("0.weight"))
    assert parameter_state(optimizer, model, "0.weight")["step"] == 1


def test_checkpoint_with_frozen_parameters_resumes() -> None:
    model = frozen_model()
    optimizer = STAC(model, lr=0.01, include_frozen=True)
    take_steps(model, optimizer, range(2))
    other = frozen_model()
    resumed = STAC(other, lr=0.01, include_frozen=True)
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for run_model, run in ((model, optimizer), (other, resumed)):
        run_model[0].requires_grad_(True)
        take_steps(run_model, run, range(5, 7))
    assert_same_bits(snapshot(model, optimizer), snapshot(other, resumed))


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_added_group_gets_the_roles_arguments(role: str) -> None:
    model, layer = small_model(), new_layer()
    optimizer = STAC(
        model, lr=0.1, weight_decay=0.2, trunk_momentum=0.5, eps=1e-5, overrides=[(vectors(), {"lr": 9.0})]
    )
    optimizer.add_param_group(group_of(layer, stac_role=role, weight_decay=0.3))
    added = optimizer.param_groups[-1]
    assert added["lr"] == pytest.approx(0.075 if role == "trunk" else 0.1)
    assert added["weight_decay"] == 0.3
    assert added["momentum" if role == "trunk" else "eps"] == (0.5 if role == "trunk" else 1e-5)
    assert added["name"] == f"{role}_2"
    assert added["layer_names"] == ("4",)
    assert "4" in getattr(optimizer.partition, f"{role}_layer_names")


def test_added_group_steps_as_one_given_at_construction() -> None:
    model, layer = small_model(), new_layer()
    optimizer = STAC(model, lr=0.1)
    optimizer.add_param_group(group_of(layer, stac_role="trunk"))
    twin = new_layer()
    alone = Signum(twin.parameters(), lr=0.75 * 0.1)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(layer, seed)
        set_gradients(twin, seed)
        optimizer.step()
        alone.step()
    assert_same_bits(layer.state_dict(), twin.state_dict())


def test_group_can_be_added_to_a_role_that_was_empty() -> None:
    model = small_model()
    optimizer = STAC(model, last_n_layers=0, lr=0.1)
    optimizer.add_param_group(group_of(new_layer(), stac_role="cap"))
    assert optimizer.param_groups[-1]["rule"] == "adamw"
    assert optimizer.partition.cap_layer_names == ("4",)


def test_group_can_be_added_to_a_copy() -> None:
    optimizer = STAC(small_model(), lr=0.1, trunk_optimizer=Lion)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.add_param_group(group_of(new_layer(), stac_role="trunk"))
        assert other.param_groups[-1]["rule"] == "lion"
        assert len(optimizer.param_groups) == 2


def test_checkpoint_of_fewer_groups_says_what_to_do() -> None:
    model = small_model()
    optimizer = STAC(model)
    saved = optimizer.state_dict()
    optimizer.add_param_group(group_of(new_layer(), stac_role="cap"))
    with pytest.raises(ValueError, match=r"2 parameter groups, this optimizer 3.*load, and add groups afterwards"):
        optimizer.load_state_dict(saved)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no role": ({}, RuntimeError, "does not support add_param_group.*include_frozen=True"),
    "a role that does not exist": ({"stac_role": "head"}, ValueError, "stac_role must be one of 'trunk', 'cap'"),
    "a misspelt key": ({"stac_role": "cap", "beta": (0.9, 0.9)}, ValueError, "did you mean 'betas'"),
    "a bad value": ({"stac_role": "cap", "lr": -1}, ValueError, "param_group: lr must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_groups_that_cannot_be_added_change_nothing(case: str) -> None:
    values, error, message = REFUSED[case]
    model = small_model()
    optimizer = STAC(model)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group_of(new_layer(), **values))
    assert_same_bits(snapshot(model, optimizer), before)


def test_parameter_or_name_that_is_there_already_is_refused() -> None:
    model = small_model()
    optimizer = STAC(model, cap=last_layers(1) | norms())
    with pytest.raises(ValueError, match="one parameter twice"):
        optimizer.add_param_group({"params": [("x", model[0].weight)], "stac_role": "cap"})
    with pytest.raises(ValueError, match=r"the name '0.weight' twice"):
        optimizer.add_param_group(group_of(new_layer(), name="0", stac_role="cap"))
    with pytest.raises(ValueError, match="have no names"):
        optimizer.add_param_group({"params": list(new_layer().parameters()), "stac_role": "cap"})
    assert len(optimizer.param_groups) == 2


def test_drop_in_class_takes_further_groups_as_torch_does() -> None:
    first, second = new_layer(), new_layer()
    optimizer = AdamW(first.parameters(), lr=0.1, eps=1e-6)
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.2})
    plain = torch.optim.AdamW((twin := new_layer()).parameters(), lr=0.1, eps=1e-6)
    plain.add_param_group({"params": (other := new_layer()).parameters(), "lr": 0.2})
    for layer in (first, second, twin, other):
        set_gradients(layer, 0)
    optimizer.step()
    plain.step()
    assert_same_bits([first.state_dict(), second.state_dict()], [twin.state_dict(), other.state_dict()])


@pytest.mark.parametrize("cap_optimizer", [None, torch.optim.SGD], ids=["rule", "guest"])
def test_schedule_of_an_added_group_does_not_move_what_the_next_begins_with(cap_optimizer: Any) -> None:
    optimizer = STAC(small_model(), lr=torch.tensor(0.25), cap_optimizer=cap_optimizer)
    for name in ("first", "second"):
        optimizer.add_param_group(group_of(new_layer(), name=name, stac_role="cap"))
        assert optimizer.param_groups[-1]["lr"].item() == 0.25
        for group in optimizer.param_groups:
            group["lr"].zero_()
