"""Saving, loading and copying: what a round trip keeps, and what loading does to what it is given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Muon
from tests.runs import Build, assert_equal_runs, built, stepped
from tests.support import (
    assert_same_bits,
    parameter_state,
    same_bits,
    set_gradients,
    small_model,
    snapshot,
    take_steps,
    through_file,
)

Copy = Callable[[Any], Any]


def _explicit(model: nn.Module, *, named: bool) -> STAC:
    """A trunk of two groups around the cap: not the order that a model gives."""
    pairs = list(model.named_parameters())
    chosen = [pairs[:2], pairs[4:], pairs[2:4]]
    roles = ["trunk", "cap", "trunk"]
    return STAC(
        [
            {"params": group if named else [param for _, param in group], "stac_role": role, "lr": 0.01 * (index + 1)}
            for index, (group, role) in enumerate(zip(chosen, roles, strict=True))
        ]
    )


def _row(name: str, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    arguments = {"lr": 0.1 if dtype is torch.bfloat16 else 1e-2, **arguments}
    return pytest.param(lambda model: STAC(model, **copy.deepcopy(arguments)), dtype, id=name)


BUILDS = [
    _row("default"),
    _row("momentum-0", trunk_momentum=0.0),
    _row("cautious", trunk_cautious=True),
    _row("amsgrad", amsgrad=True),
    _row("decay-maximize", weight_decay=0.1, maximize=True),
    _row("all-trunk", last_n_layers=0),
    _row("all-cap", last_n_layers=9),
    _row("bfloat16", dtype=torch.bfloat16),
    _row("bfloat16-fused", dtype=torch.bfloat16, fused=True),
    _row("float64", dtype=torch.float64),
    _row("tensor-lr", lr=torch.tensor(1e-2)),
    _row("tensor-lr-one-element", lr=torch.tensor([1e-2]), cap_lr=torch.tensor([[2e-2]])),
    _row("foreach", foreach=True),
    _row("single", foreach=False),
    _row("fused", fused=True),
    _row("fused-amsgrad", fused=True, amsgrad=True),
    _row("lion", trunk_optimizer=Lion, weight_decay=0.1),
    _row(
        "lion-cautious-rounding",
        dtype=torch.bfloat16,
        trunk_optimizer=partial(Lion, cautious=True, betas=(0.8, 0.9)),
        stochastic_rounding=True,
    ),
    _row("muon", trunk_optimizer=Muon, weight_decay=0.1),
    _row(
        "muon-cautious-rounding",
        dtype=torch.bfloat16,
        trunk_optimizer=partial(Muon, cautious=True, ns_dtype=torch.float32, state_dtype="bfloat16"),
        stochastic_rounding=True,
    ),
    _row("lion-in-the-cap", cap_optimizer=Lion, trunk_optimizer=AdamW),
    pytest.param(lambda model: _explicit(model, named=True), torch.float32, id="groups-named"),
    pytest.param(lambda model: _explicit(model, named=False), torch.float32, id="groups-unnamed"),
]


@pytest.mark.parametrize(("build", "dtype"), BUILDS)
def test_round_trip_through_a_file_continues_bit_identically(build: Build, dtype: torch.dtype) -> None:
    model, optimizer = built(build, dtype)
    take_steps(model, optimizer, range(3))
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    resumed_model, resumed = built(build, dtype, seed=1)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert_equal_runs((model, optimizer), (resumed_model, resumed))


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda value: pickle.loads(pickle.dumps(value)), id="pickle"),
    ],
)
@pytest.mark.parametrize(("build", "dtype"), BUILDS)
def test_copied_optimizer_continues_alike_and_alone(build: Build, dtype: torch.dtype, duplicate: Copy) -> None:
    model, optimizer = built(build, dtype)
    take_steps(model, optimizer, range(3))
    before = snapshot(model, optimizer)
    twin_model, twin = duplicate((model, optimizer))
    take_steps(twin_model, twin, [3])
    assert_same_bits(snapshot(model, optimizer), before)
    assert str(twin.partition) == str(optimizer.partition)
    take_steps(model, optimizer, [3])
    assert_equal_runs((model, optimizer), (twin_model, twin))


PATHS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {}]


@pytest.mark.filterwarnings("ignore:.*nothing reads it:UserWarning")  # what is drawn may be for a role without layers
@settings(max_examples=30, deadline=None)
@given(
    arguments=st.fixed_dictionaries(
        {
            "lr": st.floats(0.02, 0.5),
            "last_n_layers": st.integers(0, 4),
            "trunk_momentum": st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
            "trunk_cautious": st.booleans(),
            "weight_decay": st.one_of(st.just(0.0), st.floats(1e-3, 0.5)),
            "betas": st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.999)),
            "eps": st.floats(1e-10, 1e-3),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    absent=st.lists(st.sets(st.sampled_from(["0.weight", "1.bias", "3.bias"])), min_size=1, max_size=8),
    data=st.data(),
)
def test_resume_at_any_step_equals_the_uninterrupted_run(
    arguments: dict[str, Any],
    path: dict[str, Any],
    dtype: torch.dtype,
    absent: list[set[str]],
    data: st.DataObject,
) -> None:
    def run(steps: range) -> None:
        for number in steps:
            set_gradients(model, number, skip=absent[number])
            optimizer.step()

    stop = data.draw(st.integers(0, len(absent)), label="stop")
    model, optimizer = built(lambda model: STAC(model, **arguments, **path), dtype)
    run(range(stop))
    saved = through_file((model.state_dict(), optimizer.state_dict()))
    run(range(stop, len(absent)))
    uninterrupted = snapshot(model, optimizer)
    model, optimizer = built(lambda model: STAC(model, **arguments, **path), dtype, seed=1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(range(stop, len(absent)))
    assert_same_bits(snapshot(model, optimizer), uninterrupted)


def test_loading_restores_every_hyperparameter() -> None:
    _, source = stepped(
        0,
        trunk_lr=0.5,
        cap_lr=0.25,
        trunk_momentum=0.5,
        trunk_cautious=True,
        trunk_weight_decay=0.125,
        cap_weight_decay=0.75,
        betas=(0.5, 0.75),
        eps=0.0625,
        amsgrad=True,
        maximize=True,
        error_if_nonfinite=True,
        foreach=True,
        capturable=True,
        trunk_state_dtype=torch.int8,
        stochastic_rounding=True,
        rounding_seed=7,
        dtype=torch.bfloat16,
    )
    _, target = stepped(0, dtype=torch.bfloat16)
    for saved, present in zip(source.state_dict()["param_groups"], target.state_dict()["param_groups"], strict=True):
        structure = {"params", "param_names", "stac_role", "name", "rule", "layer_names", "layer_types"}
        unset = {"fused", "differentiable"} | ({"vote"} if saved["stac_role"] == "trunk" else set())
        assert {key for key in saved if saved[key] == present[key]} == unset | structure
    target.load_state_dict(through_file(source.state_dict()))
    assert_same_bits(target.state_dict(), source.state_dict())


def test_loading_keeps_parameters_and_the_partition() -> None:
    model, optimizer = stepped()
    partition = str(optimizer.partition)
    optimizer.load_state_dict(stepped(seed=1)[1].state_dict())
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert [id(param) for param in held] == [id(param) for param in model.parameters()]
    assert str(optimizer.partition) == partition


def test_loading_an_unstepped_checkpoint_forgets_the_present_state() -> None:
    model, optimizer = stepped()
    optimizer.load_state_dict(stepped(0)[1].state_dict())
    assert not optimizer.state
    model.load_state_dict(small_model().state_dict())
    assert_equal_runs((model, optimizer), stepped(0))


def test_loading_a_group_without_a_newer_key_keeps_the_present_value() -> None:
    _, source = stepped()
    saved = through_file(source.state_dict())
    for group in saved["param_groups"]:
        del group["layer_types"], group["param_names"], group["name"], group["rounding_seed"]
    del saved["param_groups"][0]["cautious"]
    _, target = stepped(trunk_cautious=True, rounding_seed=7)
    names = [group["param_names"] for group in target.param_groups]
    target.load_state_dict(saved)
    assert target.param_groups[0]["cautious"]
    assert [(group["name"], group["rounding_seed"]) for group in target.param_groups] == [("trunk", 7), ("cap", 7)]
    assert [group["param_names"] for group in target.param_groups] == names
    assert_same_bits(target.state_dict()["state"], source.state_dict()["state"])


def test_loading_copies_what_it_is_given() -> None:
    _, source = stepped(lr=torch.tensor(1e-2))
    model, target = stepped(lr=torch.tensor(1e-2), seed=1)
    saved = source.state_dict()
    target.load_state_dict(saved)
    before = snapshot(model, target)
    for group in (*saved["param_groups"], *source.param_groups):
        group["lr"].fill_(7.0)
        group["maximize"] = True
        group["layer_names"] = ("changed",)
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(7.0)
        state["unknown"] = 7.0
    saved["state"].clear()
    assert_same_bits(snapshot(model, target), before)


def test_loading_leaves_the_given_dict_as_it_was() -> None:
    saved = stepped()[1].state_dict()
    before = copy.deepcopy(saved)
    keys = [list(group) for group in saved["param_groups"]]
    stepped(0)[1].load_state_dict(state_dict=saved)
    assert_same_bits(saved, before)
    assert [list(group) for group in saved["param_groups"]] == keys


@pytest.mark.parametrize("entry", [{}, {"step": {}, "exp_avg": {}}], ids=["empty", "of-empty-values"])
def test_state_entry_that_holds_nothing_counts_as_absent(entry: dict[str, Any]) -> None:
    saved = stepped()[1].state_dict()
    saved["state"][0] = entry
    model, optimizer = stepped(2, seed=1)
    optimizer.load_state_dict(saved)
    take_steps(model, optimizer, [3])
    steps = [parameter_state(optimizer, model, name)["step"].item() for name in ("0.weight", "0.bias")]
    assert steps == [1.0, 4.0]


def test_loaded_state_stays_outside_autograd() -> None:
    saved = copy.deepcopy(stepped()[1].state_dict())
    for state in saved["state"].values():
        state["exp_avg"].requires_grad_()
    _, optimizer = stepped(0)
    optimizer.load_state_dict(saved)
    assert not any(state["exp_avg"].requires_grad for state in optimizer.state.values())


def test_loading_turns_lists_back_into_tuples() -> None:
    def listed(value: Any) -> Any:
        return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value

    model, source = stepped()
    saved = source.state_dict()
    groups = [{key: listed(value) for key, value in group.items()} for group in saved["param_groups"]]
    target_model, target = stepped(0)
    target_model.load_state_dict(model.state_dict())
    target.load_state_dict({"state": saved["state"], "param_groups": groups})
    assert {type(group[key]) for group in target.param_groups for key in ("betas", "layer_names", "layer_types")} == {
        tuple
    }
    assert_equal_runs((model, source), (target_model, target))


@pytest.mark.parametrize("last_n_layers", [pytest.param(0, id="all-trunk"), pytest.param(1, id="trunk-and-cap")])
def test_float32_state_on_bfloat16_weights_keeps_its_dtype_and_steps(last_n_layers: int) -> None:
    _, source = stepped(last_n_layers=last_n_layers)
    model, optimizer = built(lambda model: STAC(model, lr=0.1, last_n_layers=last_n_layers), torch.bfloat16)
    optimizer.load_state_dict(through_file(source.state_dict()))
    assert_same_bits(optimizer.state_dict()["state"], source.state_dict()["state"])
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, [3])
    assert parameter_state(optimizer, model, "0.weight")["exp_avg"].dtype is torch.float32
    assert not any(same_bits(before[name], param) for name, param in model.named_parameters())


@pytest.mark.parametrize("path", PATHS[:3], ids=["single", "foreach", "fused"])
def test_bfloat16_state_on_float32_weights_leaves_the_weights_their_precision(path: dict[str, Any]) -> None:
    source_model, source = built(lambda model: STAC(model, lr=0.1), torch.bfloat16)
    take_steps(source_model, source, range(3))
    model, optimizer = stepped(0, **path)
    optimizer.load_state_dict({**source.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    take_steps(model, optimizer, [3])
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name).detach()
        assert not torch.equal(weight, weight.bfloat16().float()), name


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_loaded_state_has_the_memory_format_of_its_parameter(layout: torch.memory_format) -> None:
    def convolutions(memory_format: torch.memory_format) -> tuple[nn.Module, STAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 3, 2)).to(memory_format=memory_format)  # type: ignore[call-overload]
        return model, STAC(model, lr=1e-2)

    model, source = convolutions(torch.contiguous_format)
    take_steps(model, source, range(2))
    other_model, target = convolutions(layout)
    other_model.load_state_dict(model.state_dict())
    target.load_state_dict(source.state_dict())
    for name in ("0.weight", "1.weight"):
        strides = other_model.get_parameter(name).stride()
        state = parameter_state(target, other_model, name)
        assert {value.stride() for key, value in state.items() if key != "step"} == {strides}
    assert_equal_runs((model, source), (other_model, target))


@pytest.mark.parametrize(
    ("flags", "device"),
    [
        pytest.param({}, "cpu", id="plain"),
        pytest.param({"capturable": True}, "meta", id="capturable"),
        pytest.param({"fused": True}, "meta", id="fused"),
    ],
)
def test_loaded_counter_lies_where_the_saved_flags_want_it(flags: dict[str, bool], device: str) -> None:
    saved = stepped()[1].state_dict()
    for group in saved["param_groups"]:
        group.update(flags)
    model = small_model().to("meta")
    optimizer = STAC(model)
    optimizer.load_state_dict(saved)
    states = [parameter_state(optimizer, model, name) for name in ("0.weight", "3.bias")]
    assert [state["step"].device.type for state in states] == [device, device]
    assert [state["exp_avg"].device.type for state in states] == ["meta", "meta"]


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=repr)
def test_loaded_counter_is_a_scalar_float32_tensor(step: Any) -> None:
    saved = stepped()[1].state_dict()
    for state in saved["state"].values():
        state["step"] = step
    model, optimizer = stepped(0)
    optimizer.load_state_dict(saved)
    for name in ("0.weight", "3.weight"):
        assert_same_bits(parameter_state(optimizer, model, name)["step"], torch.tensor(3.0))
