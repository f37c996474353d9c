"""What the relatives of Adam are each made for, and numbers at the edges; the table of rules tests the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmark_memory import transient_bytes_of
from stac_optimizer.optim import AdaBelief, AdamP, Adan, AdEMAMix, TAdam
from stac_optimizer.optimizer import RuleOptimizer
from tests.optim.adaptive.cases import ADAPTIVE
from tests.optim.comparisons import assert_traced_equals_eager
from tests.rule_case import RuleCase
from tests.rule_cases import zoo
from tests.support import set_units

Build = Callable[..., RuleOptimizer]
KINDS: tuple[Build, ...] = (AdaBelief, AdamP, Adan, AdEMAMix, TAdam)
each_kind = pytest.mark.parametrize("kind", KINDS)


def run(kind: Build, gradients: list[Tensor], *, start: Tensor | None = None, **arguments: Any) -> RuleOptimizer:
    """Steps with these gradients, from zeros."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    optimizer = kind([weight], **{"lr": 0.125, **arguments})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return optimizer


def weight_of(optimizer: RuleOptimizer) -> Tensor:
    weight: Tensor = optimizer.param_groups[0]["params"][0]
    return weight.detach()


def state_of(optimizer: RuleOptimizer) -> dict[str, Tensor]:
    return dict(optimizer.state[optimizer.param_groups[0]["params"][0]])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name == "ademamix-warm-up" else pytest.mark.slow)
        for case in ADAPTIVE
        if case.name.endswith(("default", "warm-up", "projected"))
    ],
)
def test_compiled_step_agrees(case: RuleCase) -> None:
    """Where counters are not known while the step is traced."""
    held = []
    for _ in range(2):
        params = {name: param for name, param in zoo(torch.float32).items() if name in ("layer.matrix", "layer.vector")}
        held.append((params, case.optimizer(params, "foreach")))
    assert_traced_equals_eager(*held, by_bits=False)


@each_kind
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1e18], ids=str)
def test_gradients_of_any_size_step_by_finite_numbers(kind: Build, size: float) -> None:
    optimizer = run(kind, [torch.full((3, 4), size)] * 5, start=torch.ones(3, 4))
    moved = (weight_of(optimizer) - 1).abs()
    assert moved.isfinite().all()
    assert moved.max() <= 5 * 0.125 * 4.0
    assert all(value.isfinite().all() for value in state_of(optimizer).values()) or size == 1e18
    assert size or not moved.any()


@each_kind
def test_float16_steps_as_float32_to_its_rounding(kind: Build) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 5, generator=generator).half() for _ in range(8)]
    start = torch.randn(4, 5, generator=generator).half()
    low = run(kind, gradients, start=start, lr=0.01)
    high = run(kind, [gradient.float() for gradient in gradients], start=start.float(), lr=0.01)
    torch.testing.assert_close(weight_of(low).float(), weight_of(high), rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Adan, torch.float32),  # has the most state
        *((kind, dtype) for kind in (TAdam, AdamP) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_step_on_a_large_tensor_holds_little_at_a_time(kind: Build, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(8192, 2048, dtype=dtype))
    optimizer = kind([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert 0 < transient_bytes_of(optimizer.step, torch.device("cpu")) <= 32 * 2**20


def test_adan_takes_no_difference_in_the_first_step_and_keeps_the_gradient() -> None:
    gradient = torch.tensor([3.0, -0.5])
    state = state_of(run(Adan, [gradient] * 3))
    assert not state["exp_avg_diff"].any()
    assert torch.equal(state["previous_grad"], gradient)
    state = state_of(run(Adan, [gradient, 3 * gradient], betas=(0.5, 0.75, 0.5)))
    torch.testing.assert_close(state["exp_avg_diff"], 0.25 * 2 * gradient)


def test_ademamix_without_momentum_holds_one_average_less() -> None:
    gradients = [torch.ones(3)] * 2
    assert state_of(run(AdEMAMix, gradients, betas=(0.0, 0.9, 0.99))).keys() == {"step", "exp_avg_slow", "exp_avg_sq"}


def test_ademamix_steps_as_without_warm_up_once_that_is_over() -> None:
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(4)]
    plain, warm = run(AdEMAMix, gradients), run(AdEMAMix, gradients, t_alpha_beta3=1)
    torch.testing.assert_close(weight_of(warm), weight_of(plain), rtol=1e-12, atol=0)
    slow = state_of(run(AdEMAMix, gradients[:1], t_alpha_beta3=2, betas=(0.25, 0.9, 0.5)))["exp_avg_slow"]
    half_way = 2 / (1 / math.log(0.25) + 1 / math.log(0.5))
    torch.testing.assert_close(slow, (1 - math.exp(half_way)) * gradients[0])


def test_tadam_with_infinite_degrees_of_freedom_is_adam() -> None:
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(6)]
    optimizer = run(TAdam, gradients, weight_decay=0.1, dof=math.inf)
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.125, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient
        adam.step()
    torch.testing.assert_close(weight_of(optimizer), weight.detach(), rtol=1e-12, atol=1e-14)
    assert state_of(optimizer)["exp_avg_weight"].item() == pytest.approx(9.0)


def test_tadam_trusts_an_outlying_gradient_less() -> None:
    usual = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    averages = [
        state_of(run(TAdam, [*usual, torch.full((50,), 1e3)], dof=dof, betas=(0.9, 0.99)))["exp_avg"].mean().item()
        for dof in (1.0, math.inf)
    ]
    assert averages[0] < 1.0
    assert averages[1] > 90.0


def test_tadam_holds_one_number_of_a_parameter_in_full_precision() -> None:
    weight = state_of(run(TAdam, [torch.ones(3, 4, dtype=torch.bfloat16)]))["exp_avg_weight"]
    assert (weight.shape, weight.dtype) == ((), torch.float32)


def test_adamp_takes_what_is_along_the_weights_from_the_step() -> None:
    """By rows where all are orthogonal to their gradients; by the whole where that alone is; not of vectors."""
    start = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    by_row = torch.tensor([[0.0, 3.0], [-1.0, 0.0]]).double()
    optimizer = run(AdamP, [by_row], start=start, weight_decay=0.5)
    decayed = start * (1 - 0.125 * 0.5 * 0.1)
    torch.testing.assert_close(weight_of(optimizer), decayed - 0.125 * by_row.sign(), rtol=0, atol=1e-7)
    of_whole = torch.tensor([[1.0, 3.0], [-1.0, -2.0]]).double()
    step = of_whole.sign()
    step -= start * (start * step).sum() / (start * start).sum()
    optimizer = run(AdamP, [of_whole], start=start, weight_decay=0.5)
    torch.testing.assert_close(weight_of(optimizer), decayed - 0.125 * step, rtol=0, atol=1e-7)
    for kept in (
        run(AdamP, [by_row.flatten()], start=start.flatten(), weight_decay=0.5),
        run(AdamP, [by_row], start=start, weight_decay=0.5, delta=0.0),
    ):
        expected = start * (1 - 0.125 * 0.5) - 0.125 * by_row.sign()
        torch.testing.assert_close(weight_of(kept).view(2, 2), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 40), (1, 5, 30), (30, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamp_sums_up_rows_that_are_cut(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(5)]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    weights = []
    for block, pack in ((1 << 40, 0), (16, 0), (1 << 40, 1000)):
        set_units(monkeypatch, block=block, pack=pack)
        weights.append(weight_of(run(AdamP, gradients, start=start, delta=3.0, weight_decay=0.1)))
    tolerance = 16 * torch.finfo(dtype).eps
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=tolerance, atol=tolerance)


REFUSED: list[tuple[Build, dict[str, Any], type[Exception], str]] = [
    (TAdam, {"betas": (0.5, 0.9)}, ValueError, r"betas\[0\] must be a number in \(0.5, 1\), got 0.5"),
    (TAdam, {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
    (TAdam, {"dof": 0.0}, ValueError, "dof must be a number above 0, .* got 0.0"),
    (TAdam, {"dof": math.nan}, ValueError, "dof must be a number above 0, .* got nan"),
    (TAdam, {"dof": True}, TypeError, "dof must be a number above 0, .* got True"),
    (AdEMAMix, {"t_alpha_beta3": 0}, ValueError, r"t_alpha_beta3 must be an integer in \[1, inf\), got 0"),
    (AdEMAMix, {"t_alpha_beta3": 10.0}, TypeError, "t_alpha_beta3 must be an integer"),
    (AdEMAMix, {"alpha": -1.0}, ValueError, "alpha must be"),
    (Adan, {"betas": (0.9, 0.999)}, ValueError, "betas must be a tuple of three numbers"),
    (AdamP, {"delta": -0.1}, ValueError, "delta must be"),
    (AdamP, {"nesterov": 1}, TypeError, "nesterov must be"),
    (AdaBelief, {"eps": math.inf}, ValueError, "eps must be"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), REFUSED)
def test_wrong_argument_is_refused(
    kind: Build, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        kind([nn.Parameter(torch.ones(2))], **arguments)


def test_infinite_degrees_of_freedom_are_adam_where_squares_overflow() -> None:
    for gradient, eps in (([1e16, -1e16], 1e-8), ([3.0, -0.5], 0.0)):
        ours = weight_of(run(TAdam, [torch.tensor(gradient)], dof=math.inf, eps=eps))
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor(gradient)
        torch.optim.Adam([weight], lr=0.125, eps=eps).step()
        torch.testing.assert_close(ours, weight.detach())


def test_matrices_without_rows_step_together() -> None:
    params = [nn.Parameter(torch.ones(0, 3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(0, 3)
    AdamP(params).step()


def test_checkpoint_of_complex_numbers_loads_into_wider_ones() -> None:
    narrow, wide = (nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.complex64, torch.complex128))
    saved, loaded = TAdam([narrow]), TAdam([wide])
    narrow.grad = torch.ones(3, dtype=torch.complex64)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state[wide]["exp_avg_weight"].dtype == torch.float32
