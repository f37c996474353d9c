"""The trunk's Triton kernel against plain torch operations, by bits: interpreted where there is no CUDA device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim.signum.fused import devices as fused_paths
from stac_optimizer.tensors import codes
from tests.rule_cases import random_gradients, step_with, zoo
from tests.support import assert_same_bits

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from stac_optimizer.optim.signum.fused import triton_kernels
from stac_optimizer.optim.signum.fused.triton import fused_signum

# The interpreter computes with numpy, which warns of NaN and infinity, and that of Triton 3.2 in a way deprecated now.
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Nothing, less than a row of 128, a block and some more, several chunks of which the last is not full.
SIZES = (3, 0, 1, 1024 + 128 + 5, 8192 + 1024 + 128 + 1)
ROW = 128
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-41, -1e-41, 1e-30, 3e38, -3e38)


def convert_float(original: Any, values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter's conversion, but for bfloat16 torch's."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.tensor(values).bfloat16().view(torch.int16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return torch.tensor(values.view(np.int16)).view(torch.bfloat16).float().numpy()
    return original(values, source, target, rounding)


@pytest.fixture(autouse=True)
def bfloat16_as_devices_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off where devices round it, and knows no subnormal bfloat16."""
    monkeypatch.setattr(interpreter, "_convert_float", partial(convert_float, interpreter._convert_float))


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of a step, and the dtypes of its tensors: None for that of the weights, or for no average."""

    lr: float = 0.01
    decay_factor: float | None = 0.999
    change_factor: float = 1 - 0.9
    cautious_floor: float | None = None
    maximize: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    is_stochastic: bool = False
    has_momentum: bool = True
    grad_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None

    @property
    def is_coded(self) -> bool:
        return self.state_dtype is torch.int8


CASES = {
    "plain": Case(),
    "no-decay-maximize": Case(decay_factor=None, maximize=True),
    "no-momentum": Case(has_momentum=False, change_factor=1.0),
    "cautious": Case(cautious_floor=1e-3),
    "cautious-no-momentum-maximize": Case(cautious_floor=1e-3, has_momentum=False, maximize=True),
    "scaled": Case(grad_scale=3.0, found_inf=0.0),
    "scaled-cautious-maximize": Case(grad_scale=3.0, found_inf=0.0, cautious_floor=0.9, maximize=True),
    "bfloat16-state": Case(state_dtype=torch.bfloat16),
    "float32-gradients": Case(grad_dtype=torch.float32, maximize=True),
    "bfloat16-gradients-float32-state": Case(grad_dtype=torch.bfloat16, state_dtype=torch.float32, grad_scale=7.0),
    "int8": Case(state_dtype=torch.int8),
    "int8-cautious-scaled-maximize": Case(state_dtype=torch.int8, cautious_floor=1e-3, grad_scale=3.0, maximize=True),
}
STOCHASTIC = {f"stochastic-{name}": replace(case, is_stochastic=True) for name, case in CASES.items()}
# What treats dtypes differently; flags alone need one of them.
FOR_EVERY_DTYPE = ("plain", "no-momentum", "scaled-cautious-maximize", "bfloat16-gradients-float32-state", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Tensors:
    """What a step works on, tensor by tensor."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    scales: list[Tensor]
    noise_seeds: Tensor | None

    def step(self, case: Case, **overrides: Any) -> None:
        """The kernel's step."""
        scalars: dict[str, Any] = {"lr": case.lr, "decay_factor": case.decay_factor}
        for name in ("grad_scale", "found_inf"):
            value = getattr(case, name)
            scalars[name] = None if value is None else torch.tensor([value], device=DEVICE)
        names = ("change_factor", "cautious_floor", "maximize")
        lists = (self.params, self.grads, self.exp_avgs, self.scales)
        arguments = {
            **scalars,
            **{name: getattr(case, name) for name in names},
            "noise_seeds": self.noise_seeds,
            "rounds": case.is_stochastic,
            **overrides,
        }
        fused_signum(*lists, **arguments)

    def written(self) -> list[list[Tensor]]:
        """Copies of what a step may change, on the CPU, all NaN alike: a NaN's payload means nothing."""
        lists = (self.params, self.exp_avgs, self.scales)
        return [[alike(tensor).clone() for tensor in tensors] for tensors in lists]

    def expected(self, case: Case) -> list[list[Tensor]]:
        """The same after a step of plain operations."""
        lists = (self.params, self.grads, self.exp_avgs, self.scales)
        seeds = [0] * len(self.params) if self.noise_seeds is None else self.noise_seeds.tolist()
        results = [
            plain_step(case, *(tensors[index].cpu() if tensors else torch.empty(0) for tensors in lists), seed=seed)
            for index, seed in enumerate(seeds)
        ]
        present = (True, case.has_momentum, case.is_coded)
        return [[alike(result[i]) for result in results] if present[i] else [] for i in range(3)]


def alike(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu()
    return tensor.where(~tensor.isnan(), torch.nan) if tensor.is_floating_point() else tensor


def make(case: Case, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> Tensors:
    """Seeded tensors; the longest has a row of zeros, one too small for codes, and special values in others."""
    generator = torch.Generator().manual_seed(0)

    def random(size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        if size == max(sizes):
            values[ROW : 2 * ROW] = 0
            values[2 * ROW : 3 * ROW] *= 1e-33
            starts = torch.arange(size // 2, size, ROW)[:-1]
            places = starts + torch.randint(ROW, starts.shape, generator=generator)
            values[places] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), starts.shape, generator=generator)]
        return values

    sizes = [size - size % ROW for size in sizes] if case.is_coded else sizes
    params, grads, exp_avgs = ([random(size) for size in sizes] for _ in range(3))
    scales: list[Tensor] = []
    if case.is_coded:
        scales = [encode(exp_avg, 0)[1] for exp_avg in exp_avgs]
        exp_avgs = [encode(exp_avg, 0)[0] for exp_avg in exp_avgs]
    noise_seeds = torch.randint(-(2**31), 2**31, (len(sizes),), generator=generator, dtype=torch.int32)
    return Tensors(
        params=[param.to(DEVICE, dtype) for param in params],
        grads=[grad.to(DEVICE, case.grad_dtype or dtype) for grad in grads],
        exp_avgs=[exp_avg.to(DEVICE, case.state_dtype or dtype) for exp_avg in exp_avgs] if case.has_momentum else [],
        scales=[scale.to(DEVICE) for scale in scales],
        noise_seeds=noise_seeds.to(DEVICE) if case.is_stochastic or case.is_coded else None,
    )


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    c = codes.to(torch.float32).view(-1, ROW)
    return (c * c.abs() * (scale * torch.tensor(1 / 127**2))[:, None]).flatten()


def encode(average: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The level is found in float64, whose square roots are exact enough; the rest is exact in float32, too."""
    m = average.to(torch.float32).view(-1, ROW)
    s = m.abs().amax(1).where(m.isfinite().all(1), torch.inf)
    inverse = (torch.full_like(s, 127**2) / s).where((s > 1e-30) & (s < torch.inf), 0)
    y = m.abs() * inverse[:, None]
    y = y.where(~y.isnan(), 0).clamp(max=127**2).double()
    r = y.sqrt().floor()
    drawn = (noise(torch.arange(len(m)) * ROW, seed)[:, None] & 0xFFF) ^ (torch.arange(ROW) * 79 % 128 << 5)
    r += y - r**2 > (2 * r + 1) * (2 * drawn + 1) / 2**13
    return torch.copysign(r, m.where(~m.isnan(), 0)).to(torch.int8).flatten(), s


def noise(positions: Tensor, seed: int) -> Tensor:
    """In int64, whose low 32 bits are those of uint32."""
    low = 0xFFFFFFFF
    h = (positions * 0x9E3779B1 + seed) & low
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & low
    return ((h ^ (h >> 13)) * 0xC2B2AE35) & low


def round_by_chance(values: Tensor, bits: Tensor) -> Tensor:
    """By these 16 bits."""
    low = 0xFFFFFFFF
    kept = ((values.view(torch.int32).long() & low) + bits) & 0xFFFF0000
    rounded = kept.to(torch.uint32).view(torch.float32)
    return rounded.where(~values.isnan(), torch.nan).to(torch.bfloat16)


def plain_step(case: Case, param: Tensor, grad: Tensor, exp_avg: Tensor, scale: Tensor, *, seed: int) -> list[Tensor]:
    """The new weight, average and scale. Every operation is one of torch's, rounded once."""
    arithmetic = torch.float64 if param.dtype == torch.float64 else torch.float32
    g = grad.to(arithmetic)
    if case.grad_scale is not None:
        g = g / torch.tensor([case.grad_scale], dtype=arithmetic)
    g = -g if case.maximize else g
    m = g
    if case.has_momentum:
        m = (decode(exp_avg, scale) if case.is_coded else exp_avg).to(arithmetic)
        m = m + (g - m) * torch.tensor(case.change_factor, dtype=arithmetic)
        if case.is_coded:
            exp_avg, scale = encode(m, seed)
        elif case.is_stochastic and exp_avg.dtype == torch.bfloat16:
            exp_avg = round_by_chance(m, noise(torch.arange(m.numel()), seed) & 0xFFFF)
        else:
            exp_avg = m.to(exp_avg.dtype)
    w = param.to(arithmetic)
    if case.decay_factor is not None:
        w = w * torch.tensor(case.decay_factor, dtype=arithmetic)
    direction = m.sign() + 0 * m
    if case.cautious_floor is not None:
        mask = ((m > 0) & (g > 0)) | ((m < 0) & (g < 0))
        mean = mask.count_nonzero().to(arithmetic) / torch.tensor(mask.numel(), dtype=arithmetic)
        direction = direction * mask.to(arithmetic) / mean.clamp(min=case.cautious_floor)
    w = w - direction * torch.tensor(case.lr, dtype=arithmetic)
    if case.is_stochastic:
        return [round_by_chance(w, noise(torch.arange(w.numel()), seed) >> 16), exp_avg, scale]
    return [w.to(param.dtype), exp_avg, scale]


def test_codes_of_the_kernels_are_those_of_the_other_paths() -> None:
    assert triton_kernels.ROW.value == codes.BLOCK
    for name in ("LEVELS", "LEAST_SCALE", "ROOT_PARTS", "CHANCE_PARTS", "PLACES", "REST_BITS"):
        assert getattr(triton_kernels, name).value == getattr(codes, name)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *[
            pytest.param(case, dtype, id=f"{name}-{dtype}")
            for name, case in CASES.items()
            for dtype in (DTYPES if name in FOR_EVERY_DTYPE else DTYPES[:1])
        ],
        *[pytest.param(case, torch.bfloat16, id=name) for name, case in STOCHASTIC.items()],
    ],
)
def test_kernel_equals_plain_operations_by_bits(case: Case, dtype: torch.dtype) -> None:
    tensors = make(case, dtype)
    grads = [grad.clone() for grad in tensors.grads]
    expected = tensors.expected(case)
    tensors.step(case)
    assert_same_bits(tensors.written(), expected)
    assert_same_bits(tensors.grads, grads)


@pytest.mark.parametrize("name", ["cautious", "int8", "no-momentum"])
def test_infinite_gradients_change_nothing(name: str) -> None:
    tensors = make(replace(CASES[name], is_stochastic=True), torch.bfloat16)
    before = tensors.written()
    tensors.step(replace(CASES[name], found_inf=1.0))
    assert_same_bits(tensors.written(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_and_decay_may_be_tensors(dtype: torch.dtype) -> None:
    case = CASES["plain"]
    tensors = make(case, dtype)
    expected = tensors.expected(case)
    scalars = {name: torch.tensor(getattr(case, name), dtype=dtype, device=DEVICE) for name in ("lr", "decay_factor")}
    tensors.step(case, **scalars)
    assert_same_bits(tensors.written(), expected)


@pytest.mark.parametrize("name", ["plain", "stochastic-cautious"])
def test_memory_that_16_bytes_do_not_divide(name: str) -> None:
    """Views that begin within a tensor: the kernel may not read them by 16 bytes."""
    case = {**CASES, **STOCHASTIC}[name]
    tensors = make(case, torch.bfloat16)
    for one_list in (tensors.params, tensors.grads, tensors.exp_avgs):
        one_list[:] = [torch.cat([tensor[:1], tensor])[1:] if tensor.numel() else tensor for tensor in one_list]
    expected = tensors.expected(case)
    tensors.step(case)
    assert_same_bits(tensors.written(), expected)


def test_no_element_is_no_launch() -> None:
    case = CASES["cautious"]
    tensors = make(case, torch.float32, sizes=(0, 0))
    tensors.step(case)
    assert_same_bits(tensors.written(), tensors.expected(case))


def test_parameters_are_walked_in_the_order_of_their_memory() -> None:
    case = CASES["cautious"]
    flat = make(case, torch.float32, sizes=(2 * 3 * 4 * 5,))
    expected = flat.expected(case)
    lists = (flat.params, flat.grads, flat.exp_avgs)
    params, grads, exp_avgs = ([one.view(2, 4, 5, 3).permute(0, 3, 1, 2) for one in tensors] for tensors in lists)
    shaped = replace(flat, params=params, grads=grads, exp_avgs=exp_avgs)
    shaped.step(case)
    assert_same_bits(flat.written(), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": 0.1},
        {"trunk_cautious": True, "maximize": True},
        {"trunk_momentum": 0.0},
        {"trunk_state_dtype": torch.int8, "stochastic_rounding": True, "weight_decay": 0.1},
        {"trunk_state_dtype": torch.bfloat16, "trunk_cautious": True},
    ],
    ids=str,
)
def test_rule_gives_the_kernel_what_it_fits_and_the_default_path_the_rest(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layouts, and short blocks: equal by bits to the default path."""
    monkeypatch.setattr(fused_paths, "by_cpp", fused_paths.by_triton)
    runs = []
    for fused in (None, True):
        params = {
            **zoo(torch.bfloat16),
            "layer.wide": nn.Parameter(torch.linspace(-1, 1, 3 * 256).view(3, 256).bfloat16()),
        }
        params["layer.short"] = nn.Parameter(torch.linspace(-1, 1, 200).view(2, 100).bfloat16())
        optimizer = STAC([{"params": list(params.items()), "stac_role": "trunk"}], lr=0.03, fused=fused, **arguments)
        for seed in range(3):
            step_with(optimizer, params, random_gradients(params, seed))
        states = [{key: value.cpu() for key, value in optimizer.state[param].items()} for param in params.values()]
        runs.append(([param.detach() for param in params.values()], states))
    assert_same_bits(runs[0], runs[1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["plain", "cautious", "int8"])
def test_captured_step_replays_without_the_host(name: str) -> None:
    case = CASES[name]
    tensors, lr = make(case, torch.float32), torch.tensor(case.lr, device=DEVICE)
    make(case, torch.float32).step(case, lr=lr)  # compiles, which capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors.step(case, lr=lr)
    for factor in (1, 2, 3):
        lr.fill_(case.lr * factor)
        expected = tensors.expected(replace(case, lr=lr.item()))
        graph.replay()
        assert_same_bits(tensors.written(), expected)
        for other in range(factor):  # takes the memory that forgotten tables would have had
            make(case, torch.float32, sizes=(3 + other, 1024)).step(case, lr=lr)


@pytest.mark.cuda
def test_step_does_not_wait_for_the_device() -> None:
    case = CASES["scaled-cautious-maximize"]
    tensors, scale, found = make(case, torch.float32), torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    scalars = {"grad_scale": scale, "found_inf": found, "lr": scale[0]}
    tensors.step(replace(case, grad_scale=None, found_inf=None), **scalars)
    fresh = make(case, torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fresh.step(replace(case, grad_scale=None, found_inf=None), **scalars)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the kernels compile to. In a process of its own: in one that interprets, Triton compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.optim.signum.triton_ptx"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled: dict[str, str] = json.loads(done.stdout)
    return compiled


# Operations that round otherwise than torch's: contractions, those that ptxas may contract, approximations.
INEXACT = re.compile(r"\bfma\.\S+|\b(?:add|sub|mul)\.f(?:32|64)\b|\bdiv\.(?:full|approx)\S*|\brcp\S+")


@pytest.mark.slow
def test_compiled_kernels_round_every_operation_once(ptx: dict[str, str]) -> None:
    inexact = {name: set(INEXACT.findall(text)) for name, text in ptx.items()}
    assert "fma.rn.f32" in inexact.pop("fused-update_kernel")
    assert inexact == {name: set() for name in inexact}
    assert "mul.rn.f32" in ptx["plain-update_kernel"]
    assert "cvt.rn.bf16" in ptx["bfloat16-update_kernel"]
    for kernel in ("count_kernel", "update_kernel"):
        assert "div.rn.f64" in ptx[f"float64-{kernel}"]
        assert "div.rn" in ptx[f"int8-{kernel}"]


@pytest.mark.slow
def test_compiled_kernels_move_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    for access in ("ld.global.v4", "st.global.v4"):
        for name in ("plain", "cautious", "bfloat16", "int8", "stochastic"):
            assert access in ptx[f"{name}-update_kernel"], name
        assert access not in ptx["unaligned-update_kernel"]
