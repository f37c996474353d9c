"""Overrides: which parameters get which hyper-parameters, and what groups, tables and checkpoints show of it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import (
    STAC,
    biases,
    embeddings,
    last_layers,
    layerwise_lr_decay,
    named,
    norms,
    vectors,
)
from stac_optimizer.optim import AdamW, Lion
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, take_steps, through_file

NO_DECAY = (vectors(), {"weight_decay": 0.0})


def values(optimizer: STAC, key: str) -> dict[str, Any]:
    """What each parameter's group holds under a key, by the parameter's name."""
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_override_reaches_what_its_selector_chooses_in_both_roles() -> None:
    optimizer = STAC(small_model(), weight_decay=0.1, overrides=[NO_DECAY])
    assert values(optimizer, "weight_decay") == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }
    assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk_1", "cap", "cap_1"]
    assert [group["stac_role"] for group in optimizer.param_groups] == ["trunk", "trunk", "cap", "cap"]


def test_combinations_without_parameters_make_no_group() -> None:
    optimizer = STAC(small_model(), cap=last_layers(1), overrides=[(named("0"), {"momentum": 0.5}), (named("0"), {})])
    assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk_1", "cap"]
    assert values(optimizer, "stac_role")["1.weight"] == "trunk"


def test_later_override_wins() -> None:
    overrides = [(named("0", "1"), {"lr": 0.5, "weight_decay": 0.3}), (named("1"), {"lr": 0.25})]
    optimizer = STAC(small_model(), overrides=overrides)
    assert values(optimizer, "lr")["0.weight"] == 0.5
    assert values(optimizer, "lr")["1.weight"] == 0.25
    assert values(optimizer, "weight_decay")["1.weight"] == 0.3


def test_lr_ratio_multiplies_the_roles_lr_once() -> None:
    overrides = [(named("0", "3"), {"lr_ratio": 0.5})]
    optimizer = STAC(small_model(), lr=0.1, overrides=overrides)
    rates = values(optimizer, "lr")
    assert rates["0.weight"] == pytest.approx(0.0375)
    assert rates["1.weight"] == pytest.approx(0.075)
    assert rates["3.weight"] == pytest.approx(0.05)
    assert all("lr_ratio" not in group for group in optimizer.param_groups)


def test_lr_ratio_after_lr_is_of_the_roles_lr() -> None:
    overrides = [(named("0"), {"lr": 0.5}), (named("0"), {"lr_ratio": 0.5})]
    assert values(STAC(small_model(), trunk_lr=0.2, overrides=overrides), "lr")["0.weight"] == pytest.approx(0.1)


def test_lr_ratio_of_a_function_that_has_written_its_lr_is_of_that() -> None:
    trunk = partial(Lion, lr=0.2)
    for function in (trunk, lambda groups: Lion(groups, lr=0.2)):
        optimizer = STAC(small_model(), trunk_optimizer=function, overrides=[(named("0"), {"lr_ratio": 0.5})])
        assert values(optimizer, "lr")["0.weight"] == pytest.approx(0.1)
        assert values(optimizer, "lr")["1.weight"] == pytest.approx(0.2)


def test_tensor_lr_is_not_shared_between_groups() -> None:
    optimizer = STAC(small_model(), lr=torch.tensor(0.1), overrides=[NO_DECAY, (named("0"), {"lr_ratio": 0.5})])
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates)
    for rate in rates:
        rate.mul_(0)
        assert float(rate) == 0.0


def test_step_with_overrides_equals_separate_optimizers_by_bits() -> None:
    model, twin = small_model(), small_model()
    overrides = [(vectors(), {"weight_decay": 0.0}), (named("3"), {"lr_ratio": 0.1})]
    optimizer = STAC(model, trunk_optimizer=AdamW, lr=0.05, weight_decay=0.1, overrides=overrides)
    named_twin = dict(twin.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [named_twin["0.weight"]]},
        {"params": [named_twin[n] for n in ("0.bias", "1.weight", "1.bias")], "weight_decay": 0.0},
        {"params": [named_twin["3.weight"]], "lr": 0.05 * 0.1},
        {"params": [named_twin["3.bias"]], "lr": 0.05 * 0.1, "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(twin, seed)
        optimizer.step()
        plain.step()
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_overridden_run_resumes_exactly_through_a_file() -> None:
    def built() -> tuple[nn.Sequential, STAC]:
        model = small_model()
        return model, STAC(model, lr=0.01, overrides=[NO_DECAY, (norms(), {"lr_ratio": 0.3})])

    model, optimizer = built()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    take_steps(model, optimizer, range(2))
    schedule.step()
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    other, resumed = built()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    copied_model, copied = copy.deepcopy((model, optimizer))
    for run in ((model, optimizer), (other, resumed), (copied_model, copied)):
        take_steps(*run, range(5, 8))
    assert_same_bits(snapshot(model, optimizer), snapshot(other, resumed))
    assert_same_bits(snapshot(model, optimizer), snapshot(copied_model, copied))


def test_checkpoint_of_other_overrides_is_refused_with_the_way_out() -> None:
    saved = STAC(small_model(), overrides=[NO_DECAY]).state_dict()
    with pytest.raises(ValueError, match=r"4 parameter groups, this optimizer 2.*overrides"):
        STAC(small_model()).load_state_dict(saved)


def test_table_shows_rates_and_decays_that_differ() -> None:
    table = str(STAC(small_model(), lr=0.1, weight_decay=0.1, overrides=[NO_DECAY]).partition)
    row = next(line for line in table.splitlines() if line.startswith("0 "))
    assert "0.1, 0" in row
    assert "decay" in table.splitlines()[0]
    plain = str(STAC(small_model(), trunk_lr=0.1, cap_lr=0.1).partition)
    assert "decay" not in plain
    assert "lr" not in plain.splitlines()[0]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"lr": 0.1}, TypeError, r"overrides must be \(selector, dict\) pairs, got dict"),
        ({"weight_decay": 0.0}, TypeError, r"write a list, .*: \[\(vectors\(\), {'weight_decay': 0.0}\)\]"),
        ({norms(): {"lr": 0.1}}, TypeError, r"write a list: \[\(norms\(\), {'lr': 0.1}\)\]"),
        (norms(), TypeError, r"got Selector; write \[\(norms\(\), \{"),
        (None, TypeError, "got NoneType; write .* or leave it out"),
        ((norms(), {"lr": 0.1}), TypeError, r"got one pair; put it in a list: \[\(norms\(\), "),
        ([({"lr": 0.1}, norms())], TypeError, r"overrides\[0\] must be a pair of a selector and a dict"),
        ([("*.bias", {"lr": 0.1})], TypeError, r"overrides\[0\] .*write named\('\*.bias'\)"),
        ([(vectors(), 0.1)], TypeError, r"overrides\[0\] must be a pair of a selector and a dict"),
        ([("0", {"lr": 0.1})], TypeError, r"overrides\[0\] must be a pair of a selector"),
        ([(named("nothing"), {"lr": 0.1})], ValueError, "named.'nothing'. matches no layer"),
        ([(embeddings(), {"lr": 0.1})], ValueError, r"embeddings\(\) matches no layer.*leave it out"),
        ([(named("0"), {"lr": -1.0})], ValueError, "lr must be a finite number in .0, inf., got -1.0"),
        ([(named("0"), {"lr_ratio": -1.0})], ValueError, r"overrides\[0\]: lr_ratio must be"),
        ([(named("0"), {"lr_ratio": 0.5, "lr": 0.1})], ValueError, "both lr and lr_ratio"),
        ([(named("0"), {"stac_role": "cap"})], ValueError, "may not set 'stac_role'"),
        ([(named("0"), {"weight_deacy": 0.1})], ValueError, "did you mean 'weight_decay'"),
        ([(named("0"), {"trunk_momentum": 0.1})], ValueError, "did you mean 'momentum'"),
        ([(biases(), {"momentum": 0.1})], ValueError, "cap: 'momentum' is no hyper-parameter of AdamW"),
        ([(named("0"), {"eps": 0.1})], ValueError, "trunk: 'eps' is no hyper-parameter of Signum"),
    ],
)
def test_overrides_that_cannot_be_are_refused(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(small_model(), overrides=overrides)


def test_overrides_beside_explicit_groups_are_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "stac_role": "trunk"}]
    with pytest.raises(ValueError, match="overrides chooses layers of a model"):
        STAC(groups, overrides=[NO_DECAY])


def test_layerwise_decay_reaches_the_groups() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    optimizer = STAC(model, lr=0.1, cap=last_layers(1) | embeddings(), overrides=layerwise_lr_decay(model, 0.5))
    rates = values(optimizer, "lr")
    assert rates["3.weight"] == pytest.approx(0.1)
    assert rates["2.weight"] == pytest.approx(0.075 * 0.5)
    assert rates["0.weight"] == pytest.approx(0.1 * 0.125)
