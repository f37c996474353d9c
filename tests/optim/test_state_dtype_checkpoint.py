"""Averages of the trunk in bfloat16 and in 8-bit codes: copied, saved and loaded, and sharded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from stac_optimizer import STAC
from tests.optim.test_state_dtype import KINDS, each_kind
from tests.runs import Run, assert_equal_runs, process_group, stepped, through_file_into
from tests.support import assert_same_bits, parameter_state, take_steps, through_file, wide_model


def _wide(steps: int, kind: torch.dtype | None, **arguments: Any) -> Run:
    return stepped(steps, make=wide_model, trunk_state_dtype=kind, **arguments)


DUPLICATES: dict[str, Callable[[Run], Run]] = {
    "file": lambda held: through_file_into(_wide(2, None, seed=1), held),
    "deepcopy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=list(DUPLICATES))
@pytest.mark.parametrize("arguments", [{}, {"trunk_cautious": True, "weight_decay": 0.1}], ids=["plain", "cautious"])
@each_kind
def test_copied_and_resumed_runs_continue_bit_identically(
    kind: torch.dtype, arguments: dict[str, Any], duplicate: Callable[[Run], Run]
) -> None:
    held = _wide(3, kind, **arguments)
    twin = duplicate(held)
    assert parameter_state(twin[1], twin[0], "1.weight")["exp_avg"].dtype is kind
    assert_equal_runs(held, twin)


def test_checkpoint_of_another_kind_brings_its_own() -> None:
    source = _wide(3, None)
    model, target = _wide(2, torch.int8, seed=1)
    model.load_state_dict(source[0].state_dict())
    target.load_state_dict(through_file(source[1].state_dict()))
    assert target.param_groups[0]["state_dtype"] is None
    assert_equal_runs(source, (model, target))


def test_float_averages_stay_such_where_new_ones_would_be_codes() -> None:
    """As a checkpoint from before there were codes brings them: it steps on, and again from a checkpoint of its own."""
    source = _wide(3, None)
    saved = through_file(source[1].state_dict())
    for group in saved["param_groups"]:
        group.pop("state_dtype", None)
    for absent in ("0.weight", "1.weight"):
        model, target = _wide(2, torch.int8, seed=1)
        model.load_state_dict(source[0].state_dict())
        target.load_state_dict(saved)
        assert target.param_groups[0]["state_dtype"] == "int8"
        take_steps(model, target, [3, 4])
        target.load_state_dict(through_file(target.state_dict()))
        take_steps(model, target, [5])
        state = parameter_state(target, model, absent)
        assert state["exp_avg"].dtype is torch.float32
        assert not state["exp_avg_scale"].any()
    take_steps(*source, [3, 4, 5])
    assert_same_bits(model.state_dict(), source[0].state_dict())


def _state(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"][2].update(values)


REFUSALS = [
    pytest.param(
        lambda saved: saved["state"][2].pop("exp_avg_scale"),
        "state of '1.weight' lacks 'exp_avg_scale'",
        id="codes-without-scales",
    ),
    pytest.param(
        _state(exp_avg=torch.zeros(300, 4, dtype=torch.int8)),
        r"'exp_avg' of '1.weight' has shape \(300, 4\), that of the parameter \(4, 300\)",
        id="codes-of-another-shape",
    ),
    pytest.param(
        _state(exp_avg_scale=torch.zeros(4, 2)),
        r"'exp_avg_scale' of '1.weight' has shape \(4, 2\), that of the parameter \(4, 3\)",
        id="scales-of-another-shape",
    ),
    pytest.param(
        lambda saved: saved["param_groups"][0].update(state_dtype=None),
        "'exp_avg' of '0.weight' is torch.int8, that of the parameter torch.float32",
        id="codes-for-a-group-without",
    ),
    pytest.param(
        lambda saved: saved["state"][3].update(exp_avg=torch.zeros(4, dtype=torch.int8)),
        "'exp_avg' of '1.bias' is torch.int8, that of the parameter torch.float32",
        id="codes-for-short-rows",
    ),
    pytest.param(
        lambda saved: saved["param_groups"][0].update(state_dtype="float16"),
        "group 0: state_dtype must be",
        id="unknown-dtype",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_checkpoint_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    saved = copy.deepcopy(_wide(3, torch.int8)[1].state_dict())
    change(saved)
    model, optimizer = _wide(2, torch.int8, seed=1)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert_equal_runs((model, optimizer), _wide(2, torch.int8, seed=1))


@pytest.mark.parametrize("kind", [None, *KINDS], ids=str)
def test_checkpoint_holds_plain_values(kind: torch.dtype | None) -> None:
    """A full state dict of torch.distributed, and a file in JSON, take a name and no dtype."""
    _, optimizer = _wide(0, kind)
    name = None if kind is None else str(kind).removeprefix("torch.")
    trunk, cap = optimizer.param_groups
    assert trunk["state_dtype"] == name
    assert "state_dtype" not in cap
    by_name = STAC(_wide(0, None)[0], trunk_state_dtype=name)
    assert by_name.param_groups[0]["state_dtype"] == name


def test_codes_want_whole_rows_of_a_sharded_weight(tmp_path: Path) -> None:
    with process_group(tmp_path):
        mesh = init_device_mesh("cpu", (1,))

        def optimizer_of(placement: Shard | Replicate, shape: tuple[int, ...]) -> tuple[nn.Parameter, STAC]:
            weight = nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, [placement]))
            groups = [{"params": [("a.w", weight)], "stac_role": "trunk"}]
            return weight, STAC(groups, lr=0.125, trunk_state_dtype=torch.int8)

        with pytest.raises(
            ValueError, match=r"'a.w' \(trunk\) is sharded within rows, and 8-bit state needs whole ones"
        ):
            optimizer_of(Shard(1), (2, 200))
        for placement, shape in ((Shard(0), (2, 200)), (Replicate(), (2, 200)), (Replicate(), ()), (Shard(0), (5,))):
            weight, optimizer = optimizer_of(placement, shape)
            promised = optimizer.state_bytes()
            weight.grad = DTensor.from_local(torch.ones(shape), mesh, [placement])
            optimizer.step()
            state = optimizer.state[weight]
            scale = state.get("exp_avg_scale")
            assert (scale is not None) == (shape == (2, 200))
            assert scale is None or (isinstance(scale, DTensor) and scale.placements == (placement,))
            assert promised == optimizer.state_bytes() == sum(value.nbytes for value in state.values())
            assert isinstance(weight.data, DTensor)
            assert torch.equal(weight.data.full_tensor(), torch.full(shape, 0.875))
