"""Groups that name their role themselves: what they keep, what they train, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, last_layers, vectors
from tests.model.models import compiled, parameter
from tests.roles.support import KEYS, NAMES, group_of
from tests.support import assert_same_bits, small_model, take_steps, through_file

LR = torch.tensor(1e-3)


def test_tensor_lr_never_shared_between_explicit_groups() -> None:
    given = [group_of("cap", "0"), group_of("cap", "1"), group_of("trunk", "3", lr=LR), group_of("trunk", "4", lr=LR)]
    lrs = [group["lr"] for group in STAC(given, lr=torch.tensor(0.5), trunk_lr=0.25).param_groups]
    assert [float(lr) for lr in lrs] == pytest.approx([0.5, 0.5, 1e-3, 1e-3])
    assert len({lr.data_ptr() for lr in lrs}) == 4


def test_explicit_groups_keep_order_and_hyperparameters() -> None:
    given = [
        group_of("cap", "a", lr=0.5, betas=[0.5, 0.25], initial_lr=0.5),
        group_of("trunk", "b.c", "b.d", weight_decay=0.5),
        group_of("trunk", "e", lr=0.25, momentum=0, rule="signum"),
        group_of("trunk", "f", cautious=True, of_a_framework="kept"),
    ]
    before = [dict(group) for group in given]
    optimizer = STAC(given, lr=0.1, trunk_weight_decay=0.25)
    assert given == before
    assert [
        (group["stac_role"], group["rule"], group["lr"], group["weight_decay"], group["layer_names"])
        for group in optimizer.param_groups
    ] == [
        ("cap", "adamw", 0.5, 0.0, ("a",)),
        ("trunk", "signum", pytest.approx(0.075), 0.5, ("b.c", "b.d")),
        ("trunk", "signum", 0.25, 0.25, ("e",)),
        ("trunk", "signum", pytest.approx(0.075), 0.25, ("f",)),
    ]
    assert [group["name"] for group in optimizer.param_groups] == ["cap", "trunk", "trunk_1", "trunk_2"]
    assert [group.get("momentum") for group in optimizer.param_groups] == [None, 0.9, 0.0, 0.9]
    assert [group.get("cautious") for group in optimizer.param_groups] == [None, False, False, True]
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.25)
    assert optimizer.param_groups[0].pop("initial_lr") == 0.5
    assert optimizer.param_groups[3].pop("of_a_framework") == "kept"
    assert all(set(group) == KEYS[group["stac_role"]] for group in optimizer.param_groups)
    assert optimizer.partition.trunk_layer_names == ("b.c", "b.d", "e", "f")
    assert optimizer.partition.cap_layer_names == ("a",)


@pytest.mark.parametrize("form", ["list", "generator", "tensor", "param_names"])
def test_explicit_group_takes_parameters_in_any_form(form: str) -> None:
    param = parameter(2)
    forms: dict[str, dict[str, Any]] = {
        "list": {"params": [param]},
        "generator": {"params": (each for each in [param])},
        "tensor": {"params": param},
        "param_names": {"params": [param], "param_names": ["a.w"]},
    }
    (group,) = STAC([{"stac_role": "cap", **forms[form]}]).param_groups
    assert group["params"][0] is param
    assert group.get("param_names") == forms[form].get("param_names")
    assert group["layer_names"] == (("a",) if form == "param_names" else ())
    assert group["lr"] == 1e-3


def test_explicit_groups_train_as_the_model_would() -> None:
    explicit, whole = small_model(), small_model()
    params = list(explicit.named_parameters())
    given = [{"params": params[:4], "stac_role": "trunk"}, {"params": params[4:], "stac_role": "cap"}]
    optimizers = STAC(given, lr=0.1), STAC(whole, lr=0.1)
    for model, optimizer in zip((explicit, whole), optimizers, strict=True):
        take_steps(model, optimizer, range(3))
    assert_same_bits(explicit.state_dict(), whole.state_dict())
    assert optimizers[0].partition.cap_layer_names == ("3",)


SHARED = parameter(2)
CAP = {"stac_role": "cap"}
KINDS = "model must be a module, named parameters or group dicts, got "
# What is given, the error, and what its message holds.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: None, TypeError, KINDS + "NoneType"),
    "number": (lambda: 1, TypeError, KINDS + "int"),
    "string": (lambda: "ab", TypeError, KINDS + "str"),
    "tensor": (lambda: SHARED, TypeError, KINDS + "Parameter"),
    "method": (lambda: nn.Linear(2, 2).parameters, TypeError, KINDS + "method"),
    "one-dict": (lambda: group_of("cap", "0"), TypeError, "or group dicts with a stac_role"),
    "without-names": (lambda: nn.Linear(2, 2).parameters(), TypeError, "type Parameter.*pass the model itself"),
    "missing-role": (lambda: [group_of(None, "0")], ValueError, "^group 0: stac_role .*'trunk', 'cap', got None"),
    "unknown-role": (lambda: [group_of("head", "0")], ValueError, "^group 0: stac_role .*'trunk', 'cap', got 'head'"),
    "role-no-string": (lambda: [{**group_of("cap", "0"), "stac_role": ["cap"]}], Exception, "^group 0: stac_role"),
    "another-rule": (lambda: [group_of("trunk", "0", rule="adamw")], ValueError, "rule .*'adamw'"),
    "misspelt-key": (
        lambda: [group_of("trunk", "0"), group_of("cap", "1", weight_dekay=0)],
        ValueError,
        "^group 1: unknown key 'weight_dekay'; did you mean 'weight_decay'",
    ),
    "argument-as-key": (
        lambda: [group_of("cap", "0", cap_lr=0.1)],
        ValueError,
        "^group 0: unknown key 'cap_lr'; did you mean 'lr'",
    ),
    "exhausted": (
        lambda: [group_of("cap", "0"), {**CAP, "params": iter([])}],
        ValueError,
        "^group 1: params must hold at least one .*exhausted",
    ),
    "no-params": (lambda: [CAP], ValueError, "^group 0: params is missing"),
    "params-no-iterable": (lambda: [{**CAP, "params": 1}], TypeError, "group 0: params .*int"),
    "params-set": (lambda: [{**CAP, "params": {SHARED}}], TypeError, "ordered|set"),
    "too-few-names": (lambda: [{**CAP, "params": [SHARED], "param_names": []}], ValueError, "^group 0: param_names"),
    "name-no-string": (lambda: [{**CAP, "params": [(0, SHARED)]}], TypeError, "group 0: .*name"),
    "set-of-pairs": (lambda: set(nn.Linear(2, 2).named_parameters()), TypeError, "ordered|set"),
    "name-twice": (lambda: [{**CAP, "params": [("a", SHARED), ("a", parameter(1))]}], ValueError, "'a' twice"),
    "triple": (lambda: [{**CAP, "params": [("a", SHARED, 1)]}], TypeError, r"group 0: .*\(name, parameter\) pair"),
    "param-no-tensor": (
        lambda: [{**CAP, "params": [1.0]}],
        TypeError,
        "group 0: parameter 0 must be a parameter or .*got 1.0",
    ),
    "unnamed-beside-named": (
        lambda: [{**CAP, "params": [("a", SHARED), parameter(1)]}],
        ValueError,
        "^group 0: params must all have names or none",
    ),
    "unnamed-group": (
        lambda: [group_of("cap", "0"), {**CAP, "params": [SHARED]}],
        ValueError,
        "^group 1: its parameters have no names",
    ),
    "in-two-groups": (lambda: [{**CAP, "params": [SHARED]}] * 2, ValueError, "one parameter twice"),
    "lazy": (lambda: [{**CAP, "params": nn.LazyLinear(2).parameters()}], ValueError, "no shape yet"),
    "dict-then-tensor": (lambda: [group_of("cap", "0"), SHARED], TypeError, "^group 1: expected a dict.*Parameter"),
    "pair-then-dict": (lambda: [("a.w", SHARED), group_of("cap", "0")], TypeError, "type dict"),
}


@pytest.mark.parametrize(("build", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_params_raise(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(build())


def test_decay_groups_as_for_adamw_name_the_line_to_write() -> None:
    model = small_model()
    weights, rest = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.0},
    ]
    with pytest.raises(ValueError, match="stac_role must be one of 'trunk', 'cap', got None") as raised:
        STAC(groups, lr=6e-4, betas=(0.9, 0.95))
    line = "STAC(model, weight_decay=0.1, overrides=[(vectors(), {'weight_decay': 0.0})])"
    assert line in str(raised.value)
    optimizer = eval(line, {"STAC": STAC, "vectors": vectors, "model": model})
    held = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    # As transformers' Trainer makes groups, unless it finds "model" among the arguments.
    assert str(raised.value).endswith('give it the model among the arguments: (STAC, {"model": model, ...})')


@pytest.mark.parametrize("arguments", [{"last_n_layers": -1}, {"cap": last_layers(1)}], ids=["last_n_layers", "cap"])
def test_choice_of_layers_beside_explicit_groups_raises(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} "):
        STAC([group_of("cap", "0")], **arguments)


@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
@pytest.mark.parametrize("layers", [(), ("0",)], ids=["all-empty", "one-empty"])
def test_group_may_be_an_empty_list(layers: tuple[str, ...], fused: bool | None) -> None:
    given = [group_of("trunk"), group_of("cap", *layers), {"params": (), "stac_role": "cap"}]
    optimizer = STAC(given, fused=fused, error_if_nonfinite=True)
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.state) == 2 * len(layers)
    assert optimizer.partition.cap_layer_names == layers
    assert [group["lr"] for group in optimizer.param_groups] == [0.75e-3, 1e-3, 1e-3]
    resumed = STAC(given, lr=0.5)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


def test_layer_in_two_groups_of_a_role_is_listed_once() -> None:
    decayed, rest = group_of("trunk", "0", weight_decay=0.1), group_of("trunk", weight_decay=0.0)
    rest["params"].append(decayed["params"].pop())
    optimizer = STAC([decayed, rest])
    assert optimizer.partition.trunk_layer_names == ("0",)
    assert optimizer.partition.trunk_layers[0].parameter_names == ("0.weight", "0.bias")


def test_names_of_explicit_groups_are_without_wrappers() -> None:
    params = compiled(small_model()).named_parameters()
    (group,) = STAC([{"params": params, "stac_role": "trunk"}]).param_groups
    assert group["layer_names"] == ("0", "1", "3")
    assert group["param_names"] == NAMES


def test_failed_constructor_leaves_given_groups_usable() -> None:
    given = [group_of("trunk", "0"), group_of("cap", "1", lr=-1.0)]
    before = [dict(group) for group in given]
    with pytest.raises(ValueError, match=r"^group 1: lr"):
        STAC(given)
    assert given == before
    assert len(STAC([given[0], {**given[1], "lr": 0.1}]).param_groups) == 2
