"""Muon's steps: against singular value decompositions and torch's Muon, on every shape, scale and layout.

What every rule is tested for stands in ``test_rules.py``; arguments, state and roles in ``test_muon_roles.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark_memory import transient_bytes_of
from stac_optimizer.optim import Muon
from stac_optimizer.optim.muon import matrices
from stac_optimizer.optim.muon.newton_schulz import signs_of_stack
from tests import reference
from tests.optim.comparisons import as_array
from tests.support import assert_same_bits

DTYPES = ["float32", "bfloat16"]
PATHS = [pytest.param({"foreach": False}, id="single"), pytest.param({"foreach": True}, id="foreach")]
each_path = pytest.mark.parametrize("path", PATHS)
each_dtype = pytest.mark.parametrize("ns_dtype", DTYPES)
# What five iterations with the usual coefficients make of singular values that are not tiny: the polynomial's least and
# greatest, and beyond them what products in bfloat16 may; measured 0.01.
LEAST, MOST, BEYOND = 0.68, 1.21, 0.03


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def muon(params: Any, **arguments: Any) -> Muon:
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "ns_dtype": "float32", "foreach": False}
    return Muon(params, **{**options, **arguments})


def first_steps(*grads: Tensor, **arguments: Any) -> list[Tensor]:
    """What the first step moves zeros by, downhill."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    optimizer = muon(params, **arguments)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    return [-param.detach() for param in params]


def first_step(grad: Tensor, **arguments: Any) -> Tensor:
    return first_steps(grad, **arguments)[0]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of two matrices, relative to the size of the second."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@each_path
@each_dtype
def test_singular_values_of_a_step_are_within_the_bounds_of_the_polynomial(ns_dtype: str, path: dict[str, Any]) -> None:
    shapes = [(24, 24), (24, 64), (64, 24), (20, 200), (64, 64), (3, 128), (1, 50)]
    grads = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    beyond = BEYOND * (ns_dtype == "bfloat16")
    for grad, step in zip(grads, first_steps(*grads, ns_dtype=ns_dtype, adjust_lr="spectral", **path), strict=True):
        rows, columns = grad.shape
        u, before, vh = torch.linalg.svd(grad.double(), full_matrices=False)
        sign = step.double() / (rows / columns) ** 0.5
        after = torch.linalg.svdvals(sign)
        not_tiny = before > 0.02 * before.norm()
        assert int(not_tiny.sum()) >= len(before) / 2
        assert after.max() <= MOST + beyond
        assert after[: int(not_tiny.sum())].min() >= LEAST - beyond
        # In the directions of the gradient: what each of its singular vectors is mapped to.
        gains = torch.einsum("ri,rc,ic->i", u, sign, vh)[not_tiny]
        assert gains.min() >= LEAST - beyond
        assert gains.max() <= MOST + beyond


@pytest.mark.parametrize("ns_steps", [5, 10])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(8, 32), (16, 64), (64, 8)], ids=str)
def test_steep_spectra_stay_within_the_bounds(shape: tuple[int, int], power: float, ns_steps: int) -> None:
    """Where bfloat16 rounds eigenvalues of Gram matrices to below 0."""
    for seed in range(12):
        u, _, vh = torch.linalg.svd(randn(*shape, seed=seed).double(), full_matrices=False)
        values = torch.arange(1, min(shape) + 1).double() ** -power
        step = first_step((u * values) @ vh, ns_dtype="bfloat16", ns_steps=ns_steps, adjust_lr="spectral")
        sign = step.double() / (shape[0] / shape[1]) ** 0.5
        assert torch.linalg.matrix_norm(sign, 2) <= MOST + BEYOND


@each_dtype
@pytest.mark.parametrize("shape", [(64, 64), (64, 1024)], ids=str)
def test_polynomial_without_its_highest_term_nears_one(shape: tuple[int, int], ns_dtype: str) -> None:
    """Of which torch's product on the CPU forgets the middle one."""
    step = first_step(randn(*shape), ns_dtype=ns_dtype, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=12)
    sign = step / (0.2 * max(shape) ** 0.5)
    assert torch.linalg.matrix_norm(sign, 2) <= 1.03
    assert torch.linalg.svdvals(sign).median() >= 0.97


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@each_path
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch(nesterov: bool, adjust_lr: str, path: dict[str, Any]) -> None:
    """Averages to the bit; steps as far as rounding in bfloat16 lets them, each begun from the same weights."""
    shapes = [(24, 24), (64, 24), (24, 64), (20, 200), (96, 320)]
    ours, theirs = ([nn.Parameter(randn(*shape)) for shape in shapes] for _ in range(2))
    given: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizer = muon(ours, **given, adjust_lr=adjust_lr, ns_dtype="bfloat16", **path)
    expected = torch.optim.Muon(theirs, **given, adjust_lr_fn=adjust_lr)
    for seed in range(6):
        decayed = [param.detach() * (1 - 0.01 * 0.1) for param in ours]
        for index, (param, other) in enumerate(zip(ours, theirs, strict=True)):
            other.data.copy_(param.data)
            param.grad = other.grad = randn(*param.shape, seed=100 * seed + index)
        optimizer.step()
        expected.step()
        for param, other, old in zip(ours, theirs, decayed, strict=True):
            assert_same_bits(optimizer.state[param]["exp_avg"], expected.state[other]["momentum_buffer"])
            assert distance(param.detach() - old, other.detach() - old) <= 0.06  # measured 0.047


@each_path
def test_products_in_bfloat16_are_near_those_in_float64(path: dict[str, Any]) -> None:
    grads = [randn(*shape, seed=seed) for seed, shape in enumerate([(24, 24), (24, 64), (20, 200), (96, 320)])]
    exact = first_steps(*[grad.double() for grad in grads], ns_dtype=None, **path)
    for dtype, most in (("bfloat16", 0.05), ("float32", 1e-5)):
        for step, other in zip(first_steps(*grads, ns_dtype=dtype, **path), exact, strict=True):
            assert distance(step, other) <= most


@each_dtype
def test_many_alike_step_as_one_by_one(ns_dtype: str) -> None:
    grads = [*(randn(24, 64, seed=seed) for seed in range(4)), randn(64, 24, seed=5), randn(3, 5), randn(2, 12, 2, 64)]
    for alone, together in zip(
        first_steps(*grads, ns_dtype=ns_dtype), first_steps(*grads, ns_dtype=ns_dtype, foreach=True), strict=True
    ):
        assert distance(together, alone) <= (0.03 if ns_dtype == "bfloat16" else 1e-5)


def test_matrices_of_one_shape_transposed_or_in_blocks_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(stack: Tensor, *arguments: Any) -> Tensor:
        seen.append(tuple(stack.shape))
        return signs_of_stack(stack, *arguments)

    monkeypatch.setattr(matrices, "signs_of_stack", watched)
    grads = [randn(6, 10), randn(10, 6), randn(3, 5), randn(6, 5, 2)]
    first_steps(*grads, foreach=True)
    assert sorted(seen) == [(1, 3, 5), (3, 6, 10)]
    seen.clear()
    first_steps(randn(18, 10), randn(30, 6), foreach=True, row_blocks=3)
    assert seen == [(6, 6, 10)]
    seen.clear()
    first_steps(*grads, foreach=False)
    assert len(seen) == len(grads)


@each_dtype
def test_transposes_step_as_transposes(ns_dtype: str) -> None:
    for shape in ((24, 64), (20, 30), (1, 50)):
        grad = randn(*shape)
        step = first_step(grad, ns_dtype=ns_dtype)
        assert_same_bits(first_step(grad.t().contiguous(), ns_dtype=ns_dtype), step.t())
        assert_same_bits(first_step(grad.t(), ns_dtype=ns_dtype), step.t())


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original", "spectral"])
@each_dtype
def test_blocks_and_experts_step_as_parameters_of_their_own(ns_dtype: str, adjust_lr: str) -> None:
    given: dict[str, Any] = {"ns_dtype": ns_dtype, "adjust_lr": adjust_lr}
    blocks = [randn(8, 24, seed=seed) for seed in range(3)]
    expected = first_steps(*blocks, **given)
    assert_same_bits(first_step(torch.cat(blocks), row_blocks=3, **given), torch.cat(expected))
    assert_same_bits(first_step(torch.stack(blocks), batch_dims=1, **given), torch.stack(expected))
    pairs = torch.stack(blocks).unsqueeze(0).expand(2, 3, 8, 24)
    assert_same_bits(first_step(pairs, batch_dims=2, **given)[1], torch.stack(expected))
    halves = first_steps(*[half for block in blocks for half in block.split(4)], **given)
    assert_same_bits(
        first_step(torch.stack(blocks), batch_dims=1, row_blocks=2, **given).flatten(0, 1), torch.cat(halves)
    )


def test_convolutions_are_matrices_of_their_output_channels() -> None:
    grad = randn(8, 6, 3, 3)
    step = first_step(grad)
    assert_same_bits(step.flatten(1), first_step(grad.flatten(1)))
    channels_last = first_step(grad.contiguous(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(channels_last, step)
    groups = nn.Conv2d(8, 8, 3, groups=4).weight
    grad = randn(*groups.shape)
    by_group = torch.cat(first_steps(*grad.split(2)))
    assert_same_bits(first_step(grad, row_blocks=4), by_group)


def test_one_row_steps_by_its_direction() -> None:
    """Its one singular value is 1, and the polynomial's of it 0.7."""
    a, b, c = 3.4445, -4.775, 2.0315
    value = 1.0
    for _ in range(5):
        value = a * value + b * value**3 + c * value**5
    for shape in ((1, 40), (40, 1), (1, 1), (1, 5, 8)):
        grad = randn(*shape)
        expected = value * 0.2 * max(shape[0], grad.numel() // shape[0]) ** 0.5 * grad / grad.norm()
        torch.testing.assert_close(first_step(grad), expected, rtol=1e-5, atol=1e-6)


@each_path
@each_dtype
def test_zeros_and_what_has_no_elements_stay(ns_dtype: str, path: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (0, 3), (3, 0), (2, 0, 2))]
    optimizer = muon(params, weight_decay=0.5, lr=0.5, ns_dtype=ns_dtype, cautious=True, **path)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.full((4, 6), 0.75**2))
    # Rows that never had a gradient stay.
    step = first_step(torch.cat((randn(3, 8), torch.zeros(2, 8))), ns_dtype=ns_dtype, **path)
    assert not step[3:].any()


@each_dtype
def test_directions_that_a_gradient_lacks_stay(ns_dtype: str) -> None:
    grad = randn(30, 4) @ randn(4, 50, seed=1)
    after = torch.linalg.svdvals(first_step(grad, ns_dtype=ns_dtype, adjust_lr="original").double())
    assert after[:4].min() >= LEAST - BEYOND
    # Rounding fills them with about an epsilon, which each of five iterations multiplies by up to 3.4445: in bfloat16
    # to about a half, measured 0.43, and of torch's own Muon 0.52.
    assert after[4:].max() <= (LEAST if ns_dtype == "bfloat16" else 1e-4)


@each_path
@each_dtype
def test_a_gradient_of_any_scale_gives_the_same_step(ns_dtype: str, path: dict[str, Any]) -> None:
    grads = [randn(24, 64), randn(30, 20)]
    steps = first_steps(*grads, ns_dtype=ns_dtype, **path)
    for scale in (2.0**-100, 2.0**100):
        scaled = first_steps(*[grad * scale for grad in grads], ns_dtype=ns_dtype, **path)
        assert_same_bits(scaled, steps, str(scale))
    for scale in (1e-30, 1e30):
        for step, other in zip(
            first_steps(*[grad * scale for grad in grads], ns_dtype=ns_dtype, **path), steps, strict=True
        ):
            assert distance(step, other) <= (0.04 if ns_dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_path
@each_dtype
def test_a_gradient_that_is_not_finite_shows_in_all_of_its_matrix_alone(
    ns_dtype: str, path: dict[str, Any], value: float
) -> None:
    grads = [randn(6, 10), randn(6, 10), randn(10, 6)]
    grads[1][2, 3] = value
    for cautious in (False, True):
        steps = first_steps(*grads, ns_dtype=ns_dtype, cautious=cautious, **path)
        assert [bool(step.isnan().all()) for step in steps] == [False, True, False]
        assert [bool(step.isfinite().all()) for step in steps] == [True, False, True]
    param = nn.Parameter(torch.ones(6, 10))
    optimizer = muon([("w", param)], error_if_nonfinite=True, **path)
    param.grad = grads[1]
    with pytest.raises(RuntimeError, match=r"'w' \(muon\) holds NaN or infinity. Nothing was changed"):
        optimizer.step()
    assert torch.equal(param, torch.ones(6, 10))


# Lists of tensors take a tensor lr in capturable steps alone, as torch's do.
@pytest.mark.parametrize(("foreach", "capturable"), [(False, False), (False, True), (True, True)])
def test_tensor_lr_is_read_anew_in_each_step(foreach: bool, capturable: bool) -> None:
    lr = torch.tensor(0.5)
    param = nn.Parameter(torch.zeros(6, 10))
    optimizer = muon([param], lr=lr, momentum=0.0, capturable=capturable, foreach=foreach)
    param.grad = randn(6, 10)
    optimizer.step()
    first = param.detach().clone()
    lr.fill_(0.25)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.step()
    torch.testing.assert_close(param.detach(), 1.5 * first)
    torch.testing.assert_close(first, -0.5 * first_step(param.grad, momentum=0.0))


def test_gradients_pass_a_scaler() -> None:
    grad = randn(6, 10)
    param = nn.Parameter(torch.zeros(6, 10))
    optimizer = muon([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (torch.inf, 1.0):
        scaler.scale(torch.ones(()))
        param.grad = grad * scaler.get_scale() * factor
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same_bits(-param.detach(), first_step(grad))


@pytest.mark.parametrize("arguments", [{}, {"nesterov": False, "row_blocks": 2}, {"adjust_lr": "spectral"}], ids=str)
def test_differentiable_step_gives_the_gradients_of_finite_differences(arguments: dict[str, Any]) -> None:
    def moved(lr: Tensor, leaf: Tensor, source: Tensor) -> Tensor:
        weight = leaf.clone()
        options = {"ns_dtype": None, "foreach": None, "ns_steps": 3, "weight_decay": 0.1, "momentum": 0.5, **arguments}
        optimizer = muon([weight], lr=lr, differentiable=True, **options)
        for factor in (1.0, -0.5):
            weight.grad = factor * source**2
            optimizer.step()
        return weight

    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    leaf, source = (randn(4, 5, seed=seed).double().requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(moved, (lr, leaf, source))


# torch 2.6 warns of its own configuration while it logs what it compiles.
@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("ns_dtype", "path"), [("float32", {"foreach": False}), ("bfloat16", {"foreach": True})])
def test_step_compiled_by_inductor_is_the_eager_one_to_rounding(ns_dtype: str, path: dict[str, Any]) -> None:
    torch._dynamo.reset()
    runs = [[nn.Parameter(randn(*shape)) for shape in ((6, 10), (10, 6), (4, 3, 2))] for _ in range(2)]
    optimizers = [muon(params, cautious=True, lr=0.1, ns_dtype=ns_dtype, **path) for params in runs]
    steps: list[Callable[[], Any]] = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=True)]
    for seed in range(2):
        for params, step in zip(runs, steps, strict=True):
            for index, param in enumerate(params):
                param.grad = randn(*param.shape, seed=10 * seed + index)
            step()
    for eager, compiled in zip(*runs, strict=True):
        assert distance(compiled.detach(), eager.detach()) <= (0.02 if ns_dtype == "bfloat16" else 1e-5)


@each_path
def test_blocks_and_experts_match_the_reference(path: dict[str, Any]) -> None:
    for shape, batch_dims, row_blocks in (((3, 4, 5), 1, 1), ((3, 4, 5, 2), 1, 2), ((2, 3, 4, 5), 2, 1)):
        param = nn.Parameter(randn(*shape))
        given = {"lr": 0.01, "weight_decay": 0.1, "batch_dims": batch_dims, "row_blocks": row_blocks}
        optimizer = muon([param], **given, **path)
        before, grad = as_array(param), randn(*shape, seed=1)
        param.grad = grad
        optimizer.step()
        expected = reference.muon(before, as_array(grad), {}, optimizer.param_groups[0]).p
        np.testing.assert_allclose(as_array(param), expected, rtol=1e-5, atol=1e-6)


@each_path
@each_dtype
def test_step_on_many_matrices_holds_as_much_as_on_some(ns_dtype: str, path: dict[str, Any]) -> None:
    """A few copies of the largest, or of a list of one block's elements, here 2 MiB; measured 6 of either."""
    peaks = []
    for number in (8, 16):
        params = [nn.Parameter(torch.zeros(512, 512)) for _ in range(number)]
        optimizer = muon(params, ns_steps=1, ns_dtype=ns_dtype, **path)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        peaks.append(transient_bytes_of(optimizer.step, torch.device("cpu")))
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] <= 7 * (2 if path["foreach"] else 1) * 2**20
