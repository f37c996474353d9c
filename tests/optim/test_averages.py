"""Averages in fewer bits than float32: whether their signs turn when float32's do, and chance that never repeats."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import Lion, Signum
from stac_optimizer.rule.state import count_step_
from tests.support import assert_same_bits

ROWS, BLOCK = 16, 128
# Momentum, and how large the gradient is at first beside the largest of its block: nothing turned from there on.
STALLED = [(0.9, 0.0015), (0.95, 0.01), (0.99, 0.3)]


def steps_until_turned(before: float, after: float, momentum: float) -> float:
    """Of an average that has settled at one value, once gradients have another of the opposite sign."""
    return math.log(1 + before / -after) / -math.log(momentum)


def share_moving_up(
    make: Callable[..., torch.optim.Optimizer], before: float, after: float, steps: tuple[int, int], noise: float = 0.0
) -> float:
    """Of all weights but one of each block, whose gradient is 1 throughout: those that the last step moves up."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(ROWS, BLOCK))
    optimizer = make([weight], lr=1.0)
    moved = torch.zeros(())
    for value, count in zip((before, after), steps, strict=True):
        for _ in range(count):
            weight.grad = value + noise * torch.randn(ROWS, BLOCK, generator=generator)
            weight.grad[:, 0] = 1.0
            held = weight.detach().clone()
            optimizer.step()
            moved = weight.detach()[:, 1:] - held[:, 1:]
    return (moved > 0).double().mean().item()


@pytest.mark.parametrize(("momentum", "before"), STALLED)
def test_codes_turn_when_float32_does(momentum: float, before: float) -> None:
    """Give or take the noise of rounding: all of them at twice the time, and nearly none at half of it.

    Paths agree by bits, which other tests show. At the lowest levels, near 0.0015, noise is the largest: there 8 of 100
    have turned at half of the time.
    """
    after = -before / 3
    turn = steps_until_turned(before, after, momentum)
    settle = math.ceil(10 / (1 - momentum))
    make = partial(Signum, momentum=momentum)
    for factor, expected in ((0.5, 0.0), (2.0, 1.0)):
        steps = (settle, round(factor * turn))
        assert share_moving_up(make, before, after, steps) == expected
        found = share_moving_up(partial(make, state_dtype=torch.int8), before, after, steps)
        assert abs(found - expected) < 0.1


def test_codes_turn_under_noise_as_large_as_the_gradient() -> None:
    find = partial(share_moving_up, before=0.0015, after=-0.0005, steps=(200, 100), noise=0.0005)
    exact, coded = find(Signum), find(partial(Signum, state_dtype=torch.int8))
    assert exact > 0.95
    assert abs(exact - coded) < 0.05


def test_averages_of_bfloat16_weights_turn_at_high_momentum_by_chance() -> None:
    """To the nearest, they would not move by a thousandth of themselves."""
    for momentum, by_chance in ((0.999, True), (0.999, False)):
        weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one that is tested below
            optimizer = Signum([weight], lr=1.0, momentum=momentum, stochastic_rounding=by_chance)
        average = torch.zeros_like(weight)
        optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": average.fill_(1.0).detach()}
        for _ in range(1500):
            weight.grad = torch.full_like(weight, -0.25)
            optimizer.step()
        mean = optimizer.state[weight]["exp_avg"].double().mean().item()
        exact = -0.25 + 1.25 * momentum**1500
        assert mean == (pytest.approx(exact, abs=0.01) if by_chance else 1.0)


LOW: list[tuple[Callable[..., torch.optim.Optimizer], torch.dtype, str]] = [
    (partial(Signum, momentum=0.997), torch.bfloat16, "momentum is 0.997"),
    (partial(Signum, momentum=0.9999, state_dtype=torch.bfloat16), torch.float32, "momentum is 0.9999"),
    (partial(Signum, momentum=0.9999), torch.float16, "momentum is 0.9999"),
    (partial(Signum, momentum=0.99999, state_dtype=torch.int8), torch.float32, "momentum is 0.99999"),
    (partial(Lion, betas=(0.9, 0.997)), torch.bfloat16, r"betas\[1\] is 0.997"),
]


@pytest.mark.parametrize(("make", "dtype", "words"), LOW)
def test_averages_that_cannot_turn_draw_a_warning(
    make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, words: str
) -> None:
    weight = nn.Parameter(torch.zeros(2, 64, dtype=dtype))
    with pytest.warns(UserWarning, match=rf"{words}, and averages held in .* may keep their sign for ever"):
        make([("w", weight)], lr=1e-3)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"momentum": 0.996}, torch.bfloat16),
        ({"momentum": 0.999, "stochastic_rounding": True}, torch.bfloat16),
        ({"momentum": 0.9999}, torch.float32),
        ({"momentum": 0.999, "state_dtype": torch.int8}, torch.float32),
        ({"momentum": 0.0}, torch.bfloat16),
    ],
    ids=str,
)
def test_averages_that_turn_draw_none(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    Signum([nn.Parameter(torch.zeros(2, 64, dtype=dtype))], lr=1e-3, **arguments)


LAST = 2.0**24


def test_counters_go_on_where_float32_has_no_odd_numbers() -> None:
    steps = [torch.tensor(value) for value in (0.0, 5.0, LAST - 2, LAST - 1, LAST, LAST + 2, 2 * LAST, 3e8)]
    before = [step.item() for step in steps]
    count_step_(steps, never_stops=True)
    assert [step.item() for step in steps[:4]] == [1.0, 6.0, LAST - 1, LAST]
    following = [torch.nextafter(torch.tensor(value), torch.tensor(torch.inf)).item() for value in before[4:]]
    assert [step.item() for step in steps[4:]] == following


def test_every_count_to_beyond_the_last_odd_one_is_another() -> None:
    """All of those that a float32 counter can hold up to 2^24, by value, and some binades beyond."""
    counts = torch.arange(2**24, dtype=torch.float32)
    counted = counts.clone()
    count_step_([counted], never_stops=True)
    assert torch.equal(counted[:-1], counts[1:])
    assert counted[-1] == LAST
    beyond = torch.arange(2**20, dtype=torch.float32).mul_(2**7).add_(LAST)  # spans four binades
    counted = beyond.clone()
    count_step_([counted], never_stops=True)
    assert_same_bits(counted, torch.nextafter(beyond, torch.tensor(torch.inf)))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_skipped_steps_are_not_counted(found: float) -> None:
    steps = [torch.tensor(5.0), torch.tensor(LAST)]
    count_step_(steps, torch.tensor(found), never_stops=True)
    assert [step.item() for step in steps] == ([5.0, LAST] if found else [6.0, LAST + 2])


ROUNDING: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "trunk": partial(STAC, last_n_layers=0, stochastic_rounding=True),
    "cap": partial(STAC, last_n_layers=1, stochastic_rounding=True),
    "cap-fused": partial(STAC, last_n_layers=1, stochastic_rounding=True, fused=True),
    "lion": partial(STAC, last_n_layers=0, trunk_optimizer=Lion, stochastic_rounding=True),
}


@pytest.mark.parametrize("make", ROUNDING.values(), ids=list(ROUNDING))
def test_noise_goes_on_when_the_counter_is_full(make: Callable[..., torch.optim.Optimizer]) -> None:
    """A quarter of a spacing a step: with the same noise each time, three weights in four would never move."""
    model = nn.Linear(200, 100, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    optimizer = make(model, lr=2.0**-10)
    for _ in range(30):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        state: dict[str, Tensor] = optimizer.state[model.weight]
        if state["step"] == 1:
            model.weight.data.fill_(1.0)
            state["step"].fill_(LAST)
    assert (model.weight != 1).double().mean() > 0.99  # 0.75 ** 29 stay
    assert state["step"] > LAST


def test_codes_go_on_when_the_counter_is_full() -> None:
    """An average that takes a hundredth of a spacing a step."""
    weight = nn.Parameter(torch.zeros(ROWS, BLOCK))
    optimizer = Signum([weight], lr=1.0, momentum=0.9, state_dtype=torch.int8)
    held = []
    for _ in range(200):
        weight.grad = torch.full((ROWS, BLOCK), 6.2e-6)
        weight.grad[:, 0] = 1.0
        optimizer.step()
        state = optimizer.state[weight]
        if state["step"] == 1:
            state["step"].fill_(LAST)
        held.append(state["exp_avg"][:, 1:].clone())
    changes = sum((one != other).any(0).any(0) for one, other in itertools.pairwise(held))
    assert changes > 150
