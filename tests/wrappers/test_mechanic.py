"""Mechanic: against the reference of the paper, over every class; what users do to weights and gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.wrappers import Mechanic, mechanize, tuner
from tests.support import assert_same_bits, set_gradients, set_units, small_model, snapshot
from tests.wrappers import reference
from tests.wrappers.support import BASES, stepped

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
SETTINGS: dict[str, Any] = {"s_decay": 0.02, "betas": BETAS[:4], "s_init": 0.05}


def _flat(tensors: Sequence[Tensor]) -> reference.Array:
    parts = [torch.view_as_real(t).reshape(-1) if t.is_complex() else t.reshape(-1) for t in tensors]
    return torch.cat([part.detach().double() for part in parts]).numpy()


def _assert_follows_reference(
    model: nn.Module,
    optimizer: Mechanic,
    twin_model: nn.Module,
    twin: torch.optim.Optimizer,
    *,
    rtol: float,
    steps: int,
) -> None:
    """Step by step: the twin, the base alone, is put where the weights are, and tells the base's update there."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    twins = [param for group in twin.param_groups for param in group["params"]]
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    betas, decay, init = (optimizer.param_groups[0][key] for key in ("s_betas", "s_decay", "s_init"))
    tuner = reference.Mechanic(_flat(params), betas, decay, init)
    for seed in range(steps):
        for each in (model, twin_model):
            set_gradients(each, seed)
        x, g = _flat(params), sign * _flat([p.grad for p in params if p.grad is not None])
        with torch.no_grad():
            for param, other in zip(params, twins, strict=True):
                other.copy_(param)
        twin.step()
        optimizer.step()
        expected = tuner.step(x, g, _flat(twins) - x)
        np.testing.assert_allclose(float(optimizer.scale), tuner.s.sum(), rtol=100 * rtol)
        np.testing.assert_allclose(_flat(params), expected, rtol=rtol, atol=rtol)


def _pair(base: str, kind: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    model, twin_model = small_model(0, dtype), small_model(0, dtype)
    return model, BASES[base](model, kind), twin_model, BASES[base](twin_model, lambda kind: kind)


@pytest.mark.parametrize("base", [name for name in BASES if name != "STAC-int8"])
def test_is_the_papers_algorithm_over_every_class(base: str) -> None:
    pair = _pair(base, lambda kind: mechanize(kind, **SETTINGS))
    _assert_follows_reference(*pair, rtol=1e-11, steps=8)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "STAC"])
@pytest.mark.parametrize("arguments", [{}, {"s_decay": 0.0}, {"store_delta": True}, {"betas": (0.5,), "s_init": 1e-3}])
def test_is_the_papers_algorithm_with_any_arguments(base: str, arguments: dict[str, Any]) -> None:
    pair = _pair(base, lambda kind: mechanize(kind, **arguments))
    _assert_follows_reference(*pair, rtol=1e-11, steps=30)


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.complex128, 1e-11)], ids=str)
def test_other_dtypes(dtype: torch.dtype, rtol: float, store_delta: bool) -> None:
    def made(kind: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (3,))])
        return model, kind(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = made(mechanize(torch.optim.SGD, s_init=0.05, store_delta=store_delta))
    _assert_follows_reference(model, optimizer, *made(torch.optim.SGD), rtol=rtol, steps=12)


def test_maximize_ascends() -> None:
    def made(kind: Any) -> tuple[nn.Module, Any]:
        model = small_model(0, torch.float64)
        return model, kind(model.parameters(), lr=0.1, maximize=True)

    model, optimizer = made(mechanize(torch.optim.AdamW, **SETTINGS))
    _assert_follows_reference(model, optimizer, *made(torch.optim.AdamW), rtol=1e-11, steps=12)


def test_units_of_work_change_rounding_of_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=7, pack=0)
    pair = _pair("AdamW", lambda kind: mechanize(kind, **SETTINGS))
    _assert_follows_reference(*pair, rtol=1e-11, steps=8)


@pytest.mark.parametrize("lr", [1e-3, 1.0])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, STAC], ids=lambda kind: kind.__name__)
def test_float32_and_low_precision_find_the_scale_of_float64(base: Any, lr: float) -> None:
    """From the default s_init, at which (x - x_ref) / s would be noise."""

    def scale(dtype: torch.dtype, **arguments: Any) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
        optimizer = mechanize(base, **arguments)(model if base is STAC else model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            inputs = torch.randn(16, 8, generator=generator, dtype=torch.float64)
            targets = (inputs[:, :1] * inputs[:, 1:2]).tanh()
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs.to(dtype)), targets.to(dtype)).backward()
            optimizer.step()
        return float(optimizer.scale)

    exact = scale(torch.float64)
    assert exact > 1e-6
    assert scale(torch.float32) == pytest.approx(exact, rel=0.02)
    assert scale(torch.float32, store_delta=True) == pytest.approx(exact, rel=0.02)
    if lr == 1.0:  # the base's own steps of less would round to nothing
        assert scale(torch.bfloat16) == pytest.approx(exact, rel=0.5)
        assert scale(torch.bfloat16, store_delta=True) == pytest.approx(exact, rel=0.5)


@pytest.mark.parametrize(("keeps_reference", "ends_at"), [(False, 1.0), (True, 0.98)])
def test_the_reference_keeps_what_bfloat16_would_lose(keeps_reference: bool, ends_at: float) -> None:
    """Moves of a hundredth of a unit in the last place, at a scale that stays."""
    weights, scale = [torch.ones(8, dtype=torch.bfloat16)], torch.tensor(1e-4, dtype=torch.float64)
    states = [[torch.zeros(8)], *([[weights[0].clone()]] if keeps_reference else [])]
    for _ in range(400):
        before = [weights[0].clone()]
        weights[0] -= 0.5
        tuner.move_(weights, before, states, scale, scale)
    assert float(weights[0][0]) == pytest.approx(ends_at, abs=2**-9)


@pytest.mark.parametrize("store_delta", [False, True])
def test_weights_written_between_steps_go_on_from_there(store_delta: bool) -> None:
    """As by clipping of weights: what is written stays, beside what the step adds."""
    ended = []
    for added in (0.0, 0.5):
        model = small_model(0, torch.float64)
        kind = mechanize(torch.optim.SGD, s_init=0.05, s_decay=0.0, store_delta=store_delta)
        optimizer = kind(model.parameters(), lr=0.1)
        stepped((model, optimizer), range(5))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(added)
        stepped((model, optimizer), range(5, 8))
        ended.append([param.detach() - added for param in model.parameters()])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize("base", ["STAC", "Adam"])
def test_parameters_without_gradient_are_left_alone(base: str, store_delta: bool) -> None:
    model = small_model()
    run = model, BASES[base](model, lambda kind: mechanize(kind, s_init=0.3, store_delta=store_delta))
    stepped(run, range(4))
    before = run[0].get_parameter("0.weight").detach().clone()
    delta = run[1].state[run[0].get_parameter("0.weight")]["mechanic_delta"].clone()
    stepped(run, range(4, 8), skip=("0.weight",))
    assert_same_bits(run[0].get_parameter("0.weight").detach(), before)
    assert_same_bits(run[1].state[run[0].get_parameter("0.weight")]["mechanic_delta"], delta)
    stepped(run, [8])
    moved = (run[0].get_parameter("0.weight").detach() - before).abs().max()
    assert 0 < float(moved) < 0.1


def test_decay_holds_the_scale_back() -> None:
    scales = []
    for s_decay in (0.0, 10.0):
        torch.manual_seed(0)
        param = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = mechanize(torch.optim.SGD, s_decay=s_decay, s_init=1e-3)([param], lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            (param - torch.tensor([30.0, -60.0])).square().sum().backward()
            optimizer.step()
        scales.append(float(optimizer.scale))
    assert scales[1] < 0.5 * scales[0]


def test_it_trains_from_any_lr() -> None:
    for lr in (1e-3, 1e3):
        torch.manual_seed(0)
        param = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = mechanize(torch.optim.SGD)([param], lr=lr)
        for _ in range(600):
            optimizer.zero_grad()
            loss = (param * torch.tensor([1.0, 3.0])).square().sum()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 1.0, lr


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = mechanize(torch.optim.SGD, s_init=0.1)(
        [{"params": [p], "lr": lr} for p, lr in zip(params, (1, 3), strict=True)]
    )
    for _ in range(3):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), 3 * params[0].detach())


@pytest.mark.parametrize("base", ["STAC", "STAC-guest", "optim.Lion", "Adam", "Adadelta", "Adafactor", "Rprop"])
@pytest.mark.parametrize("store_delta", [False, True])
def test_the_hidden_step_of_distributed_checkpoints_changes_nothing(base: str, store_delta: bool) -> None:
    model = small_model()
    optimizer = BASES[base](model, lambda kind: mechanize(kind, s_init=0.3, store_delta=store_delta))
    twin = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    assert_same_bits(model.state_dict(), before)
    numbers = {id(n): n for n in (state["mechanic_numbers"] for state in optimizer.state.values())}
    assert [n.tolist() for n in numbers.values()] == [[[0.3] * 6, [0.0] * 6, [0.0] * 6, [0.0] * 6]]
    if base in ("STAC", "optim.Lion"):  # torch's own count that step
        assert_same_bits(snapshot(*stepped((model, optimizer), range(3))), snapshot(*stepped(twin, range(3))))


def test_the_class_is_one_for_the_same_arguments() -> None:
    kind = mechanize(torch.optim.SGD, betas=[0.9, 0.99])
    assert kind is mechanize(torch.optim.SGD, betas=(0.9, 0.99))
    assert kind is not mechanize(torch.optim.SGD)
    assert kind.__name__ == "MechanizedSGD"
    optimizer = kind([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert isinstance(optimizer, Mechanic)
    assert isinstance(optimizer.base, torch.optim.SGD)


def test_nan_is_refused_by_the_base_before_anything_changes() -> None:
    model = small_model()
    optimizer = mechanize(STAC)(model, lr=1.0, error_if_nonfinite=True)
    stepped((model, optimizer), range(3))
    before = snapshot(model, optimizer)
    set_gradients(model, 3)
    model.get_parameter("0.weight").grad[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)
