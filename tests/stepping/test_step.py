"""What a step refuses, before anything has changed and with a message that helps; and what it skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC
from tests.runs import assert_equal_runs, stepped
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, take_steps, wide_model

LAST = "3.bias"


def sparse_gradient(model: nn.Module, name: str) -> None:
    param = model.get_parameter(name)
    param.grad = torch.ones_like(param).to_sparse()


def nan_gradient(model: nn.Module, name: str) -> None:
    param = model.get_parameter(name)
    assert param.grad is not None
    param.grad[-1] = torch.nan


def infinite_gradient(model: nn.Module, name: str) -> None:
    param = model.get_parameter(name)
    assert param.grad is not None
    param.grad[0] = -torch.inf


REFUSALS = [
    pytest.param({}, sparse_gradient, LAST, ["'3.bias'", "cap", "sparse", "dense"], id="sparse-in-cap"),
    pytest.param({}, sparse_gradient, "1.weight", ["'1.weight'", "trunk", "sparse=False"], id="sparse-in-trunk"),
    pytest.param(
        {"error_if_nonfinite": True},
        nan_gradient,
        LAST,
        ["non-finite gradients: ", "'3.bias'", "cap", "NaN", "error_if_nonfinite"],
        id="nan-in-cap",
    ),
    pytest.param({"error_if_nonfinite": True}, nan_gradient, "0.weight", ["'0.weight'", "trunk"], id="nan-in-trunk"),
    pytest.param({"error_if_nonfinite": True}, infinite_gradient, LAST, ["'3.bias'", "infinity"], id="infinity-in-cap"),
    pytest.param(
        {"error_if_nonfinite": True}, sparse_gradient, LAST, ["'3.bias'", "sparse"], id="sparse-where-finite-is-asked"
    ),
]


@pytest.mark.parametrize("steps_before", [0, 2], ids=["fresh", "stepped"])
@pytest.mark.parametrize(("arguments", "spoil", "name", "words"), REFUSALS)
def test_refused_gradient_changes_nothing(
    arguments: dict[str, Any], spoil: Callable[[nn.Module, str], None], name: str, words: list[str], steps_before: int
) -> None:
    model = small_model()
    optimizer = STAC(model, weight_decay=0.1, **arguments)
    take_steps(model, optimizer, range(steps_before))
    set_gradients(model, 9)
    spoil(model, name)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)
    assert all(word in str(raised.value) for word in [*words, "Nothing was changed"]), str(raised.value)
    set_gradients(model, 9)
    optimizer.step()
    assert not torch.equal(model.get_parameter("0.weight"), before[0]["0.weight"])


@pytest.mark.parametrize(
    ("dtype", "arguments", "words"),
    [
        pytest.param(torch.complex64, {"fused": True}, ["complex64", "fused=False"], id="fused-complex"),
        pytest.param(torch.float32, {"capturable": True}, ["'cpu'", "capturable=False"], id="capturable-on-the-cpu"),
    ],
)
def test_what_torch_adamw_would_assert_late_is_refused_first(
    dtype: torch.dtype, arguments: dict[str, Any], words: list[str]
) -> None:
    trunk, cap = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=dtype))
    groups = [{"params": [("a.w", trunk)], "stac_role": "trunk"}, {"params": [("b.w", cap)], "stac_role": "cap"}]
    optimizer = STAC(groups, **arguments)
    trunk.grad, cap.grad = torch.ones_like(trunk), torch.ones_like(cap)
    with pytest.raises(RuntimeError, match=r"'b.w' \(cap\)") as raised:
        optimizer.step()
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert torch.equal(trunk, torch.ones(2))
    assert not optimizer.state


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_gradient_of_another_dtype_moves_the_trunk_and_is_refused_in_the_cap() -> None:
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    for param in params:
        param.grad_dtype = torch.float32
        param.grad = torch.tensor([1.0, -1.0])
    optimizer = STAC([{"params": [("a.w", params[0])], "stac_role": "trunk"}], lr=0.5)
    optimizer.step()
    assert params[0].tolist() == [0.5, 1.5]
    optimizer = STAC([{"params": [("b.w", params[1])], "stac_role": "cap"}], lr=0.5)
    with pytest.raises(RuntimeError, match=r"'b.w' \(cap\) is torch.bfloat16 and its gradient torch.float32"):
        optimizer.step()


def test_unnamed_parameter_is_named_by_group_and_position() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": params[:1], "stac_role": "trunk"}, {"params": params[1:], "stac_role": "cap"}]
    optimizer = STAC(groups, error_if_nonfinite=True)
    params[2].grad = torch.tensor([1.0, torch.nan])
    with pytest.raises(RuntimeError, match=r"'<group 1>\.1' \(cap\)"):
        optimizer.step()


def test_finite_check_knows_huge_gradients_from_infinite_ones() -> None:
    model = small_model()
    optimizer = STAC(model, error_if_nonfinite=True)
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.finfo(torch.float32).max)
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_finite_check_handles_empty_complex_and_mixed_parameters() -> None:
    params = [
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(torch.ones(2, dtype=torch.complex64)),
        nn.Parameter(torch.ones((), dtype=torch.float64)),
        nn.Parameter(torch.full((2,), 0.01, dtype=torch.bfloat16)),
    ]
    optimizer = STAC([{"params": params, "stac_role": "trunk", "error_if_nonfinite": True}], lr=0.01)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[1].grad = torch.tensor([1.0, complex(0.0, torch.inf)])
    with pytest.raises(RuntimeError, match=r"'<group 0>\.1'"):
        optimizer.step()


def test_finite_check_looks_only_at_groups_that_ask() -> None:
    checked, unchecked = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [
        {"params": [checked], "stac_role": "trunk", "error_if_nonfinite": True},
        {"params": [unchecked], "stac_role": "cap"},
    ]
    optimizer = STAC(groups)
    checked.grad, unchecked.grad = torch.ones(2), torch.full((2,), torch.nan)
    optimizer.step()
    assert checked.isfinite().all()
    assert unchecked.isnan().all()


def test_absent_gradient_skips_decay_too() -> None:
    model = small_model()
    optimizer = STAC(model, weight_decay=0.5)
    set_gradients(model, 0, skip={"0.weight", "3.weight"})
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == set(before) - {"0.weight", "3.weight"}


def test_parameter_frozen_in_mid_run_keeps_its_state() -> None:
    model = small_model()
    optimizer = STAC(model)
    take_steps(model, optimizer, [0, 1])
    weight = model.get_parameter("0.weight")
    weight.requires_grad_(False)
    weight.grad = None
    before = snapshot(model, optimizer)
    take_steps(model, optimizer, [2])
    assert torch.equal(weight, before[0]["0.weight"])
    assert optimizer.state[weight]["step"] == 2
    weight.requires_grad_(True)
    take_steps(model, optimizer, [3])
    assert optimizer.state[weight]["step"] == 3


def test_step_without_any_gradient_changes_nothing() -> None:
    model = small_model()
    optimizer = STAC(model, weight_decay=0.5, error_if_nonfinite=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    assert_same_bits(model.state_dict(), before)


def test_hyperparameter_of_a_group_may_be_changed_between_steps() -> None:
    """Momentum and amsgrad switched on later find no state: it starts at zero, as on a first step."""
    model = small_model()
    optimizer = STAC(model, trunk_momentum=0.0)
    take_steps(model, optimizer, [0])
    trunk, cap = optimizer.param_groups
    trunk["momentum"], cap["amsgrad"] = 0.5, True
    set_gradients(model, 1)
    optimizer.step()
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    assert torch.equal(optimizer.state[weight]["exp_avg"], weight.grad * 0.5)
    assert "max_exp_avg_sq" in optimizer.state[model.get_parameter("3.weight")]


def test_differentiable_step_of_a_leaf_is_refused_first() -> None:
    model = small_model()
    optimizer = STAC(model, differentiable=True)
    set_gradients(model, 0)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'0.weight' \(trunk\) is a leaf .* give clones. Nothing was changed"):
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)


def test_expanded_parameter_is_refused_at_construction() -> None:
    """A step could not write to it, and would find that out after others had moved."""
    expanded = nn.Parameter(torch.ones(1).expand(3))
    with pytest.raises(ValueError, match=r"'b.w' is expanded: several elements share memory; pass a clone"):
        STAC([("a.w", nn.Parameter(torch.ones(3))), ("b.w", expanded)])


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_scaled_float16_gradients_are_unscaled_in_float32(role: str) -> None:
    """Back in float16 they would underflow, which the scale was there to prevent."""
    gradient = torch.tensor([1e-3, 2e-3, -4e-3, 1.0], dtype=torch.float16)
    ours, theirs = (nn.Parameter(torch.full((4,), 0.5, dtype=torch.float16)) for _ in range(2))
    optimizer: Any = STAC([{"params": [("h.w", ours)], "stac_role": role}], lr=1e-2, fused=True)
    adamw: Any = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0, fused=True)
    for param, scaled in ((ours, optimizer), (theirs, adamw)):
        param.grad = gradient.clone()
        scaled.grad_scale, scaled.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
        scaled.step()
    assert ours.grad is not None
    assert torch.equal(ours.grad, gradient)
    if role == "cap":
        assert_same_bits(ours.detach(), theirs.detach())
    else:
        assert torch.equal(ours.detach(), 0.5 - 0.01 * torch.sign(gradient))


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        pytest.param(torch.float32, {}, id="default"),
        pytest.param(torch.float32, {"foreach": True}, id="foreach"),
        pytest.param(torch.float32, {"trunk_cautious": True}, id="cautious"),
        pytest.param(torch.float32, {"trunk_state_dtype": torch.int8}, id="int8"),
        pytest.param(torch.bfloat16, {"stochastic_rounding": True, "trunk_cautious": True}, id="rounding"),
    ],
)
def test_default_device_of_new_tensors_does_not_matter(dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    """What a step makes for itself lies with the weights, wherever else a model is being built."""
    runs = [stepped(1, dtype=dtype, make=wide_model, **arguments) for _ in range(2)]
    for model, _ in runs:
        set_gradients(model, 1)
    runs[0][1].step()
    with torch.device("meta"):
        runs[1][1].step()
    assert_equal_runs(*runs)


def test_hidden_step_that_makes_state_is_not_counted() -> None:
    """torch.distributed.checkpoint takes it with lr 0 and zero gradients; to count it would shift AdamW."""
    models = [small_model(), small_model()]
    optimizers = [STAC(model) for model in models]
    rates = [group["lr"] for group in optimizers[0].param_groups]
    for param in models[0].parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0
    optimizers[0].step()
    assert all(state["step"] == 0 and "exp_avg" in state for state in optimizers[0].state.values())
    for group, lr in zip(optimizers[0].param_groups, rates, strict=True):
        group["lr"] = lr
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(3))
    assert_same_bits(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]))


def test_first_step_at_lr_zero_with_gradients_is_counted() -> None:
    """As a warm-up begins: the averages fill."""
    model = small_model()
    optimizer = STAC(model, lr=0.0)
    take_steps(model, optimizer, [0])
    assert all(state["step"] == 1 and state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("arguments", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("last_n_layers", [0, 1])
def test_layout_may_change_between_steps(last_n_layers: int, arguments: dict[str, Any]) -> None:
    """State keeps the layout it was made in; kernels that walk memory must not pair the wrong elements."""
    runs = []
    for converts in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        optimizer = STAC(model, lr=0.1, last_n_layers=last_n_layers, **arguments)
        take_steps(model, optimizer, [0])
        if converts:
            model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
        take_steps(model, optimizer, [1, 2])
        runs.append({name: value.contiguous() for name, value in model.state_dict().items()})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_refused_step_takes_what_a_scaler_handed_over() -> None:
    """torch takes it away after a step that succeeds alone, and would multiply the next scale by what was left."""
    model = small_model()
    optimizer = STAC(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter = model.get_parameter("3.bias")
    for is_sparse in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).sum()).backward()
        if is_sparse:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.to_sparse()
            with pytest.raises(RuntimeError, match="layout"):
                scaler.step(optimizer)
            assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
    # The gradient of a bias under a sum over two rows is 2, and a tenth of it enters the average.
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full((3,), 0.2))
