"""A training loop around STAC: GradScaler, clipping, accumulation, hooks, closures, and what tools read of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from stac_optimizer import STAC
from tests.runs import assert_equal_runs, stepped
from tests.support import (
    assert_same_bits,
    parameter_state,
    seeded_loss,
    set_gradients,
    small_model,
    snapshot,
    take_steps,
)

PATHS = [
    pytest.param({}, id="default"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"error_if_nonfinite": True}, id="error-if-nonfinite"),
    pytest.param({"fused": True}, id="fused"),
    pytest.param({"fused": True, "amsgrad": True, "trunk_cautious": True}, id="fused-amsgrad-cautious"),
    pytest.param({"fused": True, "trunk_momentum": 0.0, "error_if_nonfinite": True}, id="fused-momentum-0"),
    pytest.param({"fused": True, "last_n_layers": 9}, id="fused-all-cap"),
    pytest.param({"fused": True, "last_n_layers": 0, "maximize": True}, id="fused-all-trunk"),
]


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: copy.deepcopy(param.grad) for name, param in model.named_parameters()}


def _backward(model: nn.Module, seed: int, scaler: GradScaler | None = None) -> None:
    model.zero_grad()
    loss = seeded_loss(model, seed)
    (loss if scaler is None else scaler.scale(loss)).backward()


def _scaled_step(optimizer: STAC, scaler: GradScaler) -> None:
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True], ids=["whole", "unscaled-and-clipped"])
@pytest.mark.parametrize("arguments", PATHS)
def test_scaled_run_equals_the_unscaled_one(arguments: dict[str, Any], clip: bool) -> None:
    scaled_model, scaled = stepped(0, **arguments)
    model, optimizer = stepped(0, **arguments)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for seed in range(6):
        _backward(scaled_model, seed, scaler)
        _backward(model, seed)
        if clip:
            scaler.unscale_(scaled)
            for each in (scaled_model, model):
                assert clip_grad_norm_(each.parameters(), 0.1) > 0.1
        given = _gradients(scaled_model)
        _scaled_step(scaled, scaler)
        if arguments.get("fused") or clip:  # otherwise the scaler itself has unscaled them
            assert_same_bits(_gradients(scaled_model), given)
        optimizer.step()
    assert scaler.get_scale() == 2.0**13
    assert_equal_runs((scaled_model, scaled), (model, optimizer))


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
@pytest.mark.parametrize("arguments", PATHS)
def test_scaler_skips_a_step_whole_where_a_gradient_is_not_finite(
    arguments: dict[str, Any], name: str, value: float
) -> None:
    model, optimizer = stepped(0, **arguments)
    scaler = GradScaler("cpu", init_scale=4.0)
    for scale, seed in ((2.0, 0), (1.0, 1)):
        before = snapshot(model, optimizer)
        _backward(model, 9, scaler)
        grad = model.get_parameter(name).grad
        assert grad is not None
        grad.view(-1)[0] = value
        _scaled_step(optimizer, scaler)
        assert scaler.get_scale() == scale
        assert len(optimizer.state) == (0 if seed == 0 else 6)
        assert_same_bits(snapshot(model, optimizer), before)
        _backward(model, seed, scaler)
        _scaled_step(optimizer, scaler)
    unscaled_model, unscaled = stepped(0, **arguments)
    for seed in (0, 1):
        _backward(unscaled_model, seed)
        unscaled.step()
    assert_equal_runs((model, optimizer), (unscaled_model, unscaled))


@pytest.mark.parametrize(
    "flags",
    [(True, True), (True, False), (False, True), (None, None)],
    ids=["both", "trunk-alone", "cap-alone", "neither"],
)
def test_amp_scaling_is_advertised_only_where_every_group_is_fused(flags: tuple[bool | None, bool | None]) -> None:
    def mixed() -> tuple[nn.Module, STAC]:
        model = small_model()
        pairs = list(model.named_parameters())
        groups = [
            {"params": pairs[:4], "stac_role": "trunk", "fused": flags[0]},
            {"params": pairs[4:], "stac_role": "cap", "fused": flags[1]},
        ]
        return model, STAC(groups)

    scaled_model, scaled = mixed()
    assert scaled._step_supports_amp_scaling is (flags == (True, True))
    scaler = GradScaler("cpu", init_scale=2.0**10)
    _backward(scaled_model, 0, scaler)
    _scaled_step(scaled, scaler)
    model, optimizer = mixed()
    _backward(model, 0)
    optimizer.step()
    assert_equal_runs((scaled_model, scaled), (model, optimizer))


def test_step_after_a_scaled_one_takes_gradients_as_they_are() -> None:
    model, optimizer = stepped(0, fused=True)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    _backward(model, 0, scaler)
    _scaled_step(optimizer, scaler)
    before = parameter_state(optimizer, model, "3.bias")["exp_avg"].clone()
    _backward(model, 1)
    optimizer.step()
    grad = model.get_parameter("3.bias").grad
    torch.testing.assert_close(parameter_state(optimizer, model, "3.bias")["exp_avg"], before.lerp(grad, 0.1))


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_], ids=["norm", "value"])
def test_clipped_gradients_are_what_the_step_applies(clip: Callable[[Iterable[Tensor], float], Any]) -> None:
    model, optimizer = stepped(0)
    set_gradients(model, 0)
    clip(model.parameters(), 0.01)
    clipped = _gradients(model)
    optimizer.step()
    assert_same_bits(_gradients(model), clipped)
    for name, grad in clipped.items():
        assert grad is not None
        assert 0 < grad.abs().max() <= 0.01
        torch.testing.assert_close(parameter_state(optimizer, model, name)["exp_avg"], 0.1 * grad)


def test_accumulated_gradients_step_as_their_sum() -> None:
    model, optimizer = stepped(0)
    twin_model, twin = stepped(0)
    for seed in range(0, 6, 2):
        optimizer.zero_grad()
        parts = []
        for part in (seed, seed + 1):
            (seeded_loss(model, part) / 2).backward()
            parts.append(torch.autograd.grad(seeded_loss(twin_model, part) / 2, list(twin_model.parameters())))
        for param, one, other in zip(twin_model.parameters(), *parts, strict=True):
            param.grad = one + other
        optimizer.step()
        twin.step()
    assert_equal_runs((model, optimizer), (twin_model, twin))


def test_zero_grad_to_none_leaves_a_step_without_effect() -> None:
    model, optimizer = stepped(weight_decay=0.1)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)


def test_zero_grad_to_zeros_leaves_a_step_of_the_averages() -> None:
    model, optimizer = stepped(weight_decay=0.1)
    before = parameter_state(optimizer, model, "0.weight")["exp_avg"].clone()
    weight = model.get_parameter("0.weight").detach().clone()
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())
    optimizer.step()
    torch.testing.assert_close(parameter_state(optimizer, model, "0.weight")["exp_avg"], 0.9 * before)
    expected = weight * (1 - 0.0075 * 0.1) - 0.0075 * before.sign()
    torch.testing.assert_close(model.get_parameter("0.weight").detach(), expected)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_closure_is_called_once_with_gradients_and_its_loss_returned(grad_enabled: bool) -> None:
    model, optimizer = stepped(0)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def closure() -> float:
        assert_same_bits(model.state_dict(), before)
        optimizer.zero_grad()
        loss = seeded_loss(model, 0)
        loss.backward()
        calls.append((torch.is_grad_enabled(), loss.item()))
        return loss.item()

    with torch.set_grad_enabled(grad_enabled):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() is grad_enabled
    assert calls == [(True, loss)]
    twin_model, twin = stepped(0)
    _backward(twin_model, 0)
    assert twin.step() is None
    assert_equal_runs((model, optimizer), (twin_model, twin))


@pytest.mark.parametrize("arguments", PATHS)
def test_state_and_weights_stay_outside_autograd(arguments: dict[str, Any]) -> None:
    model, optimizer = stepped(0, **arguments)
    _backward(model, 0)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(value.requires_grad or value.is_inference() for value in held)
    assert all(param.is_leaf and param.requires_grad for param in model.parameters())


def test_step_hooks_surround_the_update_until_they_are_removed() -> None:
    model, optimizer = stepped(0)
    before = copy.deepcopy(model.state_dict())
    seen: list[str] = []

    def note(name: str) -> Any:
        def hook(owner: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert owner is optimizer
            moved = (
                "new" if any(not torch.equal(before[key], value) for key, value in model.state_dict().items()) else ""
            )
            seen.append(moved + name)

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        take_steps(model, optimizer, [0])
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen[:2]) == ["global pre", "pre"]
    assert sorted(seen[2:]) == ["newglobal post", "newpost"]
    take_steps(model, optimizer, [1])
    assert len(seen) == 4


def test_profiler_records_step_and_zero_grad_by_name() -> None:
    model, optimizer = stepped()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        take_steps(model, optimizer, range(2))
        optimizer.zero_grad()
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert counts["Optimizer.step#STAC.step"] == 2
    assert counts["Optimizer.zero_grad#STAC.zero_grad"] == 1


def test_repr_shows_class_roles_and_rates() -> None:
    _, optimizer = stepped(0)
    lines = [line.strip() for line in repr(optimizer).splitlines()]
    assert lines[:2] == ["STAC (", "Parameter Group 0"]
    assert {"stac_role: trunk", "lr: 0.0075", "stac_role: cap", "lr: 0.01"} <= set(lines)


def test_defaults_hold_every_hyperparameter_of_the_groups() -> None:
    _, optimizer = stepped(0, trunk_lr=0.5, weight_decay=0.25)
    assert isinstance(optimizer, Optimizer)
    structure = {"params", "param_names", "stac_role", "name", "rule", "layer_names", "layer_types"}
    held = [set(group) - structure for group in optimizer.param_groups]
    assert held[0] | held[1] == set(optimizer.defaults)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.25)


def test_further_group_without_role_is_refused_and_changes_nothing() -> None:
    model, optimizer = stepped()
    before = snapshot(model, optimizer)
    further = {"params": [nn.Parameter(torch.ones(1))]}
    with pytest.raises(RuntimeError, match=r"does not support add_param_group.*stac_role.*include_frozen=True"):
        optimizer.add_param_group(further)
    assert_same_bits(snapshot(model, optimizer), before)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("arguments", PATHS)
def test_state_bytes_are_those_of_the_table_and_of_the_state_to_come(arguments: dict[str, Any]) -> None:
    model, optimizer = stepped(0, **arguments)
    promised = optimizer.state_bytes()
    assert not optimizer.state
    take_steps(model, optimizer, [0])
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    layers = (*optimizer.partition.trunk_layers, *optimizer.partition.cap_layers)
    assert promised == optimizer.state_bytes() == held == sum(layer.state_bytes or 0 for layer in layers)


def test_state_bytes_know_parameters_without_names() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    groups = [{"params": [param], "stac_role": role} for param, role in zip(params, ("cap", "trunk"), strict=True)]
    assert STAC(groups, lr=0.1).state_bytes() == (4 + 2 * 3 * 4) + (4 + 2 * 2)


def test_state_bytes_are_those_held_where_state_has_another_dtype() -> None:
    model, optimizer = stepped(1)
    before = optimizer.state_bytes()
    state = parameter_state(optimizer, model, "0.weight")
    state["exp_avg"] = state["exp_avg"].double()
    assert optimizer.state_bytes() == before + 4 * 30
