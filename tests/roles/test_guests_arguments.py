"""What guests get of STAC's arguments: rates, overrides, added groups; and what is refused beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim

from stac_optimizer import STAC, biases, named

from ..support import assert_same_bits
from .guests import CLASSES, LR, completed, trajectory, two_layers


@pytest.mark.parametrize("name", CLASSES)
def test_a_group_is_added_to_a_guest(name: str) -> None:
    """It begins with STAC's lr where the function has written none, and its checkpoint loads into the like."""
    function = CLASSES[name]

    def build(model: nn.Sequential) -> STAC:
        optimizer = STAC(model[:3], lr=LR, last_n_layers=0, trunk_optimizer=function)
        named = [(f"3.{name}", param) for name, param in model[3].named_parameters() if optimizer_takes(param)]
        optimizer.add_param_group({"params": named, "stac_role": "trunk"})
        return optimizer

    def optimizer_takes(param: torch.Tensor) -> bool:
        return param.ndim == 2 or name != "Muon"

    def model_of(seed: int) -> nn.Sequential:
        return nn.Sequential(*two_layers(seed, bias=name != "Muon"), nn.Linear(3, 2))

    model = model_of(0)
    alone = completed(function, lr=LR, weight_decay=0.0)([*model[:3].parameters()])
    alone.add_param_group({"params": [p for p in model[3].parameters() if optimizer_takes(p)], **_shared_of(alone)})
    try:
        expected = trajectory(model, [alone])
    except KeyError as error:
        pytest.skip(f"{name} of this torch has no state, {error}, for groups that are added")
    model = model_of(0)
    optimizer = build(model)
    assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk_1"]
    path = trajectory(model, [optimizer], seeds=range(3))
    other = model_of(1)
    other.load_state_dict(model.state_dict())
    resumed = build(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_bits(path + trajectory(other, [resumed], seeds=range(3, 6)), expected)


def _shared_of(alone: optim.Optimizer) -> dict[str, Any]:
    return {key: alone.param_groups[0][key] for key in ("lr", "weight_decay") if key in alone.param_groups[0]}


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_vectors_go_to_the_cap_where_muon_has_the_trunk() -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=optim.Muon)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight"],
        ["0.bias", "2.weight", "2.bias"],
    ]
    assert "'0.bias'" in str(optimizer.partition).splitlines()[-1]
    with pytest.raises(ValueError, match=r"'new' \(trunk\) has 1 dimensions, and torch\.Muon takes matrices alone"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))], "stac_role": "trunk"})


def test_overrides_reach_a_guest() -> None:
    """Keys of its class, and a ratio of what the function has written."""
    overrides = [(biases(), {"weight_decay": 0.0, "momentum": 0.5}), (named("2"), {"lr_ratio": 0.1})]
    changed = {"weight_decay": 0.0, "momentum": 0.5}
    model = two_layers()
    groups: list[dict[str, Any]] = [
        {"params": [model[0].weight]},
        {"params": [model[0].bias], **changed},
        {"params": [model[2].weight], "lr": 0.2 * 0.1},
        {"params": [model[2].bias], **changed, "lr": 0.2 * 0.1},
    ]
    expected = trajectory(model, [optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=0.1)])
    function = partial(optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.1)
    other = two_layers()
    optimizer = STAC(other, last_n_layers=0, trunk_optimizer=function, overrides=overrides)
    assert_same_bits(trajectory(other, [optimizer]), expected)
    with pytest.raises(ValueError, match="'dampenin'; did you mean 'dampening'"):
        STAC(two_layers(), trunk_optimizer=function, overrides=[(named("0"), {"dampenin": 0.1})])
    with pytest.raises(ValueError, match="'eps' is no hyper-parameter of SGD, which has dampening,"):
        STAC(two_layers(), trunk_optimizer=function, overrides=[(named("0"), {"eps": 0.1})])


def _rates(**given: Any) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in STAC(two_layers(), **given).param_groups]


def test_what_is_not_written_comes_from_the_arguments() -> None:
    adam: Any = optim.Adam
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=adam) == [(0.1, 0.2), (0.1, 0.2)]
    given = {"trunk_lr": 0.3, "trunk_weight_decay": 0.4}
    assert _rates(lr=0.1, trunk_optimizer=adam, **given) == [(0.3, 0.4), (0.1, 0.0)]
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=partial(adam, lr=0.5)) == [(0.5, 0.2), (0.1, 0.2)]
    written = lambda params: adam(params, lr=0.7)  # noqa: E731
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=written) == [(0.7, 0.0), (0.1, 0.2)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"trunk_lr": 0.1, "trunk_optimizer": partial(optim.Adam, lr=0.2)}, ValueError, "trunk_lr is given beside"),
        (
            {"trunk_lr": 0.1, "trunk_optimizer": lambda params: optim.Adam(list(params))},
            ValueError,
            "does not take lr from here",
        ),
        (
            {"cap_weight_decay": 0.1, "cap_optimizer": optim.Rprop},
            ValueError,
            r"\(Rprop\).* does not take weight_decay",
        ),
        ({"trunk_optimizer": list}, TypeError, "must return an optimizer, got list"),
        ({"trunk_optimizer": optim.Adam([torch.ones(1)])}, TypeError, "must be a function of parameters"),
        ({"trunk_optimizer": lambda _: optim.SGD([torch.ones(1)])}, ValueError, "holds other parameters"),
        ({"trunk_optimizer": partial(optim.SGD, maximize=True)}, ValueError, "the roles disagree on maximize"),
        ({"trunk_optimizer": optim.SGD, "last_n_layers": 0, "maximize": True}, ValueError, "disagree on maximize"),
        ({"trunk_momentum": 0.5, "trunk_optimizer": optim.SGD}, ValueError, "trunk_momentum is for the trunk's own"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(two_layers(), **given)


@pytest.mark.parametrize("flag", [None, "fused", "foreach"])
def test_added_group_with_flags_that_exclude_each_other_is_refused(flag: str | None) -> None:
    """Also where one of them is what the foreign optimizer begins with; torch would ask in a step."""
    function: Any = optim.Adam if flag is None else partial(optim.Adam, **{flag: True})  # type: ignore[arg-type]
    optimizer = STAC(two_layers(), trunk_optimizer=function)
    group = {"params": list(nn.Linear(2, 2).named_parameters(prefix="new")), "stac_role": "trunk"}
    given = {"fused": True, "foreach": True}
    given.pop(flag or "", None)
    with pytest.raises(ValueError, match=r"fused=True and foreach=True, which exclude each other; leave out one"):
        optimizer.add_param_group({**group, **given})
    assert len(optimizer.param_groups) == 2
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_gradients_are_not_released_for_a_guest() -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=optim.Adam)
    with pytest.raises(
        RuntimeError, match=r"torch\.Adam \(trunk\) is a foreign optimizer, which may need all gradients"
    ):
        optimizer.release_gradients(model)
