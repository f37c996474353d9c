"""The compiled trunk that ``fused=True`` runs on the CPU: the bits of the default path, or a warning and that path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from stac_optimizer import STAC
from stac_optimizer.optim.signum import compiled
from stac_optimizer.tensors import cutting
from tests.support import assert_same_bits, set_units

# torch 2.6 warns of its own configuration while it logs what it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")

# Above and below PACK below, of every layout, of the sizes 0 and 1, for which dynamo would compile anew; rows of whole
# blocks of codes, of none, and of one and a rest.
PACK = 100
SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (40, 256),
    "row": (1, 640),
    "block": (1, 128),
    "ragged": (6, 200),
    "vector": (333,),
    "small": (7, 9),
    "small-vector": (64,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 64),
    "image": (4, 8, 3, 3),
}

# How many kernels each is, of about two to five seconds: averages in codes and others, updates and counts of masks.
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "float32": (torch.float32, {"weight_decay": 0.1}, 1),
    "bfloat16-int8-rounding": (
        torch.bfloat16,
        {"trunk_state_dtype": torch.int8, "stochastic_rounding": True, "rounding_seed": 3},
        2,
    ),
    "float16-momentum-0-maximize": (torch.float16, {"trunk_momentum": 0.0, "maximize": True}, 1),
    "float32-cautious": (torch.float32, {"trunk_cautious": True}, 2),
}


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What counts as large is small here; and what other tests warned of may be warned of anew."""
    set_units(monkeypatch, block=1000, pack=PACK)
    monkeypatch.setattr(cutting, "LARGE_NUMEL", 2048)  # what is in codes is cut there for compiled kernels, too
    compiled._warn_once.cache_clear()
    yield
    compiled._warn_once.cache_clear()


def weights(dtype: torch.dtype, *, more: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (shape[0] + more, *shape[1:]) if len(shape) > 1 else shape for name, shape in SHAPES.items()}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["transposed"] = torch.randn(30, 20, generator=generator).to(dtype).t()
    tensors["sliced"] = torch.randn(20, 300, generator=generator).to(dtype)[:, ::2]
    tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
    return {f"layer.{name}": nn.Parameter(tensor) for name, tensor in tensors.items()}


def trunk_of(params: Mapping[str, nn.Parameter], **arguments: Any) -> STAC:
    return STAC([{"params": list(params.items()), "stac_role": "trunk"}], **{"lr": 0.03, **arguments})


def give_gradients(params: Mapping[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """The same for the same seed; every third time some that are not finite, or tiny."""
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator)
        if param.numel() > 4 and seed % 3 == 2:
            grad.view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 2e-7, -1e-7])
        param.grad = (grad * scale).to(param.dtype)


def without_payload(tensor: Tensor) -> Tensor:
    """With one NaN for all: which operand's sign and payload an operation on two NaN keeps, no standard says."""
    return tensor.detach().masked_fill(tensor.detach().isnan(), torch.nan) if tensor.is_floating_point() else tensor


def assert_same_runs(one: STAC, other: STAC) -> None:
    for left, right in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_same_bits(without_payload(left), without_payload(right))
        states = [
            {key: without_payload(value) for key, value in held.state[p].items()}
            for held, p in ((one, left), (other, right))
        ]
        assert_same_bits(states[0], states[1])


@pytest.mark.parametrize("is_cautious", [True, False])
def test_kernel_that_cannot_run_leaves_its_work_to_the_default_path(
    monkeypatch: pytest.MonkeyPatch, is_cautious: bool
) -> None:
    """As when dynamo finds, in mid-run, that it has compiled too often."""

    def broken(*_: Any) -> None:
        raise FailOnRecompileLimitHit("recompile limit reached\nand more")

    monkeypatch.setattr(compiled, "_kernels_of", lambda *_: compiled.LoopKernels(broken, broken))
    runs = [weights(torch.float32), weights(torch.float32)]
    default, fused = (
        trunk_of(params, fused=flag, trunk_cautious=is_cautious)
        for params, flag in zip(runs, (None, True), strict=True)
    )
    for seed in range(2):
        for params in runs:
            give_gradients(params, seed)
        default.step()
        with pytest.warns(UserWarning, match=r"Hit: recompile limit reached\)") if seed == 0 else nullcontext():
            fused.step()
    assert_same_runs(default, fused)


def test_kernel_that_fails_while_it_runs_does_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(compiled, "_kernels_of", lambda *_: compiled.LoopKernels(full, full))
    params = weights(torch.float32)
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trunk_of(params, fused=True).step()


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arguments", "kernels"), VARIANTS.values(), ids=list(VARIANTS))
def test_compiled_trunk_agrees_by_bits_and_is_compiled_once(
    dtype: torch.dtype, arguments: dict[str, Any], kernels: int
) -> None:
    """Whatever moves between steps: lr as a number and as a tensor, decay, momentum, shapes, gradients."""

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

    compiled._kernels_of.cache_clear()
    before = compilations()
    compare(0)
    assert compilations() == before + kernels
    changes: dict[str, Any] = {"weight_decay": 0.25} if arguments.get("weight_decay") else {}
    changes |= {"trunk_momentum": 0.5} if arguments.get("trunk_momentum", 0.9) else {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(3, lr=torch.tensor([0.02]), **changes)
    assert compilations() == before + kernels


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 21])
def test_calls_take_any_number_of_weights_that_may_lie_in_one_buffer(count: int) -> None:
    """As flat buffers hold them, some of one size and some not, and small ones; nothing is compiled again for it."""
    sizes = [2 * 128 + index % 5 for index in range(count)] + [60] * 6

    def run(**arguments: Any) -> tuple[Tensor, STAC]:
        flat = torch.linspace(-1, 1, sum(sizes))
        held = {f"layer.{index}": nn.Parameter(part) for index, part in enumerate(flat.split(sizes))}
        optimizer = trunk_of(held, **arguments)
        for seed in range(3):
            give_gradients(held, seed)
            optimizer.step()
        return flat, optimizer

    _, first = run(fused=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        flat, fused = run(fused=True)
    default_flat, default = run()
    assert_same_runs(fused, default)
    assert_same_runs(fused, first)
    assert_same_bits(without_payload(flat), without_payload(default_flat))


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_trunk_steps_beside_the_fused_cap() -> None:
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


@pytest.mark.slow
def test_default_device_of_tensors_does_not_matter() -> None:
    """Whatever is made for a kernel on the CPU must lie there."""
    params, fused_params = weights(torch.float32), weights(torch.float32)
    default, fused = trunk_of(params, weight_decay=0.1), trunk_of(fused_params, weight_decay=0.1, fused=True)
    compiled._kernels_of.cache_clear()
    for seed in (0, 1):
        for held, optimizer in ((params, default), (fused_params, fused)):
            give_gradients(held, seed)
            with torch.device("meta"):
                optimizer.step()
    assert_same_runs(default, fused)


def test_small_tensors_are_neither_compiled_nor_warned_of() -> None:
    params = {"layer.small": nn.Parameter(torch.ones(7, 9)), "layer.vector": nn.Parameter(torch.ones(PACK))}
    optimizer = trunk_of(params, fused=True, lr=0.125)
    before = compilations()
    give_gradients(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert compilations() == before
    assert all(torch.equal((param - 1).abs(), torch.full_like(param, 0.125)) for param in params.values())


def assert_falls_back(dtypes: tuple[torch.dtype, ...]) -> str:
    """That all dtypes step as by default, with one warning; which is returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in dtypes:
            params, fused_params = weights(dtype), weights(dtype)
            default, fused = trunk_of(params), trunk_of(fused_params, fused=True)
            for seed in range(3):
                for held, optimizer in ((params, default), (fused_params, fused)):
                    give_gradients(held, seed)
                    optimizer.step()
            assert_same_runs(default, fused)
    messages = [str(warning.message) for warning in caught if "fused=True" in str(warning.message)]
    assert len(messages) == 1, messages
    return messages[0]


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    compiled._kernels_of.cache_clear()
    yield
    compiled._kernels_of.cache_clear()


@pytest.mark.usefixtures("_nothing_compiled")
def test_python_that_torch_cannot_compile_for_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch.compile itself raises, before anything is called."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", refuse)
    message = assert_falls_back((torch.float32, torch.float64))
    assert "could not be compiled (RuntimeError: torch.compile is not supported on Python 3.99)" in message


@pytest.mark.usefixtures("_nothing_compiled")
def test_eager_stance_falls_back_with_one_warning() -> None:
    with torch.compiler.set_stance("force_eager"):
        message = assert_falls_back((torch.float32, torch.bfloat16))
    assert "could not be compiled (torch.compile is disabled)" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param(
            {"CXX": "/nonexistent/c++"},
            "(InvalidCxxCompiler|InductorError|CppCompileError|BackendCompilerFailed)",
            id="no-compiler",
        ),
        pytest.param({"TORCHDYNAMO_DISABLE": "1"}, "torch.compile is disabled", id="dynamo-disabled"),
    ],
)
def test_machine_that_cannot_compile_falls_back_with_one_warning(
    variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """In a process of its own, which finds nothing compiled before."""
    script = """
        import torch
        from stac_optimizer.tensors import cutting
        from tests.optim.test_fused import PACK, assert_falls_back
        torch.set_num_threads(1)
        cutting.BLOCK_NUMEL = cutting.CODED_NUMEL = 1000
        cutting.PACK_NUMEL = PACK
        print(assert_falls_back((torch.bfloat16,)))
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(rf"could not be compiled \(.*{reason}", ran.stdout), ran.stdout
