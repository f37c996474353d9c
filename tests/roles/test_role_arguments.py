"""Values that would be lost or misread on their way to a role: refused, warned of, or handed on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import StepLR

from stac_optimizer import STAC, named, norms, vectors
from stac_optimizer.optim import Lion, Muon

from ..support import assert_same_bits, set_gradients, small_model, snapshot
from .guests import two_layers
from .support import by_role, group_of


class StepsItself(Lion):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Refuses(optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("no sparse gradients")


class TakesAny(optim.SGD):
    def __init__(self, params: Any, **values: Any) -> None:
        super().__init__(params, **values)


def override(values: dict[str, Any], trunk_optimizer: Any = optim.SGD) -> dict[str, Any]:
    return {"trunk_optimizer": trunk_optimizer, "overrides": [(named("0"), values)]}


def _flattens(groups: Any) -> optim.Optimizer:
    return optim.SGD([param for group in groups for param in group["params"]], lr=0.1)


def _drops_values(groups: Any) -> optim.Optimizer:
    return optim.SGD([{"params": group["params"]} for group in groups], lr=0.1)


# The arguments of a model's STAC, the error, and what its message holds.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "closure-beside-cap": ({"trunk_optimizer": optim.LBFGS}, ValueError, "torch.LBFGS needs a closure in every step"),
    "step-of-its-own": ({"trunk_optimizer": StepsItself}, TypeError, "StepsItself has a step of its own"),
    "decay-unread": (
        {"weight_decay": 0.1, "trunk_optimizer": optim.Rprop},
        ValueError,
        "weight_decay is 0.1, and trun",
    ),
    "rounding-unread": (
        {"stochastic_rounding": True, "trunk_optimizer": optim.SGD, "cap_optimizer": optim.SGD},
        ValueError,
        "stochastic_rounding is True, and trunk_optimizer does not read it",
    ),
    "flag-unread": (
        {"fused": True, "trunk_optimizer": optim.SGD, "cap_optimizer": optim.Adam},
        ValueError,
        "fused is True, and trunk_optimizer does not read it",
    ),
    "override-rounding": (override({"stochastic_rounding": True}), ValueError, "'stochastic_rounding' is no hyper"),
    "override-flag": (
        override({"fused": True}, lion_pytorch.Lion),
        ValueError,
        "'fused' is no hyper-parameter of Lion",
    ),
    "override-decay": (
        override({"weight_decay": 0.1}, optim.Rprop),
        ValueError,
        "'weight_decay' is no hyper-parameter",
    ),
    "override-lr-nan": (override({"lr": float("nan")}), ValueError, "trunk: lr must be .* got nan"),
    "override-negative": (override({"weight_decay": -1.0}), ValueError, "trunk: weight_decay must be .* got -1.0"),
    "override-flattened": (override({"lr": 0.5}, _flattens), ValueError, "override's lr is lost, 0.1 in place of 0.5"),
    "override-dropped": (override({"weight_decay": 0.5}, _drops_values), ValueError, "override's weight_decay is lost"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_value_that_would_be_lost_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(two_layers(), **arguments)


def test_guest_that_refuses_a_step_leaves_the_cap_alone() -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=Refuses)
    before = snapshot(model, optimizer)[0]
    set_gradients(model, 0)
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        optimizer.step()
    assert_same_bits(model.state_dict(), before)


def test_class_of_any_keywords_gets_the_lr() -> None:
    assert by_role(STAC(two_layers(), lr=0.5, trunk_optimizer=TakesAny), "lr") == {"trunk": 0.5, "cap": 0.5}


@pytest.mark.parametrize("function", [Lion, Muon, optim.SGD, lambda groups: Lion(groups, lr=0.1), _flattens])
def test_nonfinite_check_is_asked_of_every_function(function: Any) -> None:
    optimizer = STAC(two_layers(), trunk_optimizer=function, error_if_nonfinite=True)
    assert by_role(optimizer, "error_if_nonfinite") == {"trunk": True, "cap": True}


LR = torch.tensor(1e-3)


@pytest.mark.parametrize("function", [None, Lion, optim.SGD])
def test_tensor_lr_is_no_other_groups_nor_what_later_groups_begin_with(function: Any) -> None:
    model = two_layers()
    optimizer = STAC(model, lr=LR.clone(), trunk_optimizer=function)
    begin = float(optimizer.param_groups[0]["lr"])
    schedule = StepLR(optimizer, 1, 0.1)
    set_gradients(model, 0)
    optimizer.step()
    schedule.step()
    for role in ("trunk", "cap"):
        optimizer.add_param_group(group_of(role, f"added.{role}"))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert list(map(float, rates)) == pytest.approx([begin / 10, 1e-4, begin, 1e-3])
    assert len({rate.data_ptr() for rate in rates}) == 4


def test_added_group_of_a_class_alone_has_a_tensor_lr_of_its_own() -> None:
    optimizer = Lion(nn.Linear(2, 2).parameters(), lr=LR.clone())
    optimizer.param_groups[0]["lr"].fill_(0.5)
    optimizer.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    first, second = (group["lr"] for group in optimizer.param_groups)
    first.fill_(0.25)
    assert float(second) == pytest.approx(1e-3)


def test_groups_of_an_optimizer_build_another() -> None:
    optimizer = STAC(small_model(), overrides=[(norms(), {"lr_ratio": 0.5})])
    StepLR(optimizer, 1)
    rebuilt = STAC([dict(group) for group in optimizer.param_groups])
    assert_same_bits(rebuilt.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize(("ratio", "error"), [(-1.0, ValueError), ("half", TypeError)])
def test_wrong_lr_ratio_of_a_given_group_is_refused(ratio: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^group 1: lr_ratio must be a finite number in \[0, inf\)"):
        STAC([group_of("cap", "0"), group_of("trunk", "1", lr_ratio=ratio)])
    with pytest.raises(error, match="lr_ratio must be"):
        STAC(two_layers()).add_param_group(group_of("trunk", "3", lr_ratio=ratio))


@pytest.mark.parametrize("function", [None, Lion, optim.SGD])
def test_lr_ratio_of_an_added_group_multiplies_the_roles_lr(function: Any) -> None:
    optimizer = STAC(two_layers(), trunk_lr=0.2, trunk_optimizer=function)
    optimizer.add_param_group(group_of("trunk", "3", lr_ratio=0.5))
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1)
    assert "lr_ratio" not in optimizer.param_groups[-1]


def test_group_is_added_to_a_function_that_has_written_all() -> None:
    optimizer = STAC(two_layers(), trunk_optimizer=lambda groups: Lion(groups, lr=0.1, betas=(0.5, 0.6)))
    optimizer.add_param_group(group_of("trunk", "3"))
    added = optimizer.param_groups[-1]
    assert (added["rule"], added["lr"], added["betas"]) == ("lion", 0.1, (0.5, 0.6))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "param_group: lr must be"),
        ({"lr": "fast"}, TypeError, "param_group: lr must be"),
        ({"momentun": 0.5}, ValueError, "did you mean 'momentum'"),
        ({"stochastic_rounding": True}, ValueError, r"'stochastic_rounding' is no hyper-parameter of torch\.SGD"),
        ({"vote": "ternary"}, ValueError, r"'vote' is no hyper-parameter of torch\.SGD"),
    ],
)
def test_wrong_value_of_a_group_added_to_a_guest_changes_nothing(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=optim.SGD)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group_of("trunk", "3", **values))
    assert_same_bits(snapshot(model, optimizer), before)


def test_group_is_not_added_to_an_optimizer_of_one_group() -> None:
    optimizer = STAC(two_layers(), last_n_layers=0, trunk_optimizer=optim.LBFGS)
    with pytest.raises(ValueError, match=r"torch\.LBFGS takes one group alone"):
        optimizer.add_param_group(group_of("trunk", "3"))


def _added(param: Tensor) -> STAC:
    optimizer = STAC(two_layers())
    optimizer.add_param_group({"params": [("new", param)], "stac_role": "trunk"})
    return optimizer


NON_LEAF: dict[str, Callable[[Tensor], object]] = {
    "named": lambda param: STAC([("a", param)]),
    "groups": lambda param: STAC([{"params": [param], "stac_role": "trunk"}]),
    "guest": lambda param: STAC([("a", param)], trunk_optimizer=optim.SGD, last_n_layers=0),
    "alone": lambda param: Lion([param]),
    "added": _added,
}


@pytest.mark.parametrize("build", NON_LEAF.values(), ids=NON_LEAF)
def test_tensor_that_is_no_leaf_is_refused(build: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        build(torch.ones(3, requires_grad=True) * 2)


def messages_of(build: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build()
    return [str(warning.message) for warning in caught]


# Of each role the arguments that it alone reads, at a value that is not their default.
OF_ONE_ROLE: dict[str, dict[str, Any]] = {
    "trunk": {
        "trunk_lr": 0.1,
        "trunk_weight_decay": 0.0,
        "trunk_optimizer": Lion,
        "trunk_momentum": 0.5,
        "trunk_cautious": True,
        "trunk_state_dtype": torch.int8,
    },
    "cap": {
        "cap_lr": 0.1,
        "cap_weight_decay": 0.0,
        "cap_optimizer": Lion,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "amsgrad": True,
    },
}
EACH = [pytest.param(role, name, value, id=name) for role, own in OF_ONE_ROLE.items() for name, value in own.items()]


@pytest.mark.parametrize(("role", "name", "value"), EACH)
def test_argument_of_a_role_without_parameters_draws_one_warning(role: str, name: str, value: Any) -> None:
    argument: dict[str, Any] = {name: value}
    other = "cap" if role == "trunk" else "trunk"
    expected = [f"{name} is {value!r}, and the {role} has no parameters: nothing reads it. Leave it out"]
    assert messages_of(lambda: STAC(two_layers(), last_n_layers=9 if role == "trunk" else 0, **argument)) == expected
    assert messages_of(lambda: STAC([group_of(other, "0")], **argument)) == expected
    assert messages_of(lambda: STAC([group_of(other, "0"), {"params": [], "stac_role": role}], **argument)) == []
    assert messages_of(lambda: STAC(two_layers(), **argument)) == []


@pytest.mark.parametrize("last_n_layers", [0, 1, 9])
def test_defaults_draw_no_warning(last_n_layers: int) -> None:
    assert messages_of(lambda: STAC(two_layers(), last_n_layers=last_n_layers, lr=0.1, weight_decay=0.1)) == []


@pytest.mark.parametrize(("role", "name", "value"), EACH)
def test_argument_of_a_rule_beside_another_optimizer_is_to_be_written_there(role: str, name: str, value: Any) -> None:
    bare = name.removeprefix("trunk_").removeprefix("cap_")
    if bare in ("lr", "weight_decay", "optimizer"):
        return  # of any optimizer
    arguments: dict[str, Any] = {name: value, f"{role}_optimizer": Lion}
    there = f"write it there: {role}_optimizer=functools.partial(..., {bare}={value!r})"
    remedy = re.escape(there if bare in ("betas", "cautious") else "leave it out, for Lion has none")
    with pytest.raises(ValueError, match=f"^{name} is for the {role}'s own .*{remedy}$"):
        STAC(two_layers(), **arguments)


def _embedder() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))


def test_cure_for_embeddings_is_one_that_the_trunk_takes() -> None:
    (message,) = messages_of(lambda: STAC(_embedder(), trunk_optimizer=Lion))
    assert "trunk_cautious" not in message
    assert "cautious=True in trunk_optimizer" in message
    assert messages_of(lambda: STAC(_embedder(), trunk_optimizer=partial(Lion, cautious=True))) == []


def test_embeddings_that_given_groups_tell_of_draw_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [dict(group) for group in STAC(_embedder()).param_groups]
    (message,) = messages_of(lambda: STAC(given))
    assert "the trunk holds the embedding '0'" in message


# Of bfloat16 weights at 1, which a step of 1e-4 does not move, and one of 0.1 does.
LOST: dict[str, tuple[dict[str, Any], bool]] = {
    "lion": ({"lr": 1e-4, "trunk_optimizer": Lion}, True),
    "ratio-too-small": ({"lr": 0.1, "overrides": [(vectors(), {"lr_ratio": 1e-3})]}, True),
    "ratio-large-enough": ({"lr": 1e-4, "overrides": [(named("0", "1"), {"lr_ratio": 1e3})]}, False),
}


@pytest.mark.parametrize(("arguments", "is_lost"), LOST.values(), ids=LOST)
def test_step_that_rounds_to_nothing_is_told_by_the_final_lr(arguments: dict[str, Any], is_lost: bool) -> None:
    model = small_model(dtype=torch.bfloat16)
    for param in model.parameters():
        param.data.fill_(1)
    found = messages_of(lambda: STAC(model, **arguments))
    assert ["steps round to nothing" in message for message in found] == [True] * is_lost
