"""Coming from somewhere else: checkpoints of 0.3.0, and the state of an AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, biases, named, norms, vectors
from stac_optimizer.optim import AdamW, Lion
from tests.support import assert_same_bits, same_bits, set_gradients, small_model, snapshot, take_steps

DATA = Path(__file__).parents[1] / "data"
NO_DECAY = [(vectors() | biases(), {"weight_decay": 0.0})]
# By file the arguments with which a STAC of now has the same groups.
FILES_OF_0_3_0: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "decay-maximize": {"overrides": NO_DECAY},
    "three-cap-layers-amsgrad": {"last_n_layers": 3},
}


def recorded(name: str) -> Any:
    return torch.load(DATA / f"stac-0.3.0-{name}.pt", weights_only=True)


def old_model(weights: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", FILES_OF_0_3_0)
def test_run_of_0_3_0_goes_on(name: str, path: dict[str, Any]) -> None:
    saved = recorded(name)
    model = old_model(saved["model_before"])
    optimizer = STAC(model, **FILES_OF_0_3_0[name])
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:
        group.update({"foreach": None, **path})
    for gradients in saved["next_gradients"]:
        for key, param in model.named_parameters():
            param.grad = gradients[key].clone()
        optimizer.step()
    trunk = {name for group in optimizer.param_groups if group["stac_role"] == "trunk" for name in group["param_names"]}
    for key, param in model.named_parameters():
        if key in trunk:
            assert same_bits(param, saved["model_after"][key]), key
        else:
            torch.testing.assert_close(param.detach(), saved["model_after"][key], rtol=0, atol=1e-6)


def test_mixed_decay_of_0_3_0_names_the_override() -> None:
    saved = recorded("decay-maximize")
    model = old_model(saved["model_before"])
    optimizer = STAC(model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"overrides=\[\(vectors\(\) \| biases\(\), \{'weight_decay': 0.0\}\)\]"):
        optimizer.load_state_dict(saved["optimizer"])
    assert_same_bits(snapshot(model, optimizer), before)


def test_other_split_of_0_3_0_is_refused_with_the_layers_it_had() -> None:
    saved = recorded("three-cap-layers-amsgrad")
    with pytest.raises(ValueError, match="give last_n_layers=3"):
        STAC(old_model(saved["model_before"])).load_state_dict(saved["optimizer"])
    with pytest.raises(ValueError, match=r"'1.weight' is in the checkpoint of 0.3.0 and not in this optimizer"):
        STAC(nn.Sequential(nn.Linear(6, 5)), last_n_layers=0).load_state_dict(saved["optimizer"])


def adamw_run(model: nn.Module, steps: int = 3, **arguments: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **arguments)
    take_steps(model, optimizer, range(steps))
    return optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_of_adamw_is_carried_over(amsgrad: bool) -> None:
    model = small_model()
    adamw = adamw_run(model, amsgrad=amsgrad)
    optimizer = STAC(model, lr=0.1, amsgrad=amsgrad)
    optimizer.load_adamw_state_dict(adamw.state_dict(), model)
    for name, param in model.named_parameters():
        held, theirs = optimizer.state[param], adamw.state[param]
        wanted = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"] if name.startswith("3") else ["exp_avg", "step"]
        assert sorted(held) == [key for key in sorted(wanted) if key in theirs]
        for key, value in held.items():
            assert same_bits(value, theirs[key])
            assert value.data_ptr() != theirs[key].data_ptr()
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_cap_goes_on_as_adamw_to_the_bit() -> None:
    model, twin = small_model(), small_model()
    adamw_run(twin)
    adamw = adamw_run(model)
    optimizer = STAC(twin, cap_lr=0.01, cap_weight_decay=0.01)
    optimizer.load_adamw_state_dict(adamw.state_dict(), twin)
    for run_model, run in ((model, adamw), (twin, optimizer)):
        take_steps(run_model, run, range(5, 8))
    assert_same_bits(model[3].state_dict(), twin[3].state_dict())
    assert not torch.equal(model.get_parameter("0.weight"), twin.get_parameter("0.weight"))


def test_groups_of_adamw_are_told_apart_by_names_or_by_the_order_given() -> None:
    model = small_model()
    pairs = list(model.named_parameters())
    decaying, others = [pair for pair in pairs if pair[1].ndim > 1], [pair for pair in pairs if pair[1].ndim < 2]
    for has_names in (True, False):
        some = [[pair if has_names else pair[1] for pair in part] for part in (decaying, others)]
        groups: list[dict[str, Any]] = [{"params": some[0]}, {"params": some[1], "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups)
        take_steps(model, adamw, range(2))
        optimizer = STAC(model)
        optimizer.load_adamw_state_dict(adamw.state_dict(), model if has_names else [*decaying, *others])
        for _, param in pairs:
            assert same_bits(optimizer.state[param]["exp_avg"], adamw.state[param]["exp_avg"])
    with pytest.raises(ValueError, match=r"2 groups without names.*group by group"):
        optimizer.load_adamw_state_dict(adamw.state_dict(), model)


def test_lion_takes_the_average_and_8_bit_trunks_keep_it_as_it_came() -> None:
    model = nn.Sequential(nn.Linear(128, 4), nn.Linear(4, 3))
    adamw = adamw_run(model)
    for arguments in ({"trunk_optimizer": Lion}, {"trunk_state_dtype": "int8"}):
        optimizer = STAC(model, **arguments)
        optimizer.load_adamw_state_dict(adamw.state_dict(), model)
        weight = model.get_parameter("0.weight")
        assert same_bits(optimizer.state[weight]["exp_avg"], adamw.state[weight]["exp_avg"])
        take_steps(model, optimizer, [9])


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = small_model()
    saved = adamw_run(model).state_dict()
    optimizer = STAC(model)
    before = snapshot(model, optimizer)
    other = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        (saved, nn.Linear(2, 2), ValueError, "6 parameters, the model 2"),
        (adamw_run(other).state_dict(), model, ValueError, "has shape"),
        (optimizer.state_dict(), model, ValueError, "is a STAC's"),
        ({"state": {}}, model, ValueError, "must hold 'state' and 'param_groups'"),
        (saved, list(model.parameters()), TypeError, "must be a module, or"),
        ("saved", model, TypeError, "state_dict must be a dict"),
    ]
    for state_dict, owner, error, message in bad:
        with pytest.raises(error, match=message):
            optimizer.load_adamw_state_dict(state_dict, owner)
    assert_same_bits(snapshot(model, optimizer), before)
    with pytest.raises(ValueError, match="foreign optimizer"):
        STAC(model, trunk_optimizer=torch.optim.SGD).load_adamw_state_dict(saved, model)


def test_adamws_checkpoint_in_load_state_dict_names_the_way() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"it is an AdamW's.*load_adamw_state_dict"):
        STAC(model).load_state_dict(adamw_run(model).state_dict())


def test_drop_in_adamw_loads_torchs_checkpoint_and_back() -> None:
    model, twin = small_model(), small_model()
    theirs, ours = adamw_run(model), AdamW(twin.parameters(), lr=0.5)
    twin.load_state_dict(model.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for seed in range(5, 7):
        for run_model, run in ((model, theirs), (twin, ours)):
            set_gradients(run_model, seed)
            run.step()
    assert_same_bits(model.state_dict(), twin.state_dict())
    back = torch.optim.AdamW(twin.parameters())
    back.load_state_dict(ours.state_dict())
    take_steps(model, theirs, [9])
    take_steps(twin, back, [9])
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_layers_in_both_roles_are_checked_by_parameter_names() -> None:
    model = small_model()
    saved = STAC(model, cap=vectors()).state_dict()
    STAC(small_model(), cap=vectors()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"layer_names|param_names"):
        STAC(model, cap=named("3") | norms()).load_state_dict(saved)
