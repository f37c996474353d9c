"""Muon's arguments, its state however it is held, and Muon as the trunk of STAC."""

from __future__ import annotations

import copy
import pickle
import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, MajorityVote, biases, named
from stac_optimizer.optim import Muon, Signum
from tests.runs import assert_equal_runs, stepped, through_file_into, train
from tests.support import assert_same_bits, parameter_state, set_gradients, small_model, take_steps, wide_model

FINITE = "a finite number in [0, inf)"
POSITIVE = "an integer in [1, inf)"
WRONG: list[tuple[str, str, list[Any], list[Any]]] = [
    ("lr", FINITE, ["1e-3", None, True], [-1.0, float("nan"), float("inf")]),
    ("momentum", "a number in [0, 1)", ["0.9", None, True], [-0.1, 1.0, float("nan")]),
    ("nesterov", "True or False", [1, None, "True", np.True_], []),
    ("weight_decay", FINITE, ["0", None, torch.tensor(0.1)], [-0.1, float("nan")]),
    ("ns_steps", POSITIVE, [5.0, None, True, "5"], [0, -1]),
    ("ns_coefficients", "a tuple of three numbers", [3.4, None, "abc"], [(), (1.0, 2.0), (1.0,) * 4]),
    (
        "ns_dtype",
        "",
        [8, 16.0, torch.zeros(1)],
        ["float16", torch.float16, torch.float64, "fast"],
    ),
    ("adjust_lr", "one of 'match_rms_adamw', 'original', 'spectral'", [], [None, 0.2, "rms", ""]),
    ("cautious", "True or False", [0, None, "no"], []),
    ("row_blocks", POSITIVE, [3.0, None, False, "3"], [0, -3]),
    ("batch_dims", "an integer in [0, inf)", [1.0, None, True], [-1]),
    ("state_dtype", "", [8, torch.zeros(1)], ["float16", torch.float32, torch.uint8]),
    ("share_work", "True or False", [1, None, "all"], []),
]
ROWS = [
    pytest.param(name, value, error, allowed, id=f"{name}={value}")
    for name, allowed, of_type, out_of_range in WRONG
    for error, values in ((TypeError, of_type), (ValueError, out_of_range))
    for value in values
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), ROWS)
def test_wrong_argument_raises_with_name_value_and_allowed(
    name: str, value: Any, error: type[Exception], allowed: str
) -> None:
    param = nn.Parameter(torch.ones(2, 3))
    arguments: dict[str, Any] = {name: value}
    for given, where in ((param, ""), ({"params": [param], **arguments}, "group 0: ")):
        with pytest.raises(error, match=rf"^{where}{name} must be {re.escape(allowed)}") as raised:
            Muon([given], **({} if where else arguments))
        assert repr(value) in str(raised.value)


@pytest.mark.parametrize("bad", ["1", None, float("nan"), float("inf")], ids=str)
def test_wrong_coefficient_raises_with_its_position(bad: Any) -> None:
    error = TypeError if bad in ("1", None) else ValueError
    with pytest.raises(error, match=rf"^ns_coefficients\[1\] must be a finite number.*got {bad!r}"):
        Muon([nn.Parameter(torch.ones(2, 3))], ns_coefficients=(1.5, bad, 0.0))


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", torch.float32, "float32"], ids=str)
def test_dtypes_and_coefficients_are_held_as_plain_values(given: Any) -> None:
    coefficients: Any = [2, -1.5, 0.5]
    group = Muon([nn.Parameter(torch.ones(2, 3))], ns_dtype=given, ns_coefficients=coefficients).param_groups[0]
    assert group["ns_dtype"] == str(given).removeprefix("torch.")
    assert group["ns_coefficients"] == (2, -1.5, 0.5)
    assert isinstance(group["ns_coefficients"], tuple)


# Parameters, arguments, and what the message says.
REFUSED: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "vector": (torch.ones(3), {}, r"'a.w' \(muon\) has 1 dimension, and muon updates whole matrices"),
    "scalar": (torch.ones(()), {}, r"'a.w' \(muon\) has 0 dimensions, and muon updates .*give what is none to another"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), {}, r"'a.w' \(muon\) is torch.complex64, and muon"),
    "blocks": (torch.ones(4, 3), {"row_blocks": 3}, "has 4 rows, which row_blocks=3 does not divide.*by overrides"),
    "blocks-of-experts": (torch.ones(3, 4, 2), {"row_blocks": 3, "batch_dims": 1}, "has 4 rows, which row_blocks=3"),
    "stack": (torch.ones(4, 3), {"batch_dims": 1}, r"shape \(4, 3\), which holds no matrices behind batch_dims=1"),
}


@pytest.mark.parametrize(("value", "arguments", "message"), REFUSED.values(), ids=list(REFUSED))
def test_parameter_that_holds_no_such_matrices_is_refused(
    value: Tensor, arguments: dict[str, Any], message: str
) -> None:
    params = [("b.w", nn.Parameter(torch.ones(6, 3, 3))), ("a.w", nn.Parameter(value))]
    with pytest.raises(ValueError, match=message):
        Muon(params, **arguments)
    optimizer = Muon(params[:1], **arguments)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


def muon(**arguments: Any) -> Any:
    return partial(Muon, **{"ns_dtype": "float32", "foreach": False, **arguments})


STATES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({}, 4.0),
    "bfloat16": ({"state_dtype": torch.bfloat16}, 2.0),
    "int8": ({"state_dtype": "int8"}, 1 + 4 / 128),
    "none": ({"momentum": 0.0, "state_dtype": "int8"}, 0.0),
}
each_state = pytest.mark.parametrize(("arguments", "bytes_each"), STATES.values(), ids=list(STATES))


@each_state
def test_state_costs_as_promised(arguments: dict[str, Any], bytes_each: float) -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    optimizer = Muon(model.parameters(), **arguments)
    promised = optimizer.state_bytes()
    assert (promised - 4) / (256 * 64) == bytes_each
    take_steps(model, optimizer, [0])
    (state,) = optimizer.state.values()
    assert sum(value.nbytes for value in state.values()) == optimizer.state_bytes() == promised


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda held: through_file_into(stepped(2, make=wide_model, seed=1, trunk_optimizer=muon()), held),
        copy.deepcopy,
        lambda held: pickle.loads(pickle.dumps(held)),
    ],
    ids=["file", "deepcopy", "pickle"],
)
@each_state
def test_copied_and_resumed_runs_continue_bit_identically(
    arguments: dict[str, Any], bytes_each: float, duplicate: Any
) -> None:
    held = stepped(3, make=wide_model, trunk_optimizer=muon(**arguments, cautious=True), weight_decay=0.1)
    twin = duplicate(held)
    assert twin[1].param_groups[0]["ns_coefficients"] == (3.4445, -4.775, 2.0315)
    assert_equal_runs(held, twin)


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}], ids=["single", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_averages_are_held_as_signum_holds_them(
    state_dtype: torch.dtype, dtype: torch.dtype, path: dict[str, Any]
) -> None:
    """To the bit, as long as they are to the bit the same before: the two round sums in another order."""
    shapes = ((4, 300), (6, 128), (3, 8, 3, 3), (5, 7))
    sides: list[tuple[Any, dict[str, Any]]] = [(Muon, path), (Signum, {"foreach": False})]
    for steps in (1, 4):
        runs = []
        for kind, own in sides:
            params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
            optimizer = kind(params, lr=0.01, momentum=0.9, state_dtype=state_dtype, rounding_seed=3, **own)
            for seed in range(steps):
                generator = torch.Generator().manual_seed(seed)
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator).to(dtype)
                optimizer.step()
            runs.append([dict(optimizer.state[param]) for param in params])
        if steps == 1:
            assert_same_bits(runs[0], runs[1])
        for ours, theirs in zip(*runs, strict=True):
            assert [(key, value.dtype) for key, value in ours.items()] == [
                (key, value.dtype) for key, value in theirs.items()
            ]
            if ours["exp_avg"].dtype == torch.int8:
                torch.testing.assert_close(ours["exp_avg_scale"], theirs["exp_avg_scale"], rtol=1e-6, atol=0.0)
                assert (ours["exp_avg"] != theirs["exp_avg"]).float().mean() <= 0.005


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}], ids=["single", "foreach"])
def test_low_precision_weights_move_on_average_as_exact_ones_by_chance(path: dict[str, Any]) -> None:
    """Steps of a tenth of the spacing of bfloat16 at 1, which would all round to nothing."""
    grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    moved = {}
    for dtype, by_chance in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        param = nn.Parameter(torch.ones(64, 256, dtype=dtype))
        is_lost = dtype == torch.bfloat16 and not by_chance
        with pytest.warns(UserWarning, match="makes steps of less than half the spacing") if is_lost else nullcontext():
            optimizer = muon(**path)([param], lr=2e-3, weight_decay=0.0, stochastic_rounding=by_chance)
        for _ in range(20):
            param.grad = grad.to(dtype)
            optimizer.step()
        moved[dtype, by_chance] = (param.detach().float() - 1).flatten()
    exact = moved[torch.float32, False]
    assert not moved[torch.bfloat16, False].any()
    share = float((moved[torch.bfloat16, True] @ exact) / (exact @ exact))
    assert share == pytest.approx(1.0, abs=0.05)  # measured within 0.02


def test_released_gradients_step_as_ordinary_ones() -> None:
    runs = []
    for released in (False, True):
        model = small_model()
        optimizer = STAC(model, lr=0.01, trunk_optimizer=muon(cautious=True))
        if released:
            optimizer.release_gradients(model)
        train((model, optimizer), range(4))
        runs.append({name: (param.detach(), optimizer.state[param]) for name, param in model.named_parameters()})
    assert_same_bits(runs[0], runs[1])


def test_vectors_go_to_the_cap_by_themselves_and_the_table_says_so() -> None:
    model = small_model()
    optimizer = STAC(model, lr=1e-3, trunk_optimizer=Muon, weight_decay=0.2)
    trunk, cap = optimizer.param_groups
    assert trunk["param_names"] == ["0.weight"]
    assert cap["param_names"] == ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    # The roles share one learning rate and one decay, as Muon's step is as long as AdamW's.
    assert (trunk["lr"], cap["lr"], trunk["weight_decay"], cap["weight_decay"]) == (1e-3, 1e-3, 0.2, 0.2)
    assert optimizer.partition.moved == ("0.bias", "1.weight", "1.bias")
    last = str(optimizer.partition).splitlines()[-1]
    assert last == "In the cap because the trunk's rule takes matrices only: '0.bias', '1.weight', '1.bias'"


def test_steps_of_both_roles_are_alike_in_size() -> None:
    """Root mean squares about 0.2 of the lr, whatever the shape, where AdamW's settle near as much."""
    for shape in ((64, 64), (32, 256), (256, 32), (16, 8, 3, 3)):
        param = nn.Parameter(torch.zeros(shape))
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([param], lr=0.5, weight_decay=0.0, ns_dtype="float32").step()
        assert 0.15 <= float(param.detach().square().mean().sqrt()) / 0.5 <= 0.25


def test_overrides_reach_the_matrices_that_they_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 2))
    overrides: Any = [(named("1"), {"row_blocks": 3, "momentum": 0.5})]
    optimizer = STAC(model, lr=0.1, trunk_optimizer=muon(), overrides=overrides)
    plain, blocks, _ = optimizer.param_groups
    assert (plain["param_names"], plain["row_blocks"], plain["momentum"]) == (["0.weight"], 1, 0.95)
    assert (blocks["param_names"], blocks["row_blocks"], blocks["momentum"]) == (["1.weight"], 3, 0.5)
    weight = model.get_parameter("1.weight")
    before = weight.detach().clone()
    set_gradients(model, 0)
    optimizer.step()
    parts = [nn.Parameter(part) for part in before.split(3)]
    grad = weight.grad
    assert grad is not None
    for part, own in zip(parts, grad.split(3), strict=True):
        part.grad = own.clone()
    muon(momentum=0.5)(parts, lr=0.1, weight_decay=0.0).step()
    assert_same_bits(weight.detach(), torch.cat([part.detach() for part in parts]))


def test_ranks_cannot_vote_on_its_steps() -> None:
    with pytest.raises(ValueError, match=r"^vote is for the trunk's own Signum"):
        STAC(small_model(), trunk_optimizer=Muon, vote=MajorityVote())
    arguments: dict[str, Any] = {"vote": MajorityVote()}
    with pytest.raises(TypeError, match="vote"):
        Muon([nn.Parameter(torch.ones(2, 3))], **arguments)


def test_run_of_adamw_goes_on_with_its_averages() -> None:
    model = small_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    take_steps(model, adamw, range(3))
    optimizer = STAC(model, lr=1e-3, trunk_optimizer=muon())
    optimizer.load_adamw_state_dict(adamw.state_dict(), model)
    weight = model.get_parameter("0.weight")
    state = parameter_state(optimizer, model, "0.weight")
    assert state.keys() == {"step", "exp_avg"}
    assert_same_bits(state["exp_avg"], adamw.state[weight]["exp_avg"])
    assert float(state["step"]) == 3
    for name in ("0.bias", "3.weight"):
        held = parameter_state(optimizer, model, name)
        assert_same_bits(dict(held), dict(adamw.state[model.get_parameter(name)]), name)
    take_steps(model, optimizer, [3])


def test_overrides_of_what_went_to_the_cap_alone_are_refused_there() -> None:
    """An override of a layer leaves its bias out; one of biases alone would be lost."""
    with pytest.raises(ValueError, match="'row_blocks' is no hyper-parameter of AdamW"):
        STAC(small_model(), trunk_optimizer=muon(), overrides=[(biases(), {"row_blocks": 3})])
