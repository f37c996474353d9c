"""Lookahead and Scout: against their references; slow weights to evaluate with."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stac_optimizer import STAC
from stac_optimizer.wrappers import Lookahead, Scout, mechanize
from tests.support import assert_same_bits, seeded_loss, set_gradients, small_model
from tests.wrappers import reference
from tests.wrappers.support import BASES, stepped

KINDS = {"Lookahead": Lookahead, "Scout": Scout}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def _arrays(model: nn.Module) -> list[reference.Array]:
    return [param.detach().double().numpy().copy() for param in model.parameters()]


def _put(model: nn.Module, arrays: list[reference.Array]) -> None:
    with torch.no_grad():
        for param, array in zip(model.parameters(), arrays, strict=True):
            param.copy_(torch.from_numpy(array))


def _twins(base: str, wrap: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    model, twin = small_model(0, dtype), small_model(0, dtype)
    return model, wrap(BASES[base](model, lambda kind: kind)), twin, BASES[base](twin, lambda kind: kind)


@pytest.mark.parametrize("base", BASES)
def test_lookahead_is_the_papers_algorithm(base: str) -> None:
    """To the bit but for the synchronizations, which torch computes as a difference from the nearer end."""
    model, optimizer, twin, plain = _twins(base, lambda each: Lookahead(each, 0.3, 3))
    references = [reference.Lookahead(array, 0.3, 3) for array in _arrays(twin)]
    for seed in range(7):
        for each in (model, twin):
            set_gradients(each, seed)
        optimizer.step()
        plain.step()
        _put(twin, [ref.step(array) for ref, array in zip(references, _arrays(twin), strict=True)])
        for ours, theirs in zip(_arrays(model), _arrays(twin), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        _put(twin, _arrays(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lookahead_in_other_precisions(dtype: torch.dtype) -> None:
    model, optimizer, twin, plain = _twins("SGD", lambda each: Lookahead(each, 0.5, 2), dtype)
    slow = [param.detach().clone() for param in twin.parameters()]
    for seed in range(6):
        for each in (model, twin):
            set_gradients(each, seed)
        optimizer.step()
        plain.step()
        if seed % 2:
            with torch.no_grad():
                for phi, param in zip(slow, twin.parameters(), strict=True):
                    phi.copy_((phi.double() + param.double()) / 2)  # rounded once
                    param.copy_(phi)
        rtol, atol = (8e-3, 1e-3) if dtype == torch.bfloat16 else (1e-6, 1e-7)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=rtol, atol=atol)


@pytest.mark.parametrize("base", ["SGD", "Adam", "STAC", "optim.Lion", "RMSprop"])
@pytest.mark.parametrize(("rate", "period"), [(0.1, 6), (0.0, 4), (0.5, 6), (0.05, 3), (0.4, 2), (0.4, 1)])
def test_scout_is_its_equation(base: str, rate: float, period: int) -> None:
    model, optimizer, twin, plain = _twins(base, lambda each: Scout(each, rate, period))
    scout = reference.Scout(_arrays(twin), rate, period)
    for seed in range(3 * period + 1):
        for each in (model, twin):
            set_gradients(each, seed)
            if seed % 3:  # alike, but not the same
                for param in each.parameters():
                    param.grad = 0.1 * param.grad + 1 if param.grad is not None else None
        optimizer.step()
        plain.step()
        _put(twin, scout.step(_arrays(twin)))
        for ours, theirs in zip(_arrays(model), _arrays(twin), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert base != "SGD" or rate > 0.1 or period < 3 or max(scout.rates) > rate


@pytest.mark.parametrize("period", [1, 4])
def test_scout_of_idle_and_constant_parameters_goes_on(period: int) -> None:
    """Holocron's has 0 / 0 there, and puts all weights back to the start."""
    idle, constant, free = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer = Scout(torch.optim.SGD([idle, constant, free], lr=0.25), sync_rate=0.5, sync_period=period)
    generator = torch.Generator().manual_seed(0)
    for _ in range(period):
        idle.grad = torch.zeros(3, dtype=torch.float64)
        constant.grad = torch.ones(3, dtype=torch.float64)
        free.grad = None
        optimizer.step()
    assert idle.tolist() == [1.0] * 3
    assert constant.tolist() == [1 - 0.5 * 0.25 * period] * 3  # sync_rate of the way
    for _ in range(period):
        free.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.step()
    for param in (idle, constant, free):
        assert bool(param.isfinite().all())
    assert not torch.equal(free, torch.ones(3, dtype=torch.float64))


def test_scout_counts_idle_steps_of_a_parameter_that_begins_late() -> None:
    """Its earlier steps of the period were 0."""
    ended = []
    for begins_late in (False, True):
        param, other = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
        optimizer = Scout(torch.optim.SGD([param, other], lr=1.0), sync_rate=0.0, sync_period=4)
        for step in range(4):
            other.grad = torch.full((4,), float(step % 2), dtype=torch.float64)
            zero = None if begins_late else torch.zeros(4, dtype=torch.float64)
            param.grad = torch.ones(4, dtype=torch.float64) if step == 2 else zero
            optimizer.step()
        ended.append(param.detach())
    torch.testing.assert_close(ended[0], ended[1])
    assert float(ended[0][0]) != 0


@each_kind
def test_slow_weights_to_evaluate_with(kind: Any) -> None:
    model = small_model()
    optimizer = kind(STAC(model, lr=1e-2), sync_period=3)
    with optimizer.slow_weights():  # not begun yet
        pass
    stepped((model, optimizer), range(3))
    slow = copy.deepcopy(model.state_dict())
    stepped((model, optimizer), range(3, 5))
    fast = copy.deepcopy(model.state_dict())
    with optimizer.slow_weights():
        assert_same_bits(model.state_dict(), slow)
        with torch.no_grad():
            seeded_loss(model, 0)
    assert_same_bits(model.state_dict(), fast)
    before = copy.deepcopy(optimizer.state_dict())

    def broken() -> None:
        with optimizer.slow_weights():
            with torch.no_grad():
                model.get_parameter("0.weight").zero_()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        broken()
    assert_same_bits(model.state_dict(), fast)
    assert_same_bits(optimizer.state_dict(), before)


@each_kind
def test_within_slow_weights_nothing_steps_or_loads(kind: Any) -> None:
    model = small_model()
    optimizer = kind(STAC(model, lr=1e-2))
    stepped((model, optimizer), range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    with optimizer.slow_weights():
        set_gradients(model, 3)
        for forbidden in (
            optimizer.step,
            lambda: optimizer.load_state_dict(saved),
            optimizer.slow_weights().__enter__,
        ):
            with pytest.raises(RuntimeError, match="within slow_weights"):
                forbidden()
    optimizer.step()


@each_kind
def test_slow_weights_begin_with_those_that_the_first_step_finds(kind: Any) -> None:
    """As where pretrained weights are loaded after the optimizer was built, and its state was asked for."""
    models = [small_model() for _ in range(2)]
    optimizers = [kind(STAC(model, lr=1e-2), sync_period=2) for model in models]
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0
    for param in models[0].parameters():
        param.grad = torch.zeros_like(param)
    optimizers[0].step()
    for group, other in zip(optimizers[0].param_groups, optimizers[1].param_groups, strict=True):
        group["lr"] = other["lr"]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.load_state_dict(small_model(5).state_dict())
        stepped((model, optimizer), range(4))
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


@each_kind
def test_frozen_parameters_stay_where_they_are(kind: Any) -> None:
    model = small_model()
    optimizer = kind(torch.optim.Adam(model.parameters(), lr=1e-2), sync_period=3)
    stepped((model, optimizer), range(4))
    param = model.get_parameter("0.weight")
    param.requires_grad_(False)
    param.grad = None
    before = param.clone()
    stepped((model, optimizer), range(4, 8), skip=("0.weight",))
    assert_same_bits(param, before)
    param.requires_grad_(True)
    stepped((model, optimizer), range(8, 10))
    assert not torch.equal(param, before)


def test_groups_may_have_rates_and_periods_of_their_own() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    base = torch.optim.SGD([{"params": [param]} for param in params], lr=1.0)
    optimizer = Lookahead(base, sync_rate=0.5, sync_period=2)
    optimizer.param_groups[1]["sync_period"] = 3
    optimizer.param_groups[1]["sync_rate"] = 1.0
    for _ in range(3):
        for param in params:
            param.grad = -torch.ones(2)
        optimizer.step()
    assert params[0].tolist() == [2.0, 2.0]
    assert params[1].tolist() == [3.0, 3.0]


def test_lookahead_takes_line_searches() -> None:
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer: Any = Lookahead(torch.optim.LBFGS([param], max_iter=2, line_search_fn="strong_wolfe"), 0.5, 2)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (param - 1).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(6)]
    assert losses[-1] < 0.1 * losses[0]
    assert "lookahead_slow" in optimizer.state[param]


def test_lookahead_around_mechanize_moves_the_reference() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    base = mechanize(torch.optim.SGD, s_init=0.1)([param], lr=1.0)
    optimizer = Lookahead(base, 0.5, 2)
    for _ in range(2):
        before = param.detach().clone()
        param.grad = -torch.ones(2, dtype=torch.float64)
        optimizer.step()
    delta = optimizer.state[param]["mechanic_delta"]
    assert delta.tolist() == [2.0, 2.0]  # the base's two updates
    scale = float(base.scale)
    assert before.tolist() != [0.0, 0.0]
    np.testing.assert_allclose(param.detach().numpy(), 0.5 * scale * delta.numpy())
