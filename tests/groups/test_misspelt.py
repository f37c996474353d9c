"""Arguments and keys that nobody knows: what was meant is named, at construction, in overrides and in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim

from stac_optimizer import STAC, biases, named
from stac_optimizer.optim import AdamW, Lion, Signum
from stac_optimizer.roles.arguments import naming_what_was_meant
from tests.roles.support import group_of
from tests.support import assert_same_bits, small_model, snapshot

# An argument that STAC does not have, and the one that was meant.
ARGUMENTS = {
    "momentum": "trunk_momentum",
    "momentum_trunk": "trunk_momentum",
    "trunk_betas": "trunk_momentum",
    "mu": "trunk_momentum",
    "cautious": "trunk_cautious",
    "state_dtype": "trunk_state_dtype",
    "wd": "weight_decay",
    "weightdecay": "weight_decay",
    "decay": "weight_decay",
    "trunk_wd": "trunk_weight_decay",
    "cap_wd": "cap_weight_decay",
    "learning_rate": "lr",
    "lr_trunk": "trunk_lr",
    "head_lr": "cap_lr",
    "beta1": "betas",
    "beta2": "betas",
    "cap_betas": "betas",
    "cap_momentum": "betas",
    "cap_eps": "eps",
    "epsilon": "eps",
    "cap_amsgrad": "amsgrad",
    "trunk_maximize": "maximize",
    "trunk_optim": "trunk_optimizer",
    "params": "model",
    "last_layers": "last_n_layers",
    "last_n_modules": "last_n_layers",
    "lr_ratio": "overrides",
    "seed": "rounding_seed",
    "error_if_non_finite": "error_if_nonfinite",
}


@pytest.mark.parametrize(("given", "meant"), ARGUMENTS.items())
def test_argument_that_stac_does_not_have_names_the_one_that_was_meant(given: str, meant: str) -> None:
    arguments: dict[str, Any] = {given: 0.5}
    with pytest.raises(TypeError, match=f"^STAC has no argument '{given}'; did you mean '{meant}'\\?$"):
        STAC(small_model(), **arguments)
    assert meant in inspect.signature(STAC).parameters


@pytest.mark.parametrize("given", ["nesterov", "dampening", "max_grad_norm"])
def test_argument_of_another_optimizer_is_to_be_written_in_that(given: str) -> None:
    arguments: dict[str, Any] = {given: True}
    written = rf"trunk_optimizer=functools\.partial\(\.\.\., {given}=\.\.\.\)"
    with pytest.raises(TypeError, match=f"^STAC has no argument '{given}'.*{written}"):
        STAC(small_model(), **arguments)


def test_arguments_by_position_are_two() -> None:
    with pytest.raises(TypeError, match=r"model and lr by position, got 3 values; give the others by name.*betas="):
        STAC(small_model(), 0.1, (0.9, 0.95))  # type: ignore[call-arg, arg-type]  # as torch.optim.AdamW takes it
    assert STAC(small_model(), 0.5).param_groups[1]["lr"] == 0.5


def test_constructor_is_shown_and_called_as_it_was_written() -> None:
    class Holder:
        @naming_what_was_meant
        def __init__(self, model: int, lr: float = 1.0, *, cap: int = 0) -> None:
            """Its text."""
            self.held = model, lr, cap

    assert Holder(1, cap=2).held == (1, 1.0, 2)
    assert str(inspect.signature(Holder)) == "(model: 'int', lr: 'float' = 1.0, *, cap: 'int' = 0) -> 'None'"
    assert Holder.__init__.__doc__ == "Its text."


def _override(role: str, values: dict[str, Any]) -> None:
    STAC(small_model(), overrides=[(named("0" if role == "trunk" else "3"), values)])


def _given(role: str, values: dict[str, Any]) -> None:
    STAC([group_of("trunk", "a"), group_of("cap", "b"), {**group_of(role, "0"), **values}])


def _added(role: str, values: dict[str, Any]) -> None:
    model = small_model()
    optimizer = STAC(model)
    before = snapshot(model, optimizer)
    try:
        optimizer.add_param_group({**group_of(role, "4"), **values})
    except Exception:
        assert_same_bits(snapshot(model, optimizer), before)
        raise


def _alone(role: str, values: dict[str, Any]) -> None:
    (Signum if role == "trunk" else AdamW)([{"params": [nn.Parameter(torch.ones(2))], **values}])


def _argument(role: str, values: dict[str, Any]) -> None:
    (Signum if role == "trunk" else AdamW)([nn.Parameter(torch.ones(2))], **values)


PLACES: dict[str, tuple[Callable[[str, dict[str, Any]], None], str]] = {
    "override": (_override, "^overrides, {role}: "),
    "given": (_given, "^group 2: "),
    "added": (_added, "^param_group: "),
    "alone": (_alone, "^group 0: "),
    "argument": (_argument, ""),
}
# A key, and by role the one that was meant; None where the role has none like it.
KEYS: dict[str, tuple[str | None, str | None]] = {
    "wd": ("weight_decay", "weight_decay"),
    "learning_rate": ("lr", "lr"),
    "weightdecay": ("weight_decay", "weight_decay"),
    "trunk_wd": ("weight_decay", "weight_decay"),
    "trunk_lr": ("lr", "lr"),
    "beta1": ("momentum", "betas"),
    "cap_betas": ("momentum", "betas"),
    "trunk_momentum": ("momentum", "betas"),
    "nesterov": (None, None),
}


@pytest.mark.parametrize("role", ["trunk", "cap"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", KEYS)
def test_key_that_a_rule_does_not_have_names_the_one_that_was_meant(key: str, place: str, role: str) -> None:
    put, where = PLACES[place]
    meant = KEYS[key][role == "cap"]
    own = "cautious, lr, .*momentum, state_dtype" if role == "trunk" else "amsgrad, betas, eps, lr"
    words = f"did you mean '{meant}'" if meant else f"has {own}.*flags"
    with pytest.raises((TypeError, ValueError), match=f"{where.format(role=role)}.*'{key}'.*{words}") as raised:
        put(role, {key: 0.5})
    assert "capturable" not in str(raised.value)  # of the flags one is enough


@pytest.mark.parametrize("place", ["given", "added", "alone"])
@pytest.mark.parametrize(
    ("role", "key", "words"),
    [
        ("cap", "momentum", "is no hyper-parameter of .*; did you mean 'betas'"),
        ("trunk", "eps", "is no hyper-parameter of .*; it has cautious, lr"),
        ("trunk", "amsgrad", "is no hyper-parameter of .*; it has cautious, lr"),
        ("cap", "state_dtype", "is no hyper-parameter of .*; it has amsgrad, betas"),
    ],
)
def test_key_of_another_rule_is_refused_in_groups(place: str, role: str, key: str, words: str) -> None:
    put, where = PLACES[place]
    with pytest.raises(ValueError, match=f"{where}'{key}' {words}"):
        put(role, {key: 0.5})


def test_ratio_of_rates_is_for_stac_alone() -> None:
    with pytest.raises(ValueError, match="'lr_ratio' is no hyper-parameter of lion"):
        Lion([{"params": [nn.Parameter(torch.ones(2))], "lr_ratio": 0.5}])


@pytest.mark.parametrize("put", [_given, _added, _alone])
def test_keys_of_frameworks_pass_in_groups(put: Callable[[str, dict[str, Any]], None]) -> None:
    put("trunk", {"lr_scale": 0.5, "initial_lr": 0.1, "of_a_framework": 1, "name": "body"})


def test_betas_pass_in_groups_of_stac_for_schedulers_that_cycle_them() -> None:
    optimizer = STAC([group_of("trunk", "0", betas=(0.5, 0.5)), group_of("cap", "1")])
    optimizer.add_param_group(group_of("trunk", "2", betas=(0.5, 0.5)))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.5), (0.9, 0.999), (0.5, 0.5)]


def test_groups_of_foreign_optimizers_are_read_by_their_own_keys() -> None:
    optimizer = STAC(small_model(), trunk_optimizer=partial(optim.SGD, momentum=0.9))
    optimizer.add_param_group(group_of("trunk", "4", nesterov=True))
    assert optimizer.param_groups[-1]["nesterov"] is True
    with pytest.raises(ValueError, match=r"^param_group: 'eps' is no hyper-parameter of torch\.SGD"):
        optimizer.add_param_group(group_of("trunk", "5", eps=0.5))
    with pytest.raises(ValueError, match=r"^param_group: unknown key 'dampenin'; did you mean 'dampening'"):
        optimizer.add_param_group(group_of("trunk", "5", dampenin=0.5))


def test_override_of_one_role_is_to_select_its_parameters() -> None:
    with pytest.raises(ValueError, match=r"cap: 'momentum' is no hyper-parameter.*select parameters of the other role"):
        STAC(small_model(), overrides=[(biases(), {"momentum": 0.5})])


def test_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"overrides\[0\]: keys must be strings, got 1 of type int"):
        STAC(small_model(), overrides=[(biases(), {1: 2})])  # type: ignore[dict-item]
    for put in (_given, _added, _alone):
        with pytest.raises(TypeError, match="keys must be strings, got 1 of type int"):
            put("cap", {1: 2})  # type: ignore[dict-item]
