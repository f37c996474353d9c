"""Stochastic rounding: its noise, its arithmetic, and what a step with it does to weights of both roles."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import Lion, Signum
from stac_optimizer.tensors import rounding
from stac_optimizer.tensors.units.pieces import Piece, Tensors, Unit
from tests.optim.comparisons import UNITS, Held, assert_equal_under_units, assert_traced_equals_eager
from tests.rule_cases import random_gradients, step_with, zoo
from tests.runs import Run, assert_equal_runs, stepped, through_file_into
from tests.support import assert_same_bits, parameter_state, same_bits, set_units, take_steps

RANGE = 2**16
Pair = Callable[[int], tuple[Tensor, Tensor]]
ROLES: dict[str, dict[str, Any]] = {
    "trunk": {"trunk_cautious": False},
    "trunk-cautious": {"trunk_cautious": True},
    "trunk-int8": {"trunk_state_dtype": torch.int8},
    "trunk-momentum-0": {"trunk_momentum": 0.0},
    "cap": {"amsgrad": False},
    "cap-amsgrad": {"amsgrad": True},
    "trunk-lion": {"trunk_optimizer": Lion},
    "trunk-lion-cautious": {"trunk_optimizer": partial(Lion, cautious=True)},
}
# What computes in float32 what these round.
IN_FLOAT32: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "trunk": Signum,
    "trunk-cautious": partial(Signum, cautious=True),
    "cap": torch.optim.AdamW,
    "cap-amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "trunk-lion": Lion,
    "trunk-lion-cautious": partial(Lion, cautious=True),
}

SIGNUMS = [IN_FLOAT32[kind] for kind in ("trunk", "trunk-cautious")]

each_role = pytest.mark.parametrize("role", ["trunk", "cap"])
each_kind = pytest.mark.parametrize("kind", ROLES)


def noise(numel: int, *, seed: int = 0, position: int = 0, step: int = 1, kind: int = 0) -> Tensor:
    """The noise of one parameter in one step."""
    noise_seed = rounding.noise_seeds(seed, [position], torch.tensor([float(step)]), kind=kind)
    piece = Piece(Tensors(torch.empty(numel), torch.empty(numel)))
    return rounding.noise_of(piece, Unit([[piece]], (0,)), noise_seed)


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    param = torch.zeros(values.shape, dtype=torch.bfloat16)
    rounding.round_into(values, param, noise)
    return param


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to float32 ones, towards zero and away from it; one and the same where exact."""
    bits = values.view(torch.int32)
    inner = bits.bitwise_and(~0xFFFF)
    outer = inner + (bits != inner).int() * RANGE
    return inner.view(torch.float32).bfloat16(), outer.view(torch.float32).bfloat16()


def assert_neighbours(actual: Tensor, values: Tensor, what: str = "") -> None:
    inner, outer = neighbours(values.float())
    assert ((actual == inner) | (actual == outer)).all(), what


def optimizer_of(params: dict[str, nn.Parameter], kind: str, **arguments: Any) -> STAC:
    groups = [{"params": list(params.items()), "stac_role": kind.partition("-")[0]}]
    return STAC(groups, **{"lr": 0.01, "weight_decay": 0.1, "stochastic_rounding": True, **ROLES[kind], **arguments})


def bfloat16_zoo(seed: int = 0) -> dict[str, nn.Parameter]:
    """Every layout, and rows long enough for codes."""
    wide = torch.randn(3, 130, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return {**zoo(torch.bfloat16, seed), "layer.wide": nn.Parameter(wide)}


@pytest.mark.parametrize(
    "of", [{}, {"seed": 1}, {"seed": 2**40}, {"position": 7}, {"step": 100_000}, {"kind": 3}], ids=str
)
def test_noise_is_uniform(of: dict[str, int]) -> None:
    """Chi-square over all values: for n degrees of freedom it has mean n, deviation sqrt(2 n), and is near normal."""
    drawn = noise(16 * RANGE, **of)
    for found in (drawn >> 16 & 0xFFFF, drawn & 0xFFFF):
        assert_uniform(found)


def assert_uniform(found: Tensor) -> None:
    counts = torch.bincount(found, minlength=RANGE).double()
    assert counts.numel() == RANGE
    chi_square = ((counts - 16) ** 2 / 16).sum().item()
    freedom = RANGE - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def lagging(lag: int) -> Pair:
    return lambda numel: (noise(numel + lag)[lag:], noise(numel + lag)[:numel])


def beside(one: Mapping[str, int] | None = None, **other: int) -> Pair:
    return lambda numel: (noise(numel, **(one or {})), noise(numel, **other))


PAIRS: dict[str, Pair] = {
    **{f"elements-{lag}": lagging(lag) for lag in (1, 2, 64, 128)},
    **{f"steps-{lag}": beside(step=1 + lag) for lag in (1, 2, 1000)},
    **{f"positions-{lag}": beside(position=lag) for lag in (1, 2, 50)},
    **{f"seeds-{lag}": beside(seed=lag) for lag in (1, 2, 2**31)},
    **{f"kinds-{lag}": beside(kind=lag) for lag in (1, 2, 3)},
    "steps-and-elements": lambda numel: (noise(numel + 1)[1:], noise(numel, step=2)),
    **{f"positions-and-kinds-{kind}": beside({"position": 1}, kind=kind) for kind in (1, 2, 3)},
}


def test_the_halves_of_a_number_are_uncorrelated() -> None:
    drawn = noise(2**18)
    both = torch.stack([(drawn >> shift & 0xFFFF).double() for shift in (0, 16)])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / 2**9


@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_noise_is_uncorrelated(pair: Pair) -> None:
    """The correlation of n independent pairs has the deviation 1 / sqrt(n); in the top bit alone it shows as well."""
    numel = 2**18
    one, other = pair(numel)
    for shift in (0, 15, 16, 31):  # of what averages and weights are rounded by
        both = torch.stack([(each >> shift & 0xFFFF).double() for each in (one, other)])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / math.sqrt(numel)


def values_between(count: int) -> Tensor:
    """Finite float32 values of all exponents and both signs."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F7F0000, (count,), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1)
    return bits.view(torch.float32) * signs


def test_rounding_gives_one_of_the_two_neighbours() -> None:
    values = values_between(100_000)
    for fill in (0, -1):
        assert_neighbours(rounded(values, torch.full((100_000,), fill, dtype=torch.int32)), values)
    assert_neighbours(rounded(values, noise(100_000)), values)


def test_a_value_is_rounded_up_as_often_as_it_comes_close() -> None:
    """Over all noise there is: a value that many sixteenths of 2^-4 above its inner neighbour."""
    every = torch.arange(RANGE, dtype=torch.int32) << 16
    for value in values_between(20):
        inner, outer = neighbours(value)
        result = rounded(value.expand(RANGE).contiguous(), every)
        assert (result == outer).sum().item() == value.view(torch.int32).item() % RANGE
        assert ((result == inner) | (result == outer)).all()


@pytest.mark.parametrize("value", [1.0015, -1.0015, 3.14159e-20, -7.77e25, 1e-40])
def test_rounding_is_right_in_the_mean(value: float) -> None:
    count = 2**18
    result = rounded(torch.full((count,), value), noise(count)).double()
    inner, outer = (each.double().item() for each in neighbours(torch.tensor(value)))
    share = (torch.tensor(value).double().item() - inner) / (outer - inner)
    error = abs(outer - inner) * math.sqrt(share * (1 - share) / count)
    assert abs(result.mean().item() - torch.tensor(value).double().item()) < 5 * error


def test_exact_values_stay_whatever_the_noise() -> None:
    largest = torch.finfo(torch.bfloat16).max
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, -(2.0**-133), largest, -largest, torch.inf, -torch.inf])
    for fill in (0, 1 << 16, -(2**31), -1):
        noisy = rounded(exact, torch.full(exact.shape, fill, dtype=torch.int32))
        assert_same_bits(noisy, exact.bfloat16())


@pytest.mark.parametrize("payload", [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0x7F80FFFF, 0x7FFF0001])
@pytest.mark.parametrize("sign", [0, -(2**31)])
def test_nan_of_any_payload_stays_nan_whatever_the_noise(payload: int, sign: int) -> None:
    value = torch.tensor([payload + sign], dtype=torch.int32).view(torch.float32)
    for fill in (0, 1 << 16, -(2**31), -1):
        assert rounded(value, torch.tensor([fill], dtype=torch.int32)).isnan().all()


def lost_steps(role: str, *, stochastic_rounding: bool) -> Tensor:
    """20,000 weights at 1, after 20 steps of 1e-4, a twentieth of half the spacing below 1."""
    weight = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    groups = [{"params": [("w", weight)], "stac_role": role}]
    optimizer = STAC(groups, lr=1e-4, stochastic_rounding=stochastic_rounding)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


@each_role
def test_steps_far_below_half_an_ulp_move_weights_in_the_mean(role: str) -> None:
    """Each step moves a weight by one spacing, 2^-8, with the chance 1e-4 / 2^-8."""
    moved = (1 - lost_steps(role, stochastic_rounding=True).double()).mean().item()
    chance = 1e-4 * 2**8
    error = 2**-8 * math.sqrt(20 * chance * (1 - chance) / 20_000)
    # AdamW's step is lr here, too: its averages, also rounded by chance, are right in the mean to a hundredth of that.
    assert abs(moved - 20 * 1e-4) < 5 * error


@pytest.mark.filterwarnings("ignore:trunk. an lr of:UserWarning")
@each_role
def test_steps_far_below_half_an_ulp_are_lost_without_stochastic_rounding(role: str) -> None:
    assert (lost_steps(role, stochastic_rounding=False) == 1).all()


def test_warning_of_lost_steps_does_not_come_with_stochastic_rounding() -> None:
    params = [("w", nn.Parameter(torch.ones(5, dtype=torch.bfloat16)))]
    with pytest.warns(UserWarning, match="Use stochastic_rounding=True"):
        STAC([{"params": params, "stac_role": "trunk"}], lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STAC([{"params": params, "stac_role": "trunk"}], lr=1e-4, stochastic_rounding=True)


@each_kind
def test_units_and_paths_agree_by_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(**flags: Any) -> Held:
        params = bfloat16_zoo()
        return params, optimizer_of(params, kind, **flags)

    others = [
        (f"{units} {flags}", units, held(**flags))
        for units in (*UNITS.values(), {"block": 130})
        for flags in ({}, {"foreach": True})
    ]
    assert_equal_under_units(held(foreach=False), others, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trunk-cautious", "trunk-int8", "trunk-lion"])
def test_compiled_step_agrees_by_bits(kind: str) -> None:
    """The cap's is torch's capturable arithmetic there, which is close, not equal."""
    eager, traced = bfloat16_zoo(), bfloat16_zoo()
    assert_traced_equals_eager((eager, optimizer_of(eager, kind)), (traced, optimizer_of(traced, kind)))


RESUMES: dict[str, Callable[[Run], Run]] = {
    "file": lambda held: through_file_into(stepped(1, seed=1, dtype=torch.bfloat16), held),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("resume", RESUMES.values(), ids=list(RESUMES))
def test_resumed_run_rounds_alike(resume: Callable[[Run], Run]) -> None:
    held = stepped(3, dtype=torch.bfloat16, stochastic_rounding=True, rounding_seed=5, amsgrad=True)
    assert_equal_runs(held, resume(held))


@each_role
def test_another_seed_rounds_otherwise_and_the_same_alike(role: str) -> None:
    found = []
    for seed in (0, 0, 1, 2**32 + 1):
        params = zoo(torch.bfloat16)
        optimizer = optimizer_of(params, role, rounding_seed=seed)
        step_with(optimizer, params, random_gradients(params, 0))
        found.append(params["layer.matrix"].detach())
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])
    assert same_bits(found[2], found[3])  # of a seed 32 bits count


@pytest.mark.parametrize("kind", IN_FLOAT32)
@pytest.mark.parametrize("block", [1 << 40, 7])
def test_all_is_rounded_that_is_computed_in_float32(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each step's own start, weight and averages are next to those of a step on float32 copies."""
    set_units(monkeypatch, block=block)
    params = zoo(torch.bfloat16)
    optimizer = optimizer_of(params, kind)
    rounded_up = rounded_at_all = 0
    for seed in range(6):
        wide = {name: nn.Parameter(param.detach().float()) for name, param in params.items()}
        exactly = IN_FLOAT32[kind](list(wide.values()), lr=0.01, weight_decay=0.1, foreach=False)
        for name, param in params.items():
            held = copy.deepcopy(dict(optimizer.state[param]))
            exactly.state[wide[name]] = {key: value.float() for key, value in held.items()}
        gradients = random_gradients(params, seed)
        step_with(optimizer, params, gradients)
        for name, param in wide.items():
            gradient = gradients[name]
            assert gradient is not None
            param.grad = gradient.float()
        exactly.step()
        for position, (name, param) in enumerate(params.items()):
            assert optimizer.state[param]["step"] == seed + 1
            pairs = {"weight": (param.detach(), wide[name].detach())} | {
                key: (value, exactly.state[wide[name]][key])
                for key, value in optimizer.state[param].items()
                if key != "step"
            }
            for number, (key, (actual, exact)) in enumerate(pairs.items()):
                assert actual.dtype is torch.bfloat16
                assert_neighbours(actual.contiguous(), exact.contiguous(), f"{name} {key}")
                if param.is_contiguous():
                    # The trunk's averages are rounded by the half of one hash that its weights leave.
                    of, shift = (0, 16 * number) if IN_FLOAT32[kind] in SIGNUMS else (number, 0)
                    chance = noise(param.numel(), position=position, step=seed + 1, kind=of) << shift
                    assert_same_bits(actual, rounded(exact, chance.view(param.shape)), f"{name} {key}")
                rounded_at_all += (exact != exact.bfloat16()).sum().item()
                rounded_up += (actual != exact.bfloat16()).sum().item()
    assert 0.2 * rounded_at_all < rounded_up < 0.3 * rounded_at_all  # the farther neighbour: a quarter in the mean


def test_cap_keeps_the_float32_averages_of_a_checkpoint() -> None:
    saved = stepped(3)[1].state_dict()
    for group in saved["param_groups"]:
        group["stochastic_rounding"] = True
    model, optimizer = stepped(0, dtype=torch.bfloat16)
    optimizer.load_state_dict(saved)
    before = parameter_state(optimizer, model, "3.weight")["exp_avg"].clone()
    take_steps(model, optimizer, [3])
    grad = model.get_parameter("3.weight").grad
    assert grad is not None
    after = parameter_state(optimizer, model, "3.weight")["exp_avg"]
    torch.testing.assert_close(after, before.lerp(grad.float(), 0.1))
    assert model.get_parameter("3.weight").dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.complex64], ids=str)
@each_role
def test_other_dtypes_are_refused_by_name(role: str, dtype: torch.dtype) -> None:
    params = [
        ("a.w", nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
        ("a.b", nn.Parameter(torch.ones(2, dtype=dtype))),
    ]
    with pytest.raises(
        ValueError, match=rf"'a.b' \({role}\) is {dtype}, and stochastic_rounding is for torch.bfloat16"
    ):
        STAC([{"params": params, "stac_role": role}], stochastic_rounding=True)


def test_a_group_of_its_own_keeps_other_dtypes_out() -> None:
    low, high = (nn.Parameter(torch.ones(500, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    groups: list[dict[str, Any]] = [
        {"params": [("a.low", low)], "stac_role": "trunk"},
        {"params": [("b.high", high)], "stac_role": "trunk", "stochastic_rounding": False},
    ]
    optimizer = STAC(groups, lr=1e-3, stochastic_rounding=True)
    for param in (low, high):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(low.tolist()) == {1.0, 1 - 2**-8}
    assert torch.equal(high, torch.full((500,), 1.0) - 1e-3)


def test_checkpoint_that_rounds_is_refused_by_other_dtypes() -> None:
    saved = stepped(3, dtype=torch.bfloat16, stochastic_rounding=True)[1].state_dict()
    model, optimizer = stepped(2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'0.weight' \(trunk\) is torch.float32, and stochastic_rounding"):
        optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.state_dict(), before)
    assert_equal_runs((model, optimizer), stepped(2))


def test_dtype_changed_after_construction_is_refused_in_the_step() -> None:
    model, optimizer = stepped(1, dtype=torch.bfloat16, stochastic_rounding=True)
    model.float()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"'0.weight' \(trunk\) is torch.float32, and stochastic_rounding"):
        optimizer.step()
