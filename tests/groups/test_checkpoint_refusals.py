"""Loading what does not fit: one error that names the first difference, and an optimizer that is as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, named
from tests.runs import assert_equal_runs, stepped
from tests.support import assert_same_bits, small_model, snapshot, take_steps

Change = Callable[[dict[str, Any]], Any]


def _assert_refused(saved: Any, error: type[Exception], message: str, **arguments: Any) -> None:
    model, optimizer = stepped(2, seed=1, **arguments)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(model, optimizer), before)
    assert_equal_runs((model, optimizer), stepped(2, seed=1, **arguments))


def _linear(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)))


def _wide_norm() -> nn.Sequential:
    """The names of the small model, another shape in "1"."""
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm((3, 5)), nn.Tanh(), nn.Linear(5, 3))


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.bias = nn.Parameter(torch.zeros(5))


def _renamed() -> nn.Sequential:
    """The small model with one parameter under another name."""
    return nn.Sequential(nn.Linear(6, 5), _Norm(), nn.Tanh(), nn.Linear(5, 3))


def _unnamed_groups() -> STAC:
    weights = list(small_model().parameters())
    return STAC([{"params": weights[:4], "stac_role": "trunk"}, {"params": weights[4:], "stac_role": "cap"}])


OTHERS = [
    pytest.param(
        lambda: STAC(_linear(6, 5, 4, 3, 2)),
        "group 0: layer_names: '2' is only in the checkpoint",
        id="more-layers",
    ),
    pytest.param(lambda: STAC(_linear(6, 3)), "checkpoint has 1 parameter groups, this optimizer 2", id="one-layer"),
    pytest.param(
        lambda: STAC(_linear(6, 5, 3), last_n_layers=2),
        "checkpoint has 1 parameter groups, this optimizer 2.* build the optimizer with the arguments it had",
        id="one-role",
    ),
    pytest.param(
        lambda: STAC(small_model(), last_n_layers=2),
        "group 0: layer_names: '1' is not in it",
        id="another-split",
    ),
    pytest.param(
        lambda: STAC(small_model(), cap=named("1")),
        r"group 0: layer_names\[1\] is '3' in the checkpoint, '1' in this optimizer",
        id="another-cap",
    ),
    pytest.param(
        lambda: STAC(_renamed()),
        r"group 0: param_names\[2\] is '1.gain' in the checkpoint, '1.weight' in this optimizer",
        id="another-parameter-name",
    ),
    pytest.param(_unnamed_groups, "group 0: layer_names: '0' is not in it", id="groups-without-names"),
    pytest.param(
        lambda: torch.optim.AdamW(small_model().named_parameters()),
        "have no stac_role: it is an AdamW's. .*load_adamw_state_dict",
        id="AdamW",
    ),
]


@pytest.mark.parametrize(("build", "message"), OTHERS)
def test_checkpoint_of_another_optimizer_is_refused(build: Callable[[], torch.optim.Optimizer], message: str) -> None:
    _assert_refused(build().state_dict(), ValueError, message)


def test_checkpoint_of_the_other_role_is_refused() -> None:
    _, all_cap = stepped(last_n_layers=9)
    message = "group 0: stac_role is 'cap' in the checkpoint, 'trunk' in this optimizer"
    _assert_refused(all_cap.state_dict(), ValueError, message, last_n_layers=0)


@pytest.mark.parametrize("steps", [0, 1])
def test_checkpoint_of_adamw_is_refused_where_the_number_of_groups_agrees(steps: int) -> None:
    model = small_model()
    adamw = torch.optim.AdamW(model.named_parameters())
    take_steps(model, adamw, range(steps))
    message = "have no stac_role: it is an AdamW's. .*load_adamw_state_dict"
    _assert_refused(adamw.state_dict(), ValueError, message, last_n_layers=9)


def test_checkpoint_with_names_is_refused_by_groups_without() -> None:
    optimizer = _unnamed_groups()
    _, source = stepped()
    with pytest.raises(ValueError, match="group 0: layer_names: '0' is only in the checkpoint"):
        optimizer.load_state_dict(source.state_dict())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"group 0: param_names is .* in the checkpoint, None in this optimizer"):
        optimizer.load_state_dict(saved)


def test_checkpoint_of_other_shapes_is_refused() -> None:
    model = _wide_norm()
    optimizer = STAC(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    message = r"'exp_avg' of '1.weight' has shape \(3, 5\), that of the parameter \(5,\)"
    _assert_refused(optimizer.state_dict(), ValueError, message)


def _group(**values: Any) -> Change:
    return lambda saved: saved["param_groups"][1].update(values)


def _state(number: int, **values: Any) -> Change:
    return lambda saved: saved["state"][number].update(values)


def _row(name: str, change: Change, message: str, error: type[Exception] = ValueError) -> Any:
    def changed(saved: dict[str, Any]) -> dict[str, Any]:
        change(saved)
        return saved

    return pytest.param(changed, error, message, id=name)


CHANGES = [
    _row("no-state", lambda saved: saved.pop("state"), "must hold 'state' and 'param_groups'"),
    _row("no-groups", lambda saved: saved.pop("param_groups"), "must hold 'state' and 'param_groups'"),
    _row("state-is-None", lambda saved: saved.update(state=None), "state must be", TypeError),
    _row("groups-are-None", lambda saved: saved.update(param_groups=None), "param_groups must be", TypeError),
    _row("group-is-a-number", lambda saved: saved["param_groups"].insert(0, 3), "must be a dict, got int", TypeError),
    _row("fewer-groups", lambda saved: saved["param_groups"].pop(), "has 1 parameter groups, this optimizer 2"),
    _row("more-groups", lambda saved: saved["param_groups"].append({}), "has 3 parameter groups, this optimizer 2"),
    _row("no-params", lambda saved: saved["param_groups"][1].pop("params"), "group 1: params must be a list, got None"),
    _row("fewer-params", _group(params=[4]), "group 1: it has 1 parameters, this optimizer's 2"),
    _row("more-params", _group(params=[4, 5, 6]), "group 1: it has 3 parameters, this optimizer's 2"),
    _row("params-twice", _group(params=[4, 4]), "5"),
    _row("another-role", _group(stac_role="trunk"), "group 1: stac_role is 'trunk' in the checkpoint, 'cap' in this"),
    _row("another-rule", _group(rule="lion"), "group 1: rule is 'lion' in the checkpoint, 'adamw' in this optimizer"),
    _row("no-layer-names", _group(layer_names=None), r"group 1: layer_names is None in the checkpoint, \('3',\) in"),
    _row("other-layer-names", _group(layer_names=("4",)), r"group 1: layer_names\[0\] is '4' in the check.*, '3' in"),
    _row("more-layer-names", _group(layer_names=("3", "4")), "group 1: layer_names: '4' is only in the checkpoint"),
    _row("fewer-layer-names", _group(layer_names=()), "group 1: layer_names: '3' is not in it"),
    _row("other-param-names", _group(param_names=["3.weight", "3.b"]), r"group 1: param_names\[1\] is '3.b' in"),
    _row("fewer-param-names", _group(param_names=["3.weight"]), "group 1: param_names: '3.bias' is not in it"),
    _row("lr-nan", _group(lr=math.nan), r"group 1: lr must be a finite number in \[0, inf\), got nan"),
    _row("lr-negative", _group(lr=-0.1), "group 1: lr must be .* got -0.1"),
    _row("lr-infinite", _group(lr=math.inf), "group 1: lr must be .* got inf"),
    _row("lr-tensor-nan", _group(lr=torch.tensor(math.nan)), "group 1: lr must be .* got nan"),
    _row("lr-tensor-of-two", _group(lr=torch.ones(2)), r"group 1: lr as a tensor must have one element, got.*\(2,\)"),
    _row(
        "lr-tensor-of-int", _group(lr=torch.tensor(1)), "group 1: lr as a tensor must be .*, got torch.int64", TypeError
    ),
    _row("lr-string", _group(lr="0.1"), "group 1: lr must be .* got '0.1' of type str", TypeError),
    _row("decay-nan", _group(weight_decay=math.nan), "group 1: weight_decay must be .* got nan"),
    _row(
        "momentum-one",
        lambda saved: saved["param_groups"][0].update(momentum=1.0),
        r"group 0: momentum must be a number in \[0, 1\), got 1.0",
    ),
    _row("betas-nan", _group(betas=(0.9, math.nan)), r"group 1: betas\[1\] must be .* got nan"),
    _row("betas-of-three", _group(betas=(0.9, 0.9, 0.9)), "group 1: betas must be a tuple of two numbers"),
    _row("betas-number", _group(betas=0.9), "group 1: betas must be a tuple of two .* of type float", TypeError),
    _row("eps-negative", _group(eps=-1e-8), "group 1: eps must be .* got -1e-08"),
    _row("amsgrad-number", _group(amsgrad=1), "group 1: amsgrad must be True or False, got 1", TypeError),
    _row("foreach-string", _group(foreach="no"), "group 1: foreach must be True, False or None, got 'no'", TypeError),
    _row("foreach-and-fused", _group(foreach=True, fused=True), "group 1: fused and .*foreach exclude each other"),
    _row(
        "foreach-tensor-lr", _group(foreach=True, lr=torch.tensor(0.1)), "group 1: lr as a tensor with .*foreach=True"
    ),
    _row("unknown-parameter", lambda saved: saved["state"].update({9: {}}), "state for 9, which is in none of its"),
    _row(
        "state-entry-is-None",
        lambda saved: saved["state"].update({0: None}),
        "state of parameter 0 must be a dict",
        TypeError,
    ),
    _row("no-exp-avg", lambda saved: saved["state"][0].pop("exp_avg"), "state of '0.weight' lacks 'exp_avg'"),
    _row("no-exp-avg-sq", lambda saved: saved["state"][5].pop("exp_avg_sq"), "state of '3.bias' lacks 'exp_avg_sq'"),
    _row("no-trunk-step", lambda saved: saved["state"][0].pop("step"), "state of '0.weight' lacks 'step'"),
    _row("no-cap-step", lambda saved: saved["state"][4].pop("step"), "state of '3.weight' lacks 'step'"),
    _row("no-max-exp-avg-sq", _group(amsgrad=True), "state of '3.weight' lacks 'max_exp_avg_sq'"),
    _row("step-of-two", _state(4, step=torch.ones(2)), "'step' of '3.weight'", TypeError),
    _row("step-string", _state(4, step="many"), "'step' of '3.weight'", TypeError),
    _row("step-None", _state(4, step=None), "'step' of '3.weight'", TypeError),
    _row("step-nan", _state(4, step=torch.tensor(math.nan)), "'step' of '3.weight'"),
    _row("step-negative", _state(4, step=torch.tensor(-1.0)), "'step' of '3.weight'"),
    _row(
        "other-shape",
        _state(1, exp_avg=torch.ones(1, 5)),
        r"'exp_avg' of '0.bias' has shape \(1, 5\), that of the parameter \(5,\)",
    ),
    _row("no-tensor", _state(1, exp_avg=0.5), "'exp_avg' of '0.bias' has shape float, that of the parameter"),
    _row("integer-state", _state(1, exp_avg=torch.ones(5, dtype=torch.int64)), "'exp_avg' of '0.bias' .*int64"),
    _row("complex-state", _state(1, exp_avg=torch.ones(5) * 1j), "'exp_avg' of '0.bias' .*complex64"),
    _row("unknown-state", _state(1, momentum=torch.ones(5)), "'momentum' of '0.bias' is no state of the rule 'signum'"),
    _row("state-of-the-other-rule", _state(1, exp_avg_sq=torch.ones(5)), "'exp_avg_sq' of '0.bias' is no state of"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES)
def test_changed_checkpoint_is_refused(change: Change, error: type[Exception], message: str) -> None:
    _assert_refused(change(copy.deepcopy(stepped()[1].state_dict())), error, message)


@pytest.mark.parametrize("saved", [None, 3, "path.pt", [], (), torch.ones(1)], ids=lambda saved: type(saved).__name__)
def test_loading_something_else_than_a_dict_is_refused(saved: Any) -> None:
    _assert_refused(saved, TypeError, f"state_dict must be a dict, got {type(saved).__name__}")


def test_state_of_a_hyperparameter_switched_off_is_dropped() -> None:
    expected = stepped()[1].state_dict()
    saved = copy.deepcopy(expected)
    saved["state"][4]["max_exp_avg_sq"] = torch.ones(3, 5)
    _, optimizer = stepped(seed=1)
    optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.state_dict(), expected)


def test_keys_that_frameworks_add_are_loaded() -> None:
    saved = copy.deepcopy(stepped()[1].state_dict())
    for index, group in enumerate(saved["param_groups"]):
        group["of_a_framework"] = index
    _, optimizer = stepped(seed=1)
    optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.state_dict(), saved)
