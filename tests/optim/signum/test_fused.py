"""The kernel in C++ that ``fused=True`` runs on the CPU: the bits of the default path, or a warning and that path."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optim import Signum
from stac_optimizer.optim.signum.arithmetic import SignUpdate
from stac_optimizer.optim.signum.fused import building, cpu, devices
from stac_optimizer.optim.signum.single import single_tensor
from stac_optimizer.tensors import codes
from tests.support import assert_same_bits, set_units

# Of every layout, of the sizes 0 and 1; rows of whole blocks of codes, of none, and of one and a rest.
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


@pytest.fixture(autouse=True)
def _nothing_warned() -> Iterator[None]:
    """What other tests warned of may be warned of anew."""
    cpu.WARNED.clear()
    yield
    cpu.WARNED.clear()


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


def held_by(optimizer: Signum, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in optimizer.state[param].items() if not tensor.is_meta}


# What a user may do to a parameter of 8 x 128, or to its state, between two steps.
MISFITS: dict[str, tuple[dict[str, Any], Callable[[nn.Parameter, dict[str, Tensor]], Any]]] = {
    "larger-weight": ({}, lambda param, _: replace(param, torch.ones(99, 128))),
    "other-shape": ({}, lambda param, _: replace(param, torch.ones(128, 8))),
    "smaller-average": ({}, lambda _, state: state.update(exp_avg=torch.zeros(3))),
    "average-elsewhere": ({}, lambda _, state: state.update(exp_avg=state["exp_avg"].to("meta"))),
    "larger-weight-int8": ({"state_dtype": "int8"}, lambda param, _: replace(param, torch.ones(99, 128))),
    "fewer-scales": ({"state_dtype": "int8"}, lambda _, state: state.update(exp_avg_scale=torch.ones(1, 1))),
    "more-scales": ({"state_dtype": "int8"}, lambda _, state: state.update(exp_avg_scale=torch.ones(80, 10))),
    "scales-elsewhere": (
        {"state_dtype": "int8"},
        lambda _, state: state.update(exp_avg_scale=state["exp_avg_scale"].to("meta")),
    ),
    "scales-in-bfloat16": (
        {"state_dtype": "int8"},
        lambda _, state: state.update(exp_avg_scale=state["exp_avg_scale"].bfloat16()),
    ),
    "codes-for-doubles": ({"state_dtype": "int8"}, lambda param, _: replace(param, torch.ones(8, 128).double())),
    "codes-without-scales": ({"state_dtype": "int8"}, lambda _, state: state.pop("exp_avg_scale")),
    "gradient-without-memory": ({}, lambda param, _: setattr(param, "grad", torch._efficientzerotensor((8, 128)))),
    "average-without-memory": ({}, lambda _, state: state.update(exp_avg=torch._efficientzerotensor((8, 128)))),
}


def replace(param: nn.Parameter, value: Tensor) -> None:
    param.grad = None
    param.data = value
    param.grad = torch.ones_like(value)


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_belong_together_is_not_walked(name: str) -> None:
    """A kernel would read and write beside it. The default path refuses it, or makes the best of it."""
    arguments, change = MISFITS[name]
    outcomes: list[tuple[type[Exception] | None, Tensor, dict[str, Tensor]]] = []
    for fused in (None, True):
        param = nn.Parameter(torch.linspace(-1, 1, 1024).view(8, 128))
        optimizer = Signum([param], lr=0.1, fused=fused, **arguments)
        param.grad = torch.linspace(2, -1, 1024).view(8, 128)
        optimizer.step()
        change(param, optimizer.state[param])
        if name == "codes-without-scales":
            optimizer.param_groups[0]["state_dtype"] = None
        raised: type[Exception] | None = None
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError) as error:
            raised = type(error)
        outcomes.append((raised, param.detach(), held_by(optimizer, param)))
    default, kernel = outcomes
    assert kernel[0] is default[0]
    assert_same_bits(kernel[1:], default[1:])


def test_scales_that_a_checkpoint_brings_in_another_dtype() -> None:
    steps = []
    for fused in (None, True):
        param = nn.Parameter(torch.linspace(-1, 1, 512).view(4, 128))
        optimizer = Signum([param], lr=0.1, state_dtype="int8", fused=fused)
        param.grad = torch.linspace(2, -1, 512).view(4, 128)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["exp_avg_scale"] = saved["state"][0]["exp_avg_scale"].bfloat16()
        optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.step()
        steps.append((param.detach(), held_by(optimizer, param)))
    assert_same_bits(steps[1], steps[0])


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


SHARING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "all": lambda buffer: [buffer, buffer],
    "part": lambda buffer: [buffer[:8], buffer[4:]],
    "one-in-another": lambda buffer: [buffer, buffer[1:2], buffer[5:6]],
    "some-that-no-kernel-fits": lambda buffer: [buffer, buffer[:, ::2]],
}


@pytest.mark.parametrize("columns", [20, 2000])
@pytest.mark.parametrize("name", SHARING)
def test_parameters_that_share_memory_step_one_after_the_other(name: str, columns: int) -> None:
    flags: tuple[dict[str, Any], ...] = ({}, {"fused": True})
    buffers = [torch.linspace(-1, 1, 10 * columns).view(10, columns) for _ in flags]
    for buffer, arguments in zip(buffers, flags, strict=True):
        params = [nn.Parameter(part) for part in SHARING[name](buffer)]
        optimizer = Signum(params, lr=1.0, weight_decay=0.3, **arguments)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert_same_bits(buffers[1], buffers[0])


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
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither in this process nor before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._kernels.cache_clear()
    yield
    cpu._kernels.cache_clear()


@pytest.mark.usefixtures("_nothing_compiled")
def test_machine_without_a_compiler_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    message = assert_falls_back((torch.float32, torch.bfloat16))
    assert "could not be compiled and loaded (no C++ compiler: c++, g++, clang++ is not on the path)" in message


# Commands in place of a compiler, and what the warning says of them.
BROKEN = {
    "raise SystemExit('error: no C++ here')": "error: no C++ here",
    "import sys; sys.stderr.buffer.write(b'error: \\xe9'); sys.exit(1)": "error: \ufffd",
    "pass": "No such file",
    # A library, but not of these functions.
    "import subprocess, sys; sys.exit(subprocess.run(['c++', *sys.argv[1:], '-Dupdate=other']).returncode)": "update",
    "import sys; '-o' in sys.argv and open(sys.argv[-1], 'w').write('no library')": "file too short",
}


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("program", BROKEN)
def test_compiler_that_fails_falls_back_with_one_warning(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first complaint is told, and nothing is left behind."""
    monkeypatch.setenv("CXX", shlex.join([sys.executable, "-c", program]))
    assert BROKEN[program] in assert_falls_back((torch.float32, torch.bfloat16))
    folder = building._cache_folder()
    assert folder is not None
    assert not list(folder.iterdir()) or "-Dupdate" in program  # which can be loaded


@pytest.mark.usefixtures("_nothing_compiled")
def test_compiler_that_is_no_command_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    assert "is no command: No closing quotation" in assert_falls_back((torch.float32,))


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("option", ["-ffast-math", "-funsafe-math-optimizations", "-fvisibility=hidden"])
def test_options_that_the_environment_adds_change_nothing(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library linked with fast mathematics would also flush subnormals, of the whole process."""
    monkeypatch.setenv("CXX", shlex.join([*building._compiler(), option]))
    params, fused_params = weights(torch.float32), weights(torch.float32)
    default, fused = trunk_of(params), trunk_of(fused_params, fused=True)
    for seed in range(3):
        for held, optimizer in ((params, default), (fused_params, fused)):
            give_gradients(held, seed)
            optimizer.step()
    assert_same_runs(default, fused)
    assert torch.tensor(1e-40) * 0.5 > 0
