"""The table of ambient contexts: a step, and construction, are the same inside each of them, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stac_optimizer import STAC, MajorityVote
from stac_optimizer.optim import Lion, Muon
from stac_optimizer.stepping.ambient import NOTHING, neutral
from tests.rule_cases import RULE_CASES, RuleCase, random_gradients, step_with, zoo
from tests.runs import process_group
from tests.support import assert_same_bits, seeded_loss, set_gradients, set_units, small_model, snapshot, wide_model


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """Memory that is not initialized is filled with NaN besides, which shows what reads it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# torch warns of anomaly detection, which is slow, each time that it is turned on.
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast-float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast-bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dtype-float64": lambda: default_dtype(torch.float64),
    "dtype-bfloat16": lambda: default_dtype(torch.bfloat16),
    "dtype-float16": lambda: default_dtype(torch.float16),
    "device-meta": lambda: torch.device("meta"),
    "device-meta-global": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "no-grad": torch.no_grad,
    "enable-grad": torch.enable_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "functions": Watching,
    "dispatches": Dispatching,
    "flops": lambda: FlopCounterMode(display=False),
    "profiler": torch.profiler.profile,
}
each_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=list(CONTEXTS))
Context = Callable[[], AbstractContextManager[Any]]
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")


@each_context
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.name)
def test_rule_steps_the_same_inside(case: RuleCase, context: Context) -> None:
    """Two steps inside, gradients set there too, and one outside, for which state must still be usable."""

    def stepped(path: str, dtype: torch.dtype, within: Context) -> Any:
        params = case.taken(zoo(dtype))
        optimizer = case.optimizer(params, path)
        for seed in range(3):
            gradients = random_gradients(params, seed, skip={"layer.vector"} if seed == 1 else ())
            with within() if seed < 2 else nullcontext():
                step_with(optimizer, params, gradients)
        return {name: (param.detach(), optimizer.state[param]) for name, param in params.items()}

    for path in case.paths:
        for dtype in (torch.float32, torch.bfloat16):
            expected, actual = stepped(path, dtype, nullcontext), stepped(path, dtype, context)
            assert_same_bits(actual, expected, f"{path} {dtype}")


FLAGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "no-momentum": (torch.float32, {"trunk_momentum": 0.0}),
    "cautious": (torch.bfloat16, {"trunk_cautious": True}),
    "int8": (torch.float32, {"trunk_state_dtype": torch.int8}),
    "bfloat16-state": (torch.float32, {"trunk_state_dtype": torch.bfloat16}),
    "rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "rounding-int8": (torch.bfloat16, {"stochastic_rounding": True, "trunk_state_dtype": torch.int8}),
    "lion-rounding": (torch.bfloat16, {"stochastic_rounding": True, "trunk_optimizer": Lion}),
    "muon": (torch.float32, {"trunk_optimizer": Muon}),
    "muon-rounding-int8": (
        torch.bfloat16,
        {"stochastic_rounding": True, "trunk_optimizer": partial(Muon, state_dtype="int8", cautious=True)},
    ),
    "finite": (torch.float32, {"error_if_nonfinite": True, "amsgrad": True}),
    "tensor-lr": (torch.float32, {"lr": torch.tensor(0.01)}),
}
PATHS = [
    pytest.param({"foreach": False}, False, id="single"),
    pytest.param({"foreach": False}, True, id="shared"),
    pytest.param({"fused": True}, False, id="fused"),
]


def run(within: Context, dtype: torch.dtype, *, constructs: bool, **arguments: Any) -> Any:
    """Weights and optimizer after two steps inside a context and one outside."""
    model = wide_model(dtype=dtype)
    with within() if constructs else nullcontext():
        optimizer = STAC(model, **{"lr": 0.01, "weight_decay": 0.1, **arguments})
    for seed in range(3):
        set_gradients(model, seed)
        with within() if seed < 2 else nullcontext():
            optimizer.step()
    return snapshot(model, optimizer)


# One of each kind; all of them are for the rules themselves.
OF_FLAGS = ("autocast-bfloat16", "dtype-float64", "device-meta", "inference", "enable-grad", "functions", "dispatches")


@pytest.mark.parametrize("context", [CONTEXTS[name] for name in OF_FLAGS], ids=OF_FLAGS)
@pytest.mark.parametrize(("path", "is_shared"), PATHS)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))
def test_every_flag_steps_the_same_inside(
    flags: tuple[torch.dtype, dict[str, Any]],
    path: dict[str, Any],
    is_shared: bool,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, arguments = flags
    if is_shared:
        set_units(monkeypatch, block=100, pack=10, shared=True)
    expected = run(nullcontext, dtype, constructs=False, **path, **arguments)
    assert_same_bits(run(context, dtype, constructs=False, **path, **arguments), expected)
    assert_same_bits(run(context, dtype, constructs=True, **path, **arguments), expected, "constructed inside")


@pytest.mark.parametrize("name", CONTEXTS)
def test_kernels_step_the_same_inside(name: str) -> None:
    arguments: dict[str, Any] = {"last_n_layers": 0, "fused": True, "trunk_cautious": True, "stochastic_rounding": True}
    arguments |= {"trunk_state_dtype": torch.int8}
    expected = run(nullcontext, torch.bfloat16, constructs=False, **arguments)
    assert_same_bits(run(CONTEXTS[name], torch.bfloat16, constructs=False, **arguments), expected, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autocast-float16", "inference"])
def test_compiled_step_is_the_same_inside(name: str) -> None:
    def stepped(within: Context) -> Any:
        torch._dynamo.reset()
        model = small_model()
        optimizer = STAC(model, lr=torch.tensor(0.01), weight_decay=0.1, trunk_cautious=True)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            set_gradients(model, seed)
            with within():
                step()
        torch._dynamo.reset()
        return snapshot(model, optimizer)

    assert_same_bits(stepped(CONTEXTS[name]), stepped(nullcontext))


# Backward itself has no place in inference mode, and under a default device its own zeros lie there.
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name not in ("inference", "no-grad")])
def test_released_gradients_are_applied_the_same_inside(name: str) -> None:
    released, ordinary = small_model(dtype=torch.bfloat16), small_model(dtype=torch.bfloat16)
    optimizers = [STAC(model, lr=0.01, weight_decay=0.1, stochastic_rounding=True) for model in (released, ordinary)]
    with optimizers[0].release_gradients(released):
        for seed in range(3):
            for model in (released, ordinary):
                loss = seeded_loss(model, seed)
                with CONTEXTS[name]():  # which backward itself may feel
                    loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            optimizers[1].zero_grad()
    assert_same_bits(snapshot(released, optimizers[0]), snapshot(ordinary, optimizers[1]))


def test_votes_are_the_same_inside(tmp_path: Path) -> None:
    with process_group(tmp_path):
        expected = run(nullcontext, torch.float32, constructs=False, vote=MajorityVote())
        for name, context in CONTEXTS.items():
            assert_same_bits(run(context, torch.float32, constructs=False, vote=MajorityVote()), expected, name)


def test_closures_and_foreign_optimizers_run_in_the_contexts_of_the_user() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    def look() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
        return 0.0

    class Foreign(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            look()
            return super().step(closure)

    model = small_model()
    optimizer = STAC(model, trunk_optimizer=Foreign)
    set_gradients(model, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16), default_dtype(torch.float64):
        optimizer.step(look)
    assert seen == [(True, torch.float64)] * 2


def test_contexts_are_as_before_after_a_step_that_fails() -> None:
    model = small_model()
    optimizer = STAC(model, error_if_nonfinite=True)
    set_gradients(model, 0)
    model.get_parameter("0.weight").grad = torch.full((5, 6), torch.nan)
    before = snapshot(model, optimizer)
    with default_dtype(torch.float64), torch.autocast("cpu", dtype=torch.float16), torch.device("meta"):
        with pytest.raises(RuntimeError, match="holds NaN"):
            optimizer.step()
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta
    assert_same_bits(snapshot(model, optimizer), before)


def test_nothing_is_entered_where_no_context_is_active() -> None:
    groups = STAC(small_model()).param_groups
    assert neutral(groups) is NOTHING
    with torch.inference_mode():
        assert neutral(groups) is not NOTHING


def test_state_loaded_in_inference_mode_serves_steps_outside() -> None:
    model = small_model()
    optimizer = STAC(model, lr=torch.tensor(0.01))
    set_gradients(model, 0)
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"].fill_(0.5)


def test_model_made_in_inference_mode_steps_there_and_is_refused_outside() -> None:
    with torch.inference_mode():
        model = small_model()
        set_gradients(model, 0)
    optimizer = STAC(model)

    def held() -> list[Tensor]:
        states = (value for state in optimizer.state.values() for value in state.values())
        return [tensor.clone() for tensor in (*model.parameters(), *states)]

    with torch.inference_mode():
        optimizer.step()
        before = held()
    with pytest.raises(RuntimeError, match=r"'0.weight' was made inside torch.inference_mode.*Nothing was changed"):
        optimizer.step()
    assert_same_bits(held(), before)
    with torch.inference_mode():
        optimizer.step()
    plain = small_model()
    expected = STAC(plain)
    set_gradients(plain, 0)
    expected.step()
    expected.step()
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(nn.Parameter(param.clone()).detach(), other.detach())


def test_default_dtype_is_the_users_after_updates_that_overlap() -> None:
    """As those of two threads, which share it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        groups = [{"params": list(small_model().parameters())}]
        first = neutral(groups)
        with first:
            second = neutral(groups)
            second.__enter__()
            first.__exit__(None, None, None)
            assert torch.get_default_dtype() is torch.float32
            second.__exit__(None, None, None)
            assert torch.get_default_dtype() is torch.bfloat16
            first.__enter__()
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
