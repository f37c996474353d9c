"""Every row of the rule table: against its float64 reference, across paths by bits, on every dtype and layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, _tensors
from stac_optimizer.rules import RULES, _sign_momentum_single
from tests import reference
from tests.rule_cases import CAUTIOUS, DTYPES, RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.support import assert_same_bits, set_units

STEPS = 7


def case_paths() -> list[Any]:
    """Case, path and dtype, with readable ids. torch's fused AdamW has no complex form."""
    return [
        pytest.param(case, path, dtype, id=f"{case.name}-{path}-{str(dtype).removeprefix('torch.')}")
        for case in RULE_CASES
        for path in case.paths
        for dtype in case.dtypes
        if not (path == "fused" and dtype.is_complex)
    ]


def as_array(tensor: Tensor) -> reference.Array:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    array: reference.Array = real.to(torch.float64).numpy().copy()
    return array


def state_arrays(optimizer: STAC, param: Tensor) -> reference.State:
    state = optimizer.state[param]
    return {key: as_array(value) for key, value in state.items()} or {"step": np.zeros(())}


@pytest.mark.parametrize(("case", "path", "dtype"), case_paths())
def test_update_matches_float64_reference(case: RuleCase, path: str, dtype: torch.dtype) -> None:
    """From each step's own start, so that roundings cannot pile up."""
    params = zoo(dtype)
    optimizer = case.optimizer(params, path)
    rounding = case.slack * torch.finfo(dtype).eps
    near_zero = 8 * torch.finfo(_tensors.arithmetic_dtype(dtype)).eps
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
            expected, state = case.reference(old, as_array(gradient), old_state, optimizer.param_groups[0])
            for key, value in state.items():
                actual = as_array(optimizer.state[param][key])
                np.testing.assert_allclose(actual, value, rtol=rounding, atol=near_zero, err_msg=f"{name} {key}")
            # A sign binds only where the average is farther from 0 than its own rounding.
            decided = np.abs(state["exp_avg"]) > near_zero if case.is_sign and state else np.ones_like(old, bool)
            compared, left_out = compared + decided.size, left_out + int((~decided).sum())
            bound = rounding * (np.abs(old) + optimizer.param_groups[0]["lr"])
            difference = np.abs(as_array(param) - expected)
            assert np.all(difference[decided] <= bound[decided]), (
                f"{name} differs by {np.max(difference / bound)} bounds"
            )
    assert left_out <= 0.001 * compared


def run(optimizer: STAC, params: Mapping[str, Tensor], steps: int = STEPS) -> Iterator[None]:
    """Steps with a parameter that lacks its gradient once, one frozen in mid-run, zeros, and an lr that moves."""
    for seed in range(steps):
        gradients = random_gradients(params, seed, skip={"layer.vector"} if seed == 2 else ())
        if seed >= 4:
            gradients["layer.transposed"] = None
        if seed == 5:
            gradients = {name: None if grad is None else torch.zeros_like(grad) for name, grad in gradients.items()}
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + seed)
        step_with(optimizer, params, gradients)
        yield


# Blocks that cut even the test tensors, with a rest; packs of several tensors, with a rest; both.
UNITS: Mapping[str, Mapping[str, int]] = {
    "whole": {},
    "cut": {"block": 7},
    "packed": {"pack": 1000},
    "cut-and-packed": {"block": 10, "pack": 10},
}


Held = tuple[Mapping[str, nn.Parameter], STAC]


def assert_equal_under_units(
    expected: Held, others: Sequence[tuple[str, Mapping[str, int], Held]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That optimizers, each under units of its own, step as the first one under the default ones of :func:`set_units`.

    Args:
        expected: parameters and their optimizer.
        others: what to call them, their units, and they.
        monkeypatch: sets the units.
    """
    params, optimizer = expected
    first, *rest = (run(held, own) for own, held in (expected, *(held for _, _, held in others)))
    for _ in range(STEPS):
        set_units(monkeypatch)
        next(first)
        for steps, (what, units, (own, other)) in zip(rest, others, strict=True):
            set_units(monkeypatch, **units)
            next(steps)
            for name, param in params.items():
                assert_same_bits(own[name], param, f"{what} {name}")
                assert_same_bits(other.state[own[name]], optimizer.state[param], f"{what} {name}")


def assert_traced_equals_eager(eager: Held, traced: Held) -> None:
    """That a step traced into a graph and functionalized gives the bits of an eager one, twice."""
    torch._dynamo.reset()
    step = torch.compile(traced[1].step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        gradients = random_gradients(eager[0], seed)
        step_with(eager[1], eager[0], gradients)
        for name, param in traced[0].items():
            param.grad = gradients[name]
        step()
    for name, param in eager[0].items():
        assert_same_bits(param, traced[0][name], name)
        assert_same_bits(eager[1].state[param], traced[1].state[traced[0][name]], name)


TRUNK_CASES = [pytest.param(case, id=case.name) for case in RULE_CASES if case.role == "trunk"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRUNK_CASES)
def test_trunk_paths_agree_by_bits(case: RuleCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(path: str) -> Held:
        params = zoo(dtype)
        return params, case.optimizer(params, path)

    others = [(str(units), units, held("single")) for units in UNITS.values()]
    assert_equal_under_units(held("foreach"), others, monkeypatch)


def test_agreeing_elements_are_counted_alike_beyond_what_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = []
    for limit in (_sign_momentum_single.EXACT_SUM, 0):
        monkeypatch.setattr(_sign_momentum_single, "EXACT_SUM", limit)
        params = zoo(torch.float32)
        optimizer = CAUTIOUS.optimizer(params, "single")
        step_with(optimizer, params, random_gradients(params, 0))
        step_with(optimizer, params, random_gradients(params, 1))
        stepped.append(params)
    assert_same_bits(stepped[0], stepped[1])


@pytest.mark.parametrize("case", TRUNK_CASES)
def test_trunk_mixed_dtypes_in_one_group_agree_by_bits(case: RuleCase) -> None:
    def mixed() -> dict[str, nn.Parameter]:
        return {f"{dtype}.{name}": param for dtype in DTYPES for name, param in zoo(dtype).items()}

    single, foreach = mixed(), mixed()
    for params, path in ((single, "single"), (foreach, "foreach")):
        optimizer = case.optimizer(params, path)
        for seed in range(3):
            step_with(optimizer, params, random_gradients(params, seed))
    for name, param in single.items():
        assert_same_bits(param, foreach[name], name)


@pytest.mark.parametrize("case", TRUNK_CASES)
@pytest.mark.parametrize("path", ["single", "foreach"])
def test_trunk_compiled_step_agrees_by_bits(case: RuleCase, path: str) -> None:
    """Traced into a graph, here run without inductor; tests/test_ecosystem.py compiles for real."""
    eager, traced = zoo(torch.float32), zoo(torch.float32)
    assert_traced_equals_eager((eager, case.optimizer(eager, path)), (traced, case.optimizer(traced, path)))


# torch 2.6 warns of its own configuration while it logs what it compiles.
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trunk_compiled_by_inductor_agrees_by_bits(dtype: torch.dtype) -> None:
    """Non-finite and tiny gradients included, which a compiler might simplify away or round otherwise."""
    torch._dynamo.reset()
    tensors = [nn.Parameter(torch.linspace(-1, 1, 40).to(dtype)) for _ in range(2)]
    optimizers = [
        STAC([{"params": [("w", tensor)], "stac_role": "trunk"}], lr=0.03, weight_decay=0.1) for tensor in tensors
    ]
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


CAP_FLAGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "amsgrad-maximize": {"amsgrad": True, "maximize": True},
    "betas-eps-decay": {"betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.3},
    "tensor-lr": {"lr": torch.tensor(0.02)},
    "tensor-lr-of-shape-1": {"lr": torch.tensor([0.02])},
}
CAP_PATHS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", CAP_PATHS)
@pytest.mark.parametrize("flags", CAP_FLAGS)
def test_cap_equals_torch_adamw_by_bits(flags: str, path: str, dtype: torch.dtype) -> None:
    arguments = {"lr": 0.01, **CAP_FLAGS[flags], **CAP_PATHS[path]}
    if path == "foreach" and "tensor" in flags:
        pytest.skip("torch.optim.AdamW refuses a tensor lr with foreach=True, and so does STAC")
    if path == "fused" and dtype.is_complex:
        pytest.skip("torch has no fused AdamW for complex parameters, and STAC refuses it")
    ours, theirs = zoo(dtype), zoo(dtype)
    if path == "fused":
        # torch's fused kernel writes outside a sliced parameter; what STAC does there is tested below.
        del ours["layer.sliced"], theirs["layer.sliced"]
    optimizer = STAC([{"params": list(ours.items()), "stac_role": "cap"}], **arguments)
    if arguments.get("lr") is CAP_FLAGS["tensor-lr-of-shape-1"]["lr"]:
        arguments["lr"] = torch.tensor(0.02)  # with shape (1,) torch's own fails on 0-dim parameters
    adamw = torch.optim.AdamW(theirs.values(), **{"weight_decay": 0.0, **arguments})
    for seed in range(50):
        gradients = random_gradients(ours, seed, skip={"layer.vector"} if seed == 2 else ())
        step_with(optimizer, ours, gradients)
        for name, param in theirs.items():
            gradient = gradients[name]
            # In the parameter's layout, or torch's fused kernel pairs the wrong elements.
            param.grad = None if gradient is None else torch.empty_like(param).copy_(gradient)
        adamw.step()
    for name, param in ours.items():
        assert_same_bits(param, theirs[name], name)
        assert_same_bits(dict(optimizer.state[param]), dict(adamw.state[theirs[name]]), name)


def test_cap_fused_takes_single_path_for_sliced_parameters() -> None:
    base = {fused: torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) for fused in (True, False)}
    untouched = base[True][:, 1::2].clone()
    for fused, tensor in base.items():
        param = nn.Parameter(tensor[:, ::2])
        params = {"layer.sliced": param, "layer.dense": nn.Parameter(torch.ones(3))}
        optimizer = STAC([{"params": list(params.items()), "stac_role": "cap"}], fused=fused)
        for seed in range(5):
            step_with(optimizer, params, random_gradients(params, seed))
    assert_same_bits(base[True], base[False])
    assert_same_bits(base[True][:, 1::2], untouched)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in RULE_CASES])
def test_maximize_equals_negated_gradients(case: RuleCase) -> None:
    ascending, descending = zoo(torch.float32), zoo(torch.float32)
    maximize = not case.arguments.get("maximize", False)
    optimizers = case.optimizer(ascending, "single", maximize=maximize), case.optimizer(descending, "single")
    for seed in range(3):
        gradients = random_gradients(ascending, seed)
        step_with(optimizers[0], ascending, gradients)
        step_with(optimizers[1], descending, {n: None if g is None else -g for n, g in gradients.items()})
    for name, param in ascending.items():
        assert torch.equal(param, descending[name]), name


@pytest.mark.parametrize("case", TRUNK_CASES)
def test_trunk_tensor_lr_equals_float_lr_by_bits(case: RuleCase) -> None:
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


def test_trunk_step_moves_each_weight_by_lr() -> None:
    param = nn.Parameter(torch.zeros(1000))
    optimizer = STAC([{"params": [("w", param)], "stac_role": "trunk"}], lr=0.125)
    step_with(optimizer, {"w": param}, random_gradients({"w": param}, 0))
    assert torch.equal(param.abs(), torch.full((1000,), 0.125))


def test_state_has_declared_keys_shapes_dtypes_and_layouts() -> None:
    params = zoo(torch.bfloat16)
    for case, keys in (
        (RULE_CASES[0], {"exp_avg"}),
        (RULE_CASES[3], set()),
        (RULE_CASES[-1], {"exp_avg", "exp_avg_sq"}),
    ):
        optimizer = case.optimizer(params, "single")
        step_with(optimizer, params, random_gradients(params, 0, skip={"layer.vector"}))
        for name, param in params.items():
            state = dict(optimizer.state[param])
            step = state.pop("step")
            assert (step.shape, step.dtype, step.device.type) == ((), torch.float32, "cpu")
            assert step == (0 if name == "layer.vector" else 1)
            assert state.keys() == (set() if name == "layer.vector" else keys)
            for value in state.values():
                assert (value.shape, value.dtype) == (param.shape, param.dtype)
                assert value.stride() == torch.zeros_like(param).stride()


# AdamW raises its betas to the power of a float32 counter, hence its tolerance.
@pytest.mark.parametrize(
    ("role", "arguments", "tolerance"),
    [("trunk", {}, 0.0), ("trunk", {"trunk_cautious": True}, 0.0), ("cap", {}, 1e-5)],
)
def test_differentiable_step_gives_gradients_of_lr_weight_and_what_its_gradient_came_from(
    role: str, arguments: dict[str, Any], tolerance: float
) -> None:
    """From p = 2 with decay 0.5 and gradient 3: p - lr * 0.5 * p - lr, for AdamW's first step is a sign too."""
    lr = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    leaf = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    weight = leaf.clone()
    groups = [{"params": [("w", weight)], "stac_role": role}]
    optimizer = STAC(groups, lr=lr, weight_decay=0.5, eps=0.0, differentiable=True, **arguments)
    source = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weight.grad = 3 * source
    optimizer.step()
    gradients = torch.autograd.grad(weight.sum(), [lr, leaf, source])
    assert gradients[0].item() == pytest.approx(-0.5 * 2.0 - 1.0, abs=tolerance)
    assert gradients[1].item() == pytest.approx(1 - 0.25 * 0.5, abs=tolerance)
    assert gradients[2].item() == pytest.approx(0.0, abs=tolerance)


def test_default_path_is_the_one_torch_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    group = STAC([{"params": [nn.Parameter(torch.ones(2))], "stac_role": "trunk"}]).param_groups[0]

    def path(**flags: Any) -> str:
        return RULES["sign_momentum"].path(group["params"], {**group, **flags})

    assert (path(), path(foreach=False), path(foreach=True), path(fused=True)) == (
        "single",
        "single",
        "foreach",
        "fused",
    )
    assert path(foreach=True, trunk_cautious=True) == path(foreach=True, stochastic_rounding=True) == "single"
    assert path(foreach=True, trunk_state_dtype="int8") == "single"
    monkeypatch.setattr(_tensors, "is_foreach_faster", lambda params, differentiable: not differentiable)
    assert (path(), path(foreach=False), path(fused=True)) == ("foreach", "single", "fused")
    assert path(differentiable=True) == "single"
