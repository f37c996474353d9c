"""Averages of the trunk in bfloat16 and in 8-bit codes: what is held, how it steps, and what checkpoints make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stac_optimizer import STAC
from stac_optimizer.optim import Signum
from tests import reference
from tests.optim.comparisons import STEPS, Held, as_array, assert_equal_under_units, assert_traced_equals_eager
from tests.rule_cases import CAUTIOUS, DTYPES, PLAIN, RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.support import take_steps
from tests.tensors.test_codes import NEAR_TIE

KINDS = [torch.bfloat16, torch.int8]
CASES = [
    pytest.param(case, id=case.name)
    for case in RULE_CASES
    if "state_dtype" in case.kind.rule.hyperparameters and case.arguments.get("momentum", 0.9)
]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def wide_zoo(dtype: torch.dtype, *, contiguous: bool = False) -> dict[str, nn.Parameter]:
    """Besides the usual ones, parameters of every layout with rows long enough for codes."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "wide": randn(6, 300),
        "one-block": randn(4, 128),
        "wide-transposed": randn(200, 4).t(),
        "wide-sliced": randn(6, 400)[:, ::2],
        "wide-channels_last": randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last),
        "no-rows": randn(0, 64),
    }
    params = {**zoo(dtype), **{f"layer.{name}": nn.Parameter(tensor) for name, tensor in tensors.items()}}
    if contiguous:
        params = {name: nn.Parameter(param.detach().contiguous()) for name, param in params.items()}
    return params


# The parameters whose averages codes can hold, and the shape of their scales.
SCALES = {
    "layer.wide": (6, 3),
    "layer.one-block": (4, 1),
    "layer.wide-transposed": (4, 2),
    "layer.wide-sliced": (6, 2),
    "layer.wide-channels_last": (4, 1),
    "layer.no-rows": (0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *KINDS], ids=str)
def test_state_has_declared_keys_shapes_dtypes_and_layouts(kind: torch.dtype | None, dtype: torch.dtype) -> None:
    params = wide_zoo(dtype)
    optimizer = PLAIN.optimizer(params, "single", state_dtype=kind)
    step_with(optimizer, params, random_gradients(params, 0, skip={"layer.vector"}))
    assert optimizer.state[params["layer.vector"]].keys() == {"step"}
    del params["layer.vector"]
    for name, param in params.items():
        state = optimizer.state[param]
        is_coded = kind is torch.int8 and name in SCALES and dtype not in (torch.float64, torch.complex64)
        assert state.keys() == {"step", "exp_avg"} | ({"exp_avg_scale"} if is_coded else set())
        is_low = kind is torch.bfloat16 and not dtype.is_complex
        exp_avg = state["exp_avg"]
        assert exp_avg.dtype is (torch.int8 if is_coded else torch.bfloat16 if is_low else dtype)
        assert (exp_avg.shape, exp_avg.stride()) == (param.shape, torch.zeros_like(param).stride())
        if is_coded:
            assert state["exp_avg_scale"].dtype is torch.float32
            assert tuple(state["exp_avg_scale"].shape) == SCALES[name]


def matrix(array: reference.Array) -> reference.Array:
    return array.reshape(array.shape[0] if array.ndim else 1, -1)


def held_average(state: dict[str, Any]) -> reference.Array:
    """What the state holds, decoded by the reference where it is in codes."""
    held = as_array(state["exp_avg"])
    if state["exp_avg"].dtype is not torch.int8 or not held.size:
        return held
    return reference.decoded(matrix(held), as_array(state["exp_avg_scale"])).reshape(held.shape)


def assert_stored(state: dict[str, Any], expected: reference.Array, near: float) -> None:
    """That the state is the expected average, itself known to ``near``, rounded to how it is held."""
    held = as_array(state["exp_avg"])
    if state["exp_avg"].dtype is torch.int8:
        codes, average, scales = matrix(held), matrix(expected), as_array(state["exp_avg_scale"])
        np.testing.assert_allclose(scales, reference.block_scales(average), atol=near)
        below, above = (np.clip(np.abs(average) + shift, 0, None) for shift in (-near, near))
        assert (np.abs(codes) >= np.floor(reference.exact_levels(below, scales) - NEAR_TIE)).all()
        assert (np.abs(codes) <= np.ceil(reference.exact_levels(above, scales) + NEAR_TIE)).all()
        assert (codes * np.sign(average) >= -1e9 * (np.abs(average) < near)).all()
    else:
        np.testing.assert_allclose(held, expected, rtol=torch.finfo(state["exp_avg"].dtype).eps / 2, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@each_kind
def test_update_matches_float64_reference(kind: torch.dtype, case: RuleCase, dtype: torch.dtype) -> None:
    """From each step's own start, so that the roundings of what is held do not pile up."""
    params = case.taken(wide_zoo(dtype))
    optimizer = case.optimizer(params, "single", state_dtype=kind)
    rounding = case.slack * torch.finfo(dtype).eps
    near = 8 * torch.finfo(torch.float32).eps
    compared = left_out = 0
    for seed in range(STEPS):
        gradients = random_gradients(params, seed)
        before = {
            name: (as_array(param), {"exp_avg": held_average(state)} if (state := optimizer.state[param]) else {})
            for name, param in params.items()
        }
        step_with(optimizer, params, gradients)
        for name, param in params.items():
            gradient, (old, old_state) = gradients[name], before[name]
            assert gradient is not None
            expected, state, signed = case.reference(old, as_array(gradient), old_state, optimizer.param_groups[0])
            if not param.numel():
                continue
            assert_stored(optimizer.state[param], state["exp_avg"], near)
            decided = np.ones_like(old, bool) if signed is None else np.abs(signed) > near
            compared, left_out = compared + decided.size, left_out + int((~decided).sum())
            bound = rounding * (np.abs(old) + np.abs(expected - old).max())  # a masked step is longer than lr
            difference = np.abs(as_array(param) - expected)
            assert np.all(difference[decided] <= bound[decided]), name
    assert left_out <= 0.001 * compared


UNITS = [{}, {"block": 256}, {"block": 50, "shared": True}, {"block": 1000, "pack": 100}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [PLAIN, CAUTIOUS], ids=lambda case: case.name)
@each_kind
def test_units_paths_and_layouts_agree_by_bits(
    kind: torch.dtype, case: RuleCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(path: str, *, contiguous: bool = False) -> Held:
        params = wide_zoo(dtype, contiguous=contiguous)
        return params, case.optimizer(params, path, state_dtype=kind)

    others = [
        (f"{units} {path} {contiguous}", units, held(path, contiguous=contiguous))
        for units in UNITS
        for path, contiguous in (("single", False), ("foreach", False), ("single", True))
    ]
    assert_equal_under_units(held("single"), others, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), [(torch.bfloat16, PLAIN), (torch.int8, CAUTIOUS)], ids=["plain", "cautious"])
def test_compiled_step_agrees_by_bits(kind: torch.dtype, case: RuleCase) -> None:
    eager, traced = (
        (params, case.optimizer(params, "single", state_dtype=kind))
        for params in (wide_zoo(torch.float32), wide_zoo(torch.float32))
    )
    assert_traced_equals_eager(eager, traced)


BYTES = [
    # What a trunk weight costs, besides the count of steps.
    pytest.param({}, 4.0, id="float32"),
    pytest.param({"trunk_state_dtype": torch.bfloat16}, 2.0, id="bfloat16"),
    pytest.param({"trunk_state_dtype": torch.int8}, 1 + 4 / 128, id="int8"),
    pytest.param({"trunk_momentum": 0.0}, 0.0, id="momentum-0"),
    pytest.param({"trunk_momentum": 0.0, "trunk_state_dtype": torch.int8}, 0.0, id="momentum-0-int8"),
]


@pytest.mark.parametrize(("arguments", "expected"), BYTES)
def test_bytes_of_state_for_a_trunk_weight(arguments: dict[str, Any], expected: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    optimizer = STAC(model, last_n_layers=0, **arguments)
    promised = optimizer.state_bytes()
    assert (promised - 4) / 1024**2 == expected
    take_steps(model, optimizer, [0])
    (state,) = optimizer.state.values()
    assert sum(value.nbytes for value in state.values()) == optimizer.state_bytes() == promised


@pytest.mark.parametrize("kind", [None, *KINDS], ids=str)
def test_bytes_of_state_are_known_before_the_first_step(kind: torch.dtype | None) -> None:
    for dtype in DTYPES:
        params = wide_zoo(dtype)
        optimizer = PLAIN.optimizer(params, "single", state_dtype=kind)
        promised = optimizer.state_bytes()
        step_with(optimizer, params, random_gradients(params, 0))
        held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        assert promised == optimizer.state_bytes() == held


WRONG: list[tuple[Any, type[Exception]]] = [
    ("float32", ValueError),
    (8, TypeError),
    (torch.zeros(1), TypeError),
    (np.int8, TypeError),
    (torch.float16, ValueError),
    (torch.float32, ValueError),
    (torch.uint8, ValueError),
]


@pytest.mark.parametrize(("value", "error"), WRONG, ids=lambda value: getattr(value, "__name__", str(value)))
def test_wrong_dtype_is_refused(value: Any, error: type[Exception]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=r"^trunk_state_dtype must be"):
        STAC(model, trunk_state_dtype=value)
    group = {"params": list(model.named_parameters()), "stac_role": "trunk", "state_dtype": value}
    with pytest.raises(error, match=r"^group 0: state_dtype must be"):
        STAC([group])


def test_groups_have_dtypes_of_their_own() -> None:
    """Also by name, as in a checkpoint."""
    weights = [nn.Parameter(torch.ones(2, 64)) for _ in range(4)]
    kinds = [torch.int8, torch.bfloat16, None, "int8"]
    groups = [
        {"params": [(f"{index}.w", weight)], "stac_role": "trunk", "state_dtype": kind}
        for index, (weight, kind) in enumerate(zip(weights, kinds, strict=True))
    ]
    optimizer = STAC(groups, lr=0.125)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [optimizer.state[weight]["exp_avg"].dtype for weight in weights] == [
        torch.int8,
        torch.bfloat16,
        torch.float32,
        torch.int8,
    ]
    assert all(torch.equal(weight, torch.full((2, 64), 0.875)) for weight in weights)


@each_kind
def test_a_gradient_that_is_not_finite_shows_in_the_weight(kind: torch.dtype) -> None:
    """In codes the whole block becomes NaN in the next step, its neighbours never."""
    weight = nn.Parameter(torch.zeros(2, 256))
    optimizer = Signum([weight], lr=0.125, state_dtype=kind)
    for value in (torch.nan, 1.0):
        weight.grad = torch.ones_like(weight)
        weight.grad[0, 3] = value
        optimizer.step()
    lost = weight.isnan()
    assert lost[0, 3]
    assert lost.sum() == (128 if kind is torch.int8 else 1)
    assert torch.equal(weight[~lost], torch.full_like(weight[~lost], -0.25))
