"""Dry runs: a step on fake tensors, which have no memory, and on those of the device "meta"."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from stac_optimizer.optim.signum.fused.devices import fits_triton
from stac_optimizer.tensors.units.pieces import Tensors
from tests.support import assert_same_bits, set_units, small_model, snapshot

PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FLAGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "default": (torch.float32, {}),
    "no-momentum": (torch.float32, {"trunk_momentum": 0.0}),
    "cautious": (torch.float32, {"trunk_cautious": True}),
    "int8": (torch.float32, {"trunk_state_dtype": torch.int8}),
    "bfloat16-state": (torch.float32, {"trunk_state_dtype": torch.bfloat16}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "finite": (torch.float32, {"error_if_nonfinite": True}),
    "warmup": (torch.float32, {"lr": 0.0}),
    "low-precision": (torch.bfloat16, {}),
    "rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "rounding-int8": (torch.bfloat16, {"stochastic_rounding": True, "trunk_state_dtype": torch.int8}),
    "lion": (torch.float32, {"trunk_optimizer": Lion}),
    "lion-cautious-rounding": (
        torch.bfloat16,
        {"trunk_optimizer": partial(Lion, cautious=True), "stochastic_rounding": True},
    ),
    "muon": (torch.float32, {"trunk_optimizer": Muon}),
    "muon-cautious-rounding-int8": (
        torch.bfloat16,
        {"trunk_optimizer": partial(Muon, cautious=True, state_dtype="int8"), "stochastic_rounding": True},
    ),
    "cap-only": (torch.float32, {"last_n_layers": 9}),
    "trunk-only": (torch.float32, {"last_n_layers": 0}),
    "foreign": (torch.float32, {"trunk_optimizer": torch.optim.AdamW}),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
each_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))


def model_of(dtype: torch.dtype, device: str = "cpu") -> nn.Sequential:
    """With weights that codes can hold, one of them too large for a pack."""
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    return nn.Sequential(nn.Conv2d(8, 5, 3, **made), nn.Linear(300, 64, **made), nn.Linear(5, 3, **made))


def set_ones(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def state_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values())


@each_path
@each_flags
def test_dry_run_passes(flags: tuple[torch.dtype, dict[str, Any]], path: dict[str, Any]) -> None:
    dtype, arguments = flags
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(dtype)
        optimizer = STAC(model, **{"weight_decay": 0.1, **path, **arguments})
        declared = optimizer.state_bytes()
        assert "cap" in str(optimizer.partition)
        for _ in range(3):
            set_ones(model)
            optimizer.step()
        assert all(isinstance(tensor, FakeTensor) for tensor in state_of(optimizer))
        assert optimizer.state_bytes() == declared
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert all(isinstance(tensor, FakeTensor) for tensor in state_of(optimizer))


# A foreign optimizer steps as it would alone.
each_native = pytest.mark.parametrize("name", [name for name in FLAGS if name != "foreign"])


@each_path
@each_native
def test_dry_run_goes_on_once_the_mode_has_ended(name: str, path: dict[str, Any]) -> None:
    dtype, arguments = FLAGS[name]
    with FakeTensorMode():
        model = model_of(dtype)
        set_ones(model)
    optimizer = STAC(model, **{"weight_decay": 0.1, **path, **arguments})
    optimizer.step()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert all(isinstance(tensor, FakeTensor) for tensor in state_of(optimizer))


@each_path
def test_dry_run_of_classes_alone_and_in_small_units(path: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=4000)
    kinds: list[Any] = [Signum, AdamW, Lion, partial(Signum, cautious=True, state_dtype=torch.int8)]
    with FakeTensorMode():
        for kind in kinds:
            model = model_of(torch.float32)
            optimizer = kind(model.parameters(), **path)
            for _ in range(2):
                set_ones(model)
                optimizer.step()


@each_path
def test_dry_run_with_a_tensor_lr(path: dict[str, Any]) -> None:
    with FakeTensorMode():
        model = model_of(torch.float32)
        optimizer = STAC(model, lr=torch.tensor(0.01), weight_decay=0.1, **{**path, "foreach": None})
        for _ in range(2):
            set_ones(model)
            optimizer.step()


def test_dry_run_counts_steps() -> None:
    with FakeTensorMode():
        model = model_of(torch.float32)
        optimizer = STAC(model, foreach=True)
        for _ in range(3):
            set_ones(model)
            optimizer.step()
        counts = {float(optimizer.state[param]["step"]) for param in model.parameters()}
    assert counts == {3.0}


def test_dry_run_of_released_gradients() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(300, 64), nn.Linear(64, 3))
        optimizer = STAC(model, fused=True)
        with optimizer.release_gradients(model):
            for _ in range(2):
                model(torch.ones(2, 300)).sum().backward()
                optimizer.step()
        assert all(param.grad is None for param in model.parameters())


@each_path
def test_tensors_with_data_are_refused_in_a_dry_run(path: dict[str, Any]) -> None:
    model = small_model()
    optimizer = STAC(model, **path)
    for steps in range(2):
        set_ones(model)
        before = snapshot(model, optimizer)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(RuntimeError, match=r"'0.weight' holds data.*build model.*Nothing was changed"),
        ):
            optimizer.step()
        assert_same_bits(snapshot(model, optimizer), before)
        assert len(optimizer.state) == (0 if steps == 0 else 6)
        optimizer.step()
    assert not any(isinstance(tensor, FakeTensor) for tensor in state_of(optimizer))


def test_fake_gradient_of_a_real_parameter_is_refused() -> None:
    model = small_model()
    optimizer = STAC(model, fused=True)
    set_ones(model)
    before = snapshot(model, optimizer)
    with FakeTensorMode():
        fake = torch.ones(5, 6)
    model.get_parameter("0.weight").grad = fake
    with pytest.raises(RuntimeError, match=r"'0.weight' \(trunk\) holds data and its gradient is a fake tensor"):
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)


def test_kernels_walk_no_memory_of_fake_tensors() -> None:
    with FakeTensorMode():
        fake = torch.ones(4, 128)
    group = Signum([nn.Parameter(torch.ones(2))]).param_groups[0]
    real = torch.ones(4, 128)
    assert fits_triton(Tensors(real, real, (real,)), real, group)
    assert not fits_triton(Tensors(real, real, (fake,)), real, group)
    assert not fits_triton(Tensors(fake, real, (real,)), fake, group)


def test_a_dry_run_leaves_a_real_one_as_it_was() -> None:
    """Nothing that it has made is remembered."""

    def stepped() -> Any:
        model = small_model(dtype=torch.bfloat16)
        optimizer = STAC(model, fused=True, stochastic_rounding=True)
        set_ones(model)
        optimizer.step()
        return snapshot(model, optimizer)

    expected = stepped()
    with FakeTensorMode():
        stepped_dry = model_of(torch.bfloat16)
        optimizer = STAC(stepped_dry, fused=True, stochastic_rounding=True)
        set_ones(stepped_dry)
        optimizer.step()
    assert_same_bits(stepped(), expected)


@pytest.mark.parametrize("as_context", [False, True])
@each_native
def test_meta_device_passes(name: str, as_context: bool) -> None:
    dtype, arguments = FLAGS[name]
    for path in ({"foreach": False}, {"foreach": True}):
        with torch.device("meta") if as_context else nullcontext():
            model = model_of(dtype, "meta")
            optimizer = STAC(model, **{"weight_decay": 0.1, **path, **arguments})
            declared = optimizer.state_bytes()
            for _ in range(3):
                set_ones(model)
                optimizer.step()
            assert optimizer.state_bytes() == declared
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()


def test_fused_on_the_meta_device_is_refused_as_torch_does() -> None:
    model = model_of(torch.float32, "meta")
    optimizer = STAC(model, fused=True)
    set_ones(model)
    with pytest.raises(RuntimeError, match=r"'2.weight' \(cap\).*on 'meta'.*fused=False. Nothing was changed"):
        optimizer.step()
    assert not optimizer.state


def test_package_may_be_imported_in_a_dry_run() -> None:
    """And is the same after it as ever."""
    code = """
        from torch import Tensor
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode():
            from stac_optimizer.tensors import codes
        assert type(codes.PLACE_BITS) is Tensor
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
