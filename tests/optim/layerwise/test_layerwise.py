"""LARS, LAMB and RaLars beside what the table of rules tests: norms of every scale and cut, the originals, memory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark_memory import transient_bytes_of
from stac_optimizer.optim import LAMB, LARS, RaLars
from stac_optimizer.optim.layerwise.ralars import rectifications
from stac_optimizer.tensors.precision import arithmetic_dtype
from tests.optim.comparisons import UNITS
from tests.optim.layerwise import reference
from tests.optim.layerwise.cases import LAYERWISE
from tests.rule_case import RuleCase
from tests.rule_cases import random_gradients, step_with, zoo
from tests.support import assert_same_bits, set_units

each_case = pytest.mark.parametrize("case", LAYERWISE, ids=lambda case: case.name)
DEFAULTS = [case for case in LAYERWISE if case.name.endswith("-default")]
KINDS: dict[str, Any] = {"lars": LARS, "lamb": LAMB, "ralars": RaLars}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_blocks_packs_and_paths_agree_to_rounding(
    case: RuleCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for units in UNITS.values():
        set_units(monkeypatch, **units)
        for path in case.paths:
            params = zoo(dtype)
            optimizer = case.optimizer(params, path)
            for seed in range(3):
                step_with(optimizer, params, random_gradients(params, seed, skip={"layer.vector"} if seed == 1 else ()))
            state = [dict(optimizer.state[param]) for param in params.values()]
            ended.append(({name: param.detach() for name, param in params.items()}, state))
    # Sums in another order are another last bit in double precision, and a product and sum are rounded once or twice.
    rounding = torch.finfo(arithmetic_dtype(dtype)).eps
    stored = torch.finfo(dtype).eps if arithmetic_dtype(dtype) != dtype else 0.0
    for other in ended[1:]:
        torch.testing.assert_close(other, ended[0], rtol=16 * rounding + stored, atol=16 * rounding)


@each_kind
@pytest.mark.parametrize("numel", [40, 40_000], ids=["packed", "alone"])
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e19, 1e30], ids=str)
def test_norms_of_any_scale(kind: Any, numel: int, scale: float) -> None:
    """Weights so large or small that their squares are no numbers of float32; and in LARS, gradients too."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, numel // 2, generator=generator)
    grads = torch.randn(2, numel // 2, generator=generator)
    param = nn.Parameter(weights * scale)
    beside, eps = nn.Parameter(torch.ones(2, 2)), {} if kind is LARS else {"eps": 0.0}
    optimizer = kind([param, beside], lr=0.25, scale_clip=None, **eps)
    param.grad, beside.grad = grads * (scale if kind is LARS else 1.0), torch.ones(2, 2)
    optimizer.step()
    direction = grads.sign() if kind is LAMB else grads  # Adam's first step is one of signs, RAdam's the gradient
    expected = weights.double() - 0.25 * weights.double().norm() / direction.double().norm() * direction
    torch.testing.assert_close(param.detach().double() / scale, expected, rtol=1e-5, atol=1e-5)


@each_kind
def test_zero_norms_take_rate_one_and_empty_tensors_nothing(kind: Any) -> None:
    zero_weight, zero_grad = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.full((2, 2), 3.0))
    both, empty = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(0, 3))
    optimizer = kind([zero_weight, zero_grad, both, empty], lr=0.5, weight_decay=0.0)
    zero_weight.grad, zero_grad.grad = torch.full((2, 2), 4.0), torch.zeros(2, 2)
    both.grad, empty.grad = torch.zeros(2, 2), torch.zeros(0, 3)
    optimizer.step()
    step = 0.5 * (1.0 if kind is LAMB else 4.0)
    torch.testing.assert_close(zero_weight.detach(), torch.full((2, 2), -step))
    assert torch.equal(zero_grad, torch.full((2, 2), 3.0))
    assert torch.equal(both, torch.zeros(2, 2))


def test_lars_takes_vectors_as_they_are_and_decays_them() -> None:
    shapes = [(4,), (), (1, 4), (2, 2)]
    params = [nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
    for param in params:
        param.grad = torch.full_like(param, 8.0)
    LARS(params, lr=0.25, weight_decay=0.5, trust_coefficient=0.5).step()
    scaled = 2.0 - 0.25 * 0.5 * 4.0 / (16.0 + 0.5 * 4.0) * 9.0
    expected = [2.0 - 0.25 * 9.0, 2.0 - 0.25 * 9.0, scaled, scaled]
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), torch.full_like(param, value))


@each_kind
def test_nan_shows_in_all_of_a_parameter_and_in_no_other(kind: Any) -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))]
    for param in params:
        param.grad = torch.ones(2, 3)
    params[0].grad[0, 0] = torch.nan  # type: ignore[index]
    kind(params, lr=0.1).step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def test_first_step_enters_the_buffer_undampened_as_in_sgd() -> None:
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    arguments: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    optimizers = LARS([ours], **arguments), torch.optim.SGD([theirs], **arguments)  # a vector, so the rate is 1
    for seed in range(3):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        torch.testing.assert_close(ours, theirs)
    assert optimizers[0].state[ours].keys() - {"step"} == optimizers[1].state[theirs].keys()


def test_nesterov_and_dampening_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="nesterov"):
        LARS([nn.Parameter(torch.ones(2))], momentum=0.9, nesterov=True, dampening=0.1)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("told", [True, False], ids=["read", "unread"])
def test_rectification_is_that_of_the_paper(beta2: float, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the host may not read counters, as in a captured or compiled step."""
    if not told:
        monkeypatch.setattr("stac_optimizer.optim.layerwise.ralars.known_counts", lambda steps: None)
        monkeypatch.setattr("stac_optimizer.rule.moments.known_counts", lambda steps: None)
    for count in (1, 2, 4, 5, 6, 7, 50, 3000):
        for least in (False, True):
            group = {"betas": (0.9, beta2), "force_adaptive_momentum": least}
            (rate,) = rectifications([torch.tensor(float(count))], group)
            expected = reference.rectification(count, beta2)
            assert float(rate) == pytest.approx(float(least) if expected is None else expected, rel=1e-7)


@each_case
def test_steps_whose_counters_are_not_read_agree(case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    read, unread = zoo(torch.float32), zoo(torch.float32)
    optimizers = case.optimizer(read, "foreach"), case.optimizer(unread, "foreach")
    for seed in range(7):
        step_with(optimizers[0], read, random_gradients(read, seed))
        with monkeypatch.context() as patch:
            for module in ("rule.moments", "rule.execution.parts", "optim.layerwise.ralars", "optim.layerwise.lars"):
                patch.setattr(f"stac_optimizer.{module}.known_counts", lambda steps: None)
            step_with(optimizers[1], unread, random_gradients(unread, seed))
    for name, param in read.items():
        torch.testing.assert_close(unread[name], param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_compiled_and_capturable_steps_agree(case: RuleCase) -> None:
    torch._dynamo.reset()
    eager, traced = (
        {"matrix": nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), "vector": nn.Parameter(torch.ones(5))}
        for _ in range(2)
    )
    lr = torch.tensor(2.0**-6)
    optimizers = case.optimizer(eager, "single", lr=lr), case.optimizer(traced, "foreach", lr=lr, capturable=True)
    step = torch.compile(optimizers[1].step, fullgraph=True, backend="eager")
    for seed in range(2):
        gradients = random_gradients(eager, seed)
        step_with(optimizers[0], eager, gradients)
        for name, param in traced.items():
            param.grad = gradients[name]
        step()
    for name, param in eager.items():
        torch.testing.assert_close(traced[name], param, rtol=1e-5, atol=1e-6)


@each_kind
def test_derivative_by_lr_is_finite_where_norms_are_zero(kind: Any) -> None:
    lr = torch.tensor(0.25, requires_grad=True)
    weights = [torch.ones(2, 2, requires_grad=True).clone(), torch.zeros(2, 2, requires_grad=True).clone()]
    optimizer = kind(weights, lr=lr, differentiable=True)
    for weight, value in zip(weights, (2.0, 0.5), strict=True):
        weight.grad = torch.full((2, 2), value)
    optimizer.step()
    (derivative,) = torch.autograd.grad(weights[0].sum() + weights[1].sum(), lr)
    assert derivative.isfinite()
    assert derivative < 0


@each_kind
@pytest.mark.parametrize("arguments", [{}, {"foreach": True, "weight_decay": 0.1}], ids=str)
def test_step_on_a_large_tensor_holds_little_at_a_time(kind: Any, arguments: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(8192, 2048))
    optimizer = kind([weight], lr=0.125, **arguments)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert 0 < transient_bytes_of(optimizer.step, torch.device("cpu")) <= 32 * 2**20


@each_kind
def test_large_float16_weights_step_as_small_ones(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, whose state is rounded between measuring and update: squares that vanish must not make steps long."""
    ended = []
    for block in (1 << 40, 64):
        set_units(monkeypatch, block=block)
        param = nn.Parameter(torch.linspace(-1, 1, 400, dtype=torch.float16).view(20, 20))
        optimizer = kind([param], lr=0.01)
        for seed in range(3):
            param.grad = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)).mul_(1e-4).half()
            optimizer.step()
        ended.append(param.detach())
        assert (param - torch.linspace(-1, 1, 400).view(20, 20)).norm() <= 0.031 * 11.6
    torch.testing.assert_close(ended[1], ended[0], rtol=1e-3, atol=1e-4)


def originals() -> Any:
    """The module ``holocron.optim``, without the package's models and what they need."""
    if "holocron" not in sys.modules:
        spec = importlib.util.find_spec("holocron")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("needs holocron (pylocron)")
        package = ModuleType("holocron")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["holocron"] = package
    return importlib.import_module("holocron.optim")


def trained(build: Any, steps: int, *, shape: tuple[int, ...] = (6, 5)) -> tuple[Tensor, torch.optim.Optimizer]:
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer: torch.optim.Optimizer = build([param])
    for seed in range(1, steps + 1):
        param.grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"weight_decay": 0.1}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    ids=str,
)
def test_lars_and_holocron(arguments: dict[str, Any]) -> None:
    """Equal without momentum; with it at the first step alone: there the present rate multiplies the whole buffer."""
    theirs = originals().LARS
    for steps in (1, 4):
        expected, _ = trained(lambda params: theirs(params, lr=0.1, **arguments), steps)
        actual, _ = trained(lambda params: LARS(params, lr=0.1, **arguments), steps)
        is_equal = steps == 1 or "momentum" not in arguments
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12) == is_equal
    ours, scaled = (trained(lambda params, k=kind: k(params, lr=0.1), 1, shape=(9,))[0] for kind in (LARS, theirs))
    assert not torch.allclose(ours, scaled)


def test_lamb_and_holocron() -> None:
    """Their averages keep their bias, which scales a step: no matter where it is scaled anew, and has no decay."""
    theirs = originals().LAMB
    for decay, is_equal in ((0.0, True), (0.1, False)):
        arguments: dict[str, Any] = {"lr": 0.1, "eps": 0.0, "weight_decay": decay}
        expected, _ = trained(lambda params, a=arguments: theirs(params, **a), 4)
        actual, _ = trained(lambda params, a=arguments: LAMB(params, **a), 4)
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12) == is_equal


@pytest.mark.parametrize("forced", [False, True])
def test_ralars_and_holocron(forced: bool) -> None:
    """Equal but for the fifth step, which is the first that holocron rectifies, with lengths above 4 and not 5."""
    theirs = originals().RaLars
    arguments: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "force_adaptive_momentum": forced}
    for steps in (4, 5):
        expected, _ = trained(lambda params: theirs(params, **arguments), steps)
        actual, _ = trained(lambda params: RaLars(params, **arguments), steps)
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9) == (steps == 4)


def test_ralars_moves_along_the_steps_of_torchs_radam() -> None:
    """Of both without decay; torch adds ε to √v before its correction."""
    start, _ = trained(lambda params: RaLars(params, lr=0.0), 0)
    shape_of = {}
    for steps in (5, 6, 9):
        before, after = (
            [trained(lambda params, kind=kind: kind(params, lr=1e-9, eps=0.0), n)[0] for n in (steps - 1, steps)]
            for kind in (RaLars, torch.optim.RAdam)
        )
        ours, theirs = before[1] - before[0], after[1] - after[0]
        shape_of[steps] = (ours / ours.norm() - theirs / theirs.norm()).abs().max().item()
    assert max(shape_of.values()) < 1e-5, shape_of
    assert start.norm() > 0


@each_kind
def test_lr_may_be_an_integer_or_a_tensor(kind: Any) -> None:
    ended = [trained(lambda params, lr=lr: kind(params, lr=lr), 2)[0] for lr in (1, 1.0, torch.tensor(1.0))]
    assert_same_bits(ended[1], ended[0])
    np.testing.assert_allclose(ended[2].numpy(), ended[0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", [LARS, RaLars])
@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float32, 1e-42), (torch.bfloat16, 1e-39)], ids=str)
def test_vanishing_gradients_leave_weights_where_they_are(kind: Any, dtype: torch.dtype, gradient: float) -> None:
    """A confident softmax gives such; the weights' norm by theirs would be infinite."""
    weight = nn.Parameter(torch.ones(2, 4, dtype=dtype))
    weight.grad = torch.full((2, 4), gradient, dtype=dtype)
    kind([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(2, 4, dtype=dtype))
