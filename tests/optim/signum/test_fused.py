"""The kernel in C++ that ``fused=True`` runs on the CPU: the bits of the default path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import Signum
from stac_optimizer.optim.signum.arithmetic import SignUpdate
from stac_optimizer.optim.signum.fused import cpu, devices
from stac_optimizer.optim.signum.single import single_tensor
from stac_optimizer.tensors import codes
from tests.optim.signum.fused_runs import assert_same_runs, give_gradients, trunk_of, weights, without_payload
from tests.support import assert_same_bits, set_units

VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {"weight_decay": 0.1}),
    "float32-cautious": (torch.float32, {"trunk_cautious": True}),
    "float32-bfloat16": (torch.float32, {"trunk_state_dtype": torch.bfloat16}),
    "float64": (torch.float64, {"weight_decay": 0.1}),
    "float64-cautious-maximize": (torch.float64, {"trunk_cautious": True, "maximize": True}),
    "float16-momentum-0-maximize": (torch.float16, {"trunk_momentum": 0.0, "maximize": True}),
    "float16-int8-cautious": (torch.float16, {"trunk_state_dtype": torch.int8, "trunk_cautious": True}),
    "bfloat16-rounding": (torch.bfloat16, {"stochastic_rounding": True, "weight_decay": 0.1}),
    "bfloat16-int8": (torch.bfloat16, {"trunk_state_dtype": torch.int8}),
    "bfloat16-int8-rounding-cautious": (
        torch.bfloat16,
        {"trunk_state_dtype": torch.int8, "stochastic_rounding": True, "trunk_cautious": True, "rounding_seed": 3},
    ),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "arguments"), VARIANTS.values(), ids=list(VARIANTS))
def test_kernel_agrees_by_bits(
    dtype: torch.dtype, arguments: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever moves between steps: lr as a number and as a tensor, decay, momentum, shapes, gradients."""
    monkeypatch.setattr(cpu, "TASK_NUMEL", 8 * 128)
    set_units(monkeypatch, block=1000, pack=100, shared=shared)

    def compare(more: int, **changes: Any) -> None:
        given = {**arguments, **changes}
        params, fused_params = weights(dtype, more=more), weights(dtype, more=more)
        default, fused = trunk_of(params, **given), trunk_of(fused_params, fused=True, **given)
        for seed in range(6):
            for held, optimizer in ((params, default), (fused_params, fused)):
                give_gradients(held, seed)
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"] * 0.9
                optimizer.step()
            assert_same_runs(default, fused)

    compare(0)
    compare(3, lr=torch.tensor([0.02]), **{"trunk_momentum": 0.5, **arguments, "weight_decay": 0.25})


@pytest.mark.parametrize(
    ("arguments", "by_torch"),
    [({}, ["sliced", "matrix"]), ({"trunk_state_dtype": torch.int8}, ["sliced", "matrix", "image"])],
    ids=str,
)
def test_kernel_is_what_runs(arguments: dict[str, Any], by_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing above would show that it never does. What lies in other layouts than its codes, gradient, is left out."""
    left: list[Tensor] = []

    def note(work: SignUpdate) -> None:
        left.extend(work.params)
        single_tensor(work)

    monkeypatch.setattr(devices, "single_tensor", note)
    params = weights(torch.float32)
    optimizer = trunk_of(params, fused=True, **arguments)
    give_gradients(params, 0)
    params["layer.matrix"].grad = torch.ones(256, 40).t()
    for name in ("transposed", "image"):
        params[f"layer.{name}"].grad = torch.ones_like(params[f"layer.{name}"])
    optimizer.step()
    assert {id(param) for param in left} == {id(params[f"layer.{name}"]) for name in by_torch}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_numbers_of_16_bits(dtype: torch.dtype) -> None:
    """As weights, gradients and averages, converted and rounded: ties, subnormals, overflow, infinity and NaN."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    runs = []
    for fused in (None, True):
        param = nn.Parameter(numbers.clone())
        optimizer = Signum([param], lr=0.0, momentum=0.7, fused=fused)
        for step, (lr, decay) in enumerate(((1e-3, 0.1), (2.0**-20, 0.3), (7.0, 1e-4))):
            param.grad = numbers.roll(12345 * step)
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
            optimizer.step()
        runs.append([without_payload(tensor) for tensor in (param, optimizer.state[param]["exp_avg"])])
    assert_same_bits(runs[0], runs[1])


def test_codes_of_averages_of_all_sizes() -> None:
    """From subnormal ones to the largest, in whole blocks and shorter ones, of one size and of many."""
    generator = torch.Generator().manual_seed(0)
    runs = []
    exponents = torch.empty(300, 1).uniform_(-44, 38, generator=generator)
    spread = torch.empty(300, 200).normal_(generator=generator) * torch.linspace(0, 3, 300).unsqueeze(1)
    grads = torch.randn(300, 200, generator=generator) * 10 ** (exponents + spread).clamp(-45, 38)
    grads[:20, ::3] = 0
    for fused in (None, True):
        param = nn.Parameter(torch.zeros(300, 200))
        optimizer = Signum([param], lr=1.0, state_dtype=torch.int8, fused=fused)
        for _ in range(5):
            param.grad = grads.clone()
            optimizer.step()
        runs.append([param, optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_scale"]])
    assert_same_bits(runs[0], runs[1])
    scales = runs[0][2]
    assert scales.min() < codes.LEAST_SCALE < 1e30 < scales.max()
    assert runs[0][1].unique().numel() == 2 * 127 + 1


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="this torch wants gradients of the weight's dtype")
@pytest.mark.parametrize("state_dtype", [None, torch.int8])
def test_gradients_in_double_precision_give_the_bits_of_the_default_path(state_dtype: torch.dtype | None) -> None:
    def run(**arguments: Any) -> STAC:
        params = weights(torch.float32)
        optimizer = trunk_of(params, trunk_state_dtype=state_dtype, **arguments)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for param in params.values():
                as_any: Any = param
                as_any.grad_dtype = torch.float64
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        return optimizer

    assert_same_runs(run(fused=True), run())


def test_weights_that_lie_in_one_buffer() -> None:
    """As flat buffers hold them: none begins where the instructions for vectors would like it to."""
    sizes = [2 * 128 + index % 5 for index in range(21)] + [60] * 6

    def run(**arguments: Any) -> tuple[Tensor, STAC]:
        flat = torch.linspace(-1, 1, sum(sizes))
        held = {f"layer.{index}": nn.Parameter(part) for index, part in enumerate(flat.split(sizes))}
        optimizer = trunk_of(held, **arguments)
        for seed in range(3):
            give_gradients(held, seed)
            optimizer.step()
        return flat, optimizer

    flat, fused = run(fused=True)
    default_flat, default = run()
    assert_same_runs(fused, default)
    assert_same_bits(without_payload(flat), without_payload(default_flat))


def test_scaled_gradients_give_the_bits_of_unscaled_ones() -> None:
    """As a GradScaler hands them over; by a power of two the division is exact. A step with an infinite one is none."""
    params, scaled_params = weights(torch.float32), weights(torch.float32)
    default, scaled = trunk_of(params), trunk_of(scaled_params, fused=True)
    attributes: Any = scaled
    for seed in (0, 1):
        give_gradients(params, seed)
        default.step()
        for found_inf in (1.0, 0.0):
            give_gradients(scaled_params, seed, 2.0**10)
            attributes.grad_scale = torch.tensor(2.0**10)
            attributes.found_inf = torch.tensor(found_inf)
            scaled.step()
    assert_same_runs(default, scaled)


def test_trunk_steps_beside_the_fused_cap() -> None:
    """A model of both roles under one flag: the trunk's bits are its own, the cap's those of torch's fused kernel."""

    def model_of() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))

    models = [model_of() for _ in range(3)]
    fused, default = STAC(models[0], fused=True), STAC(models[1])
    adamw = torch.optim.AdamW(models[2][1].parameters(), weight_decay=0.0, fused=True)
    for seed in range(3):
        for model, optimizer in zip(models, (fused, default, adamw), strict=True):
            give_gradients(dict(model.named_parameters()), seed)
            optimizer.step()
    assert_same_bits(models[0][0].state_dict(), models[1][0].state_dict())
    assert_same_bits(models[0][1].state_dict(), models[2][1].state_dict())


def test_default_device_of_tensors_does_not_matter() -> None:
    """Whatever is made for a kernel on the CPU must lie there."""
    arguments: dict[str, Any] = {"weight_decay": 0.1, "trunk_cautious": True}
    params, fused_params = weights(torch.float32), weights(torch.float32)
    default, fused = trunk_of(params, **arguments), trunk_of(fused_params, fused=True, **arguments)
    for seed in (0, 1):
        for held, optimizer in ((params, default), (fused_params, fused)):
            give_gradients(held, seed)
            with torch.device("meta"):
                optimizer.step()
    assert_same_runs(default, fused)


def test_masked_steps_from_negative_zero() -> None:
    """Whose sign the product of a step with its mask may turn."""
    weights_after = []
    for fused in (None, True):
        param = nn.Parameter(torch.full((300,), -0.0))
        optimizer = Signum([param], lr=0.1, cautious=True, fused=fused)
        param.grad = -torch.ones(300)
        optimizer.step()
        with torch.no_grad():
            param.fill_(-0.0)
        optimizer.state[param]["exp_avg"].copy_(torch.linspace(-1, 1, 300))
        param.grad = torch.full((300,), 0.01)
        optimizer.step()
        weights_after.append(param.detach())
    assert_same_bits(weights_after[1], weights_after[0])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shape", "arguments"),
    [
        pytest.param(torch.float32, (), {"weight_decay": 0.1}, id="scalar"),
        pytest.param(torch.float64, (40,), {"momentum": 0.0}, id="narrow-gradient"),
        pytest.param(torch.float64, (40,), {"state_dtype": torch.bfloat16}, id="narrow-average"),
    ],
)
def test_learning_rates_as_tensors_of_double_precision(
    dtype: torch.dtype, shape: tuple[int, ...], arguments: dict[str, Any], foreach: bool
) -> None:
    """Of two tensors without dimensions torch computes the product in the wider dtype."""
    if dtype == torch.float64 and not hasattr(nn.Parameter, "grad_dtype"):
        pytest.skip("this torch wants gradients of the weight's dtype")
    after = []
    paths: tuple[dict[str, Any], ...] = ({"foreach": foreach}, {"fused": True})
    for flags in paths:
        param: Any = nn.Parameter(torch.full(shape, 0.2, dtype=dtype))
        lr = torch.tensor(0.17, dtype=torch.float64)
        optimizer = Signum([param], lr=lr if "fused" in flags or not foreach else 0.17, **arguments, **flags)
        if dtype == torch.float64:
            param.grad_dtype = torch.float32
        param.grad = torch.ones(shape)
        optimizer.step()
        after.append(param.detach())
    assert_same_bits(after[1], after[0])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("wide", ["average", "gradient"])
def test_wider_averages_and_gradients_step_alike_on_all_paths(wide: str, foreach: bool) -> None:
    """By a number, and by a tensor of the same value."""
    if wide == "gradient" and not hasattr(nn.Parameter, "grad_dtype"):
        pytest.skip("this torch wants gradients of the weight's dtype")
    after = []
    lr: float | Tensor
    for lr, path in ((0.1, None), (0.1 if foreach else torch.tensor(0.1, dtype=torch.float64), foreach)):
        param: Any = nn.Parameter(torch.linspace(0, 1, 1000))
        optimizer = Signum([param], lr=lr, weight_decay=0.1, foreach=path)
        if wide == "gradient":
            param.grad_dtype = torch.float64
        for _ in range(3):
            param.grad = torch.linspace(-1, 1, 1000, dtype=torch.float64 if wide == "gradient" else torch.float32)
            optimizer.step()
            if wide == "average":
                optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].double()
        after.append(param.detach())
    assert_same_bits(after[1], after[0])
