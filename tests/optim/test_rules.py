"""Every row of the rule table: against its float64 reference, across paths by bits, on every dtype and layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import Lion, Signum
from stac_optimizer.optim.signum import single
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import contract
from stac_optimizer.tensors.precision import arithmetic_dtype
from tests import reference
from tests.optim.comparisons import (
    STEPS,
    UNITS,
    Held,
    as_array,
    assert_equal_under_units,
    assert_traced_equals_eager,
)
from tests.rule_cases import CAUTIOUS, DTYPES, RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.support import assert_same_bits


def case_paths() -> list[Any]:
    """Case, path and dtype, with readable ids. torch's fused AdamW has no complex form."""
    return [
        pytest.param(case, path, dtype, id=f"{case.name}-{path}-{str(dtype).removeprefix('torch.')}")
        for case in RULE_CASES
        for path in case.paths
        for dtype in case.dtypes
        if not (path == "fused" and dtype.is_complex)
    ]


def state_arrays(optimizer: RuleOptimizer, param: Tensor) -> reference.State:
    state = optimizer.state[param]
    return {key: as_array(value) for key, value in state.items()} or {"step": np.zeros(())}


@pytest.mark.parametrize(("case", "path", "dtype"), case_paths())
def test_update_matches_float64_reference(case: RuleCase, path: str, dtype: torch.dtype) -> None:
    """From each step's own start, so that roundings cannot pile up."""
    params = case.taken(zoo(dtype))
    optimizer = case.optimizer(params, path)
    rounding = case.slack * torch.finfo(dtype).eps
    near_zero = 8 * torch.finfo(arithmetic_dtype(dtype)).eps
    compared = left_out = 0
    for seed in range(STEPS):
        gradients = random_gradients(params, seed, skip={"layer.vector"} if seed == 2 else ())
        before = {name: (as_array(param), state_arrays(optimizer, param)) for name, param in params.items()}
        step_with(optimizer, params, gradients)
        for name, param in params.items():
            gradient, (old, old_state) = gradients[name], before[name]
            if gradient is None:
                assert np.array_equal(as_array(param), old)
                continue
            expected = case.reference(old, as_array(gradient), old_state, optimizer.param_groups[0])
            for key, value in expected.state.items():
                actual = as_array(optimizer.state[param][key])
                np.testing.assert_allclose(actual, value, rtol=rounding, atol=near_zero, err_msg=f"{name} {key}")
            signed = expected.signed
            decided = np.ones_like(old, bool) if signed is None else np.abs(signed) > near_zero
            compared, left_out = compared + decided.size, left_out + int((~decided).sum())
            bound = rounding * (np.abs(old) + optimizer.param_groups[0]["lr"])
            difference = np.abs(as_array(param) - expected.p)
            assert np.all(difference[decided] <= bound[decided]), (
                f"{name} differs by {np.max(difference / bound)} bounds"
            )
    assert left_out <= 0.001 * compared


BY_NAME = {case.name: case for case in RULE_CASES}
each_case = pytest.mark.parametrize("case", BY_NAME.values(), ids=list(BY_NAME))
EXACT = {name: case for name, case in BY_NAME.items() if case.agrees_by_bits}
each_exact_case = pytest.mark.parametrize("case", EXACT.values(), ids=list(EXACT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_exact_case
def test_paths_agree_by_bits(case: RuleCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(path: str) -> Held:
        params = zoo(dtype)
        return params, case.optimizer(params, path)

    others = [(str(units), units, held("single")) for units in UNITS.values()]
    assert_equal_under_units(held("foreach"), others, monkeypatch)


def test_agreeing_elements_are_counted_alike_beyond_what_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = []
    for limit in (single.EXACT_SUM, 0):
        monkeypatch.setattr(single, "EXACT_SUM", limit)
        params = zoo(torch.float32)
        optimizer = CAUTIOUS.optimizer(params, "single")
        step_with(optimizer, params, random_gradients(params, 0))
        step_with(optimizer, params, random_gradients(params, 1))
        stepped.append(params)
    assert_same_bits(stepped[0], stepped[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_class_alone_and_in_a_role_agree_by_bits(case: RuleCase, dtype: torch.dtype) -> None:
    for path in case.paths:
        alone, hosted = case.taken(zoo(dtype)), case.taken(zoo(dtype))
        optimizers = case.optimizer(alone, path), case.in_role(hosted, path)
        assert optimizers[0].param_groups[0]["rule"] == optimizers[1].param_groups[0]["rule"]
        for seed in range(3):
            gradients = random_gradients(alone, seed, skip={"layer.vector"} if seed == 1 else ())
            step_with(optimizers[0], alone, gradients)
            step_with(optimizers[1], hosted, gradients)
        for name, param in alone.items():
            assert_same_bits(param, hosted[name], name)
            assert_same_bits(optimizers[0].state[param], optimizers[1].state[hosted[name]], name)
        assert optimizers[0].state_bytes() == optimizers[1].state_bytes()


@each_exact_case
def test_mixed_dtypes_in_one_group_agree_by_bits(case: RuleCase) -> None:
    def mixed() -> dict[str, nn.Parameter]:
        return {f"{dtype}.{name}": param for dtype in DTYPES for name, param in zoo(dtype).items()}

    single, foreach = mixed(), mixed()
    for params, path in ((single, "single"), (foreach, "foreach")):
        optimizer = case.optimizer(params, path)
        for seed in range(3):
            step_with(optimizer, params, random_gradients(params, seed))
    for name, param in single.items():
        assert_same_bits(param, foreach[name], name)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("signum-default", "single"),
        ("signum-no-momentum-maximize", "single"),
        ("signum-cautious-maximize", "single"),
        ("signum-cautious-no-momentum", "single"),
        ("signum-default", "foreach"),
        ("signum-maximize", "foreach"),
        ("signum-no-momentum", "foreach"),
        ("lion-default", "single"),
        ("lion-cautious-maximize", "single"),
        ("lion-maximize", "foreach"),
        ("lion-cautious", "foreach"),
        ("muon-cautious-maximize", "single"),
        ("muon-default", "foreach"),
    ],
)
def test_compiled_step_agrees(name: str, path: str) -> None:
    """Traced into a graph, here run without inductor; tests/stack/test_ecosystem.py compiles for real."""
    case = BY_NAME[name]
    eager, traced = case.taken(zoo(torch.float32)), case.taken(zoo(torch.float32))
    held = (eager, case.optimizer(eager, path)), (traced, case.optimizer(traced, path))
    assert_traced_equals_eager(*held, by_bits=case.agrees_by_bits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((Signum, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)), (Lion, torch.bfloat16)],
)
def test_compiled_by_inductor_agrees_by_bits(kind: type[Signum] | type[Lion], dtype: torch.dtype) -> None:
    """Non-finite and tiny gradients included, which a compiler might simplify away or round otherwise."""
    torch._dynamo.reset()
    tensors = [nn.Parameter(torch.linspace(-1, 1, 40).to(dtype)) for _ in range(2)]
    optimizers = [kind([tensor], lr=0.03, weight_decay=0.1) for tensor in tensors]
    step = torch.compile(optimizers[1].step, fullgraph=True)
    for seed in range(4):
        gradient = torch.randn(40, generator=torch.Generator().manual_seed(seed)).to(dtype)
        gradient[:4] = torch.tensor([torch.nan, torch.inf, 2e-7, -1e-7]) if seed == 1 else 0
        for tensor in tensors:
            tensor.grad = gradient.clone()
        optimizers[0].step()
        step()
    expected, actual = (tensor.detach().float().nan_to_num(nan=99.0) for tensor in tensors)
    assert_same_bits(actual, expected)
    assert actual[:2].tolist() == [99.0, 99.0]
    averages = [optimizer.state[tensor]["exp_avg"] for optimizer, tensor in zip(optimizers, tensors, strict=True)]
    assert_same_bits(averages[1].nan_to_num(nan=99.0), averages[0].nan_to_num(nan=99.0))


@each_case
def test_maximize_equals_negated_gradients(case: RuleCase) -> None:
    ascending, descending = case.taken(zoo(torch.float32)), case.taken(zoo(torch.float32))
    maximize = not case.arguments.get("maximize", False)
    optimizers = case.optimizer(ascending, "single", maximize=maximize), case.optimizer(descending, "single")
    for seed in range(3):
        gradients = random_gradients(ascending, seed)
        step_with(optimizers[0], ascending, gradients)
        step_with(optimizers[1], descending, {n: None if g is None else -g for n, g in gradients.items()})
    for name, param in ascending.items():
        assert torch.equal(param, descending[name]), name


@each_exact_case
def test_tensor_lr_equals_float_lr_by_bits(case: RuleCase) -> None:
    """A power of two, which float32 holds exactly: else the two would not be the same number."""
    by_float, by_tensor = zoo(torch.float32), zoo(torch.float32)
    optimizers = [
        case.optimizer(by_float, "single", lr=2.0**-6, weight_decay=0.25),
        case.optimizer(by_tensor, "single", lr=torch.tensor([2.0**-6]), weight_decay=0.25),
    ]
    for seed in range(STEPS):
        gradients = random_gradients(by_float, seed)
        for optimizer, params in zip(optimizers, (by_float, by_tensor), strict=True):
            step_with(optimizer, params, gradients)
    for name, param in by_float.items():
        assert_same_bits(param, by_tensor[name], name)


@pytest.mark.parametrize("kind", [Signum, Lion])
def test_sign_step_moves_each_weight_by_lr(kind: type[Signum] | type[Lion]) -> None:
    param = nn.Parameter(torch.zeros(1000))
    optimizer = kind([param], lr=0.125)
    step_with(optimizer, {"w": param}, random_gradients({"w": param}, 0))
    assert torch.equal(param.abs(), torch.full((1000,), 0.125))


def test_state_has_declared_keys_shapes_dtypes_and_layouts() -> None:
    expected: dict[str, set[str]] = {
        "signum-default": {"exp_avg"},
        "signum-no-momentum": set(),
        "adamw-default": {"exp_avg", "exp_avg_sq"},
        "adamw-amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "lion-default": {"exp_avg"},
        "muon-default": {"exp_avg"},
        "muon-no-momentum": set(),
    }
    for case_name, keys in expected.items():
        params = BY_NAME[case_name].taken(zoo(torch.bfloat16))
        optimizer = BY_NAME[case_name].optimizer(params, "single")
        step_with(optimizer, params, random_gradients(params, 0, skip={"layer.sliced"}))
        for name, param in params.items():
            state = dict(optimizer.state[param])
            step = state.pop("step")
            assert (step.shape, step.dtype, step.device.type) == ((), torch.float32, "cpu")
            assert step.item() == (0 if name == "layer.sliced" else 1)
            assert state.keys() == (set() if name == "layer.sliced" else keys)
            for value in state.values():
                assert (value.shape, value.dtype) == (param.shape, param.dtype)
                assert value.stride() == torch.zeros_like(param).stride()


# AdamW raises its betas to the power of a float32 counter, hence its tolerance.
@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        pytest.param({}, 0.0, id="signum"),
        pytest.param({"trunk_cautious": True}, 0.0, id="signum-cautious"),
        pytest.param({"role": "cap", "eps": 0.0}, 1e-5, id="adamw"),
        pytest.param({"trunk_optimizer": Lion}, 0.0, id="lion"),
        pytest.param({"trunk_optimizer": partial(Lion, cautious=True)}, 0.0, id="lion-cautious"),
    ],
)
def test_differentiable_step_gives_gradients_of_lr_weight_and_what_its_gradient_came_from(
    arguments: dict[str, Any], tolerance: float
) -> None:
    """From p = 2 with decay 0.5 and gradient 3: p - lr * 0.5 * p - lr, for AdamW's first step is a sign too."""
    lr = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    leaf = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    weight = leaf.clone()
    given = dict(arguments)
    groups = [{"params": [("w", weight)], "stac_role": given.pop("role", "trunk")}]
    optimizer = STAC(groups, lr=lr, weight_decay=0.5, differentiable=True, **given)
    source = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weight.grad = 3 * source
    optimizer.step()
    gradients = torch.autograd.grad(weight.sum(), [lr, leaf, source])
    assert gradients[0].item() == pytest.approx(-0.5 * 2.0 - 1.0, abs=tolerance)
    assert gradients[1].item() == pytest.approx(1 - 0.25 * 0.5, abs=tolerance)
    assert gradients[2].item() == pytest.approx(0.0, abs=tolerance)


def test_default_path_is_the_one_torch_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Signum([nn.Parameter(torch.ones(2))]).param_groups[0]

    def path(**flags: Any) -> str:
        return Signum.rule.path(group["params"], {**group, **flags})

    assert (path(), path(foreach=False), path(foreach=True), path(fused=True)) == (
        "single",
        "single",
        "foreach",
        "fused",
    )
    assert path(foreach=True, cautious=True) == path(foreach=True, stochastic_rounding=True) == "single"
    assert path(foreach=True, state_dtype="int8") == "single"
    monkeypatch.setattr(contract, "is_foreach_faster", lambda params, differentiable: not differentiable)
    assert (path(), path(foreach=False), path(fused=True)) == ("foreach", "single", "fused")
    assert path(differentiable=True) == "single"
