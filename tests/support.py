"""What several test modules need: small models, seeded gradients, comparisons by bits."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.tensors.units import cutting, threads


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers: "0" and "1" in the trunk by default, "3" in the cap."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def wide_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """As :func:`small_model`, with trunk weights whose averages 8-bit codes can hold: one block a row, and three."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 5, 3), nn.Linear(300, 4), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def set_gradients(model: nn.Module, seed: int, *, skip: Iterable[str] = ()) -> None:
    """Give every trainable parameter a random gradient, the same for the same seed; None to those in ``skip``."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if param.requires_grad:
            grad = torch.randn(param.shape, generator=generator).to(param.dtype).to(param.device)
            param.grad = None if name in skip else grad


def seeded_loss(model: nn.Module, seed: int) -> Tensor:
    """The loss of a :func:`small_model` on a random batch, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    inputs, targets = (torch.randn(8, size, generator=generator).to(dtype) for size in (6, 3))
    return nn.functional.mse_loss(model(inputs), targets)


def names_of_gradients(model: nn.Module) -> list[str]:
    """The names of the parameters that have a gradient."""
    return [name for name, param in model.named_parameters() if param.grad is not None]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    """One step with seeded gradients for each seed."""
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def through_file(value: Any) -> Any:
    """Save and load safely, as a checkpoint would be."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit, NaN and signed zeros included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return torch.equal(one, other)


def assert_same_bits(left: Any, right: Any, where: str = "") -> None:
    """Assert that two tensors, or nested lists, tuples and dicts of them, are equal to the bit."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor), where
        assert same_bits(left, right), f"{where}: {left} != {right}"
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same_bits(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same_bits(one, other, f"{where}[{index}]")
    else:
        assert left == right, where


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """A deep copy of everything that a step may change: weights, state and groups."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def parameter_state(optimizer: STAC, model: nn.Module, name: str) -> dict[str, Any]:
    """The state of the parameter of this name."""
    state: dict[str, Any] = optimizer.state[model.get_parameter(name)]
    return state


def set_units(monkeypatch: pytest.MonkeyPatch, *, block: int = 1 << 40, pack: int = 0, shared: bool = False) -> None:
    """Set the units of work on the CPU; by default every tensor is one, and the calling thread does all."""
    monkeypatch.setattr(cutting, "BLOCK_NUMEL", block)
    monkeypatch.setattr(cutting, "CODED_NUMEL", block)
    monkeypatch.setattr(cutting, "PACK_NUMEL", pack)
    monkeypatch.setattr(threads, "SHARED_NUMEL", 1 if shared else 1 << 40)
    monkeypatch.setattr(threads, "LEAST_NUMEL", block)
    torch.set_num_threads(3 if shared else 1)  # conftest.py puts back one
    if shared:
        have_cores(monkeypatch)


def have_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have more cores than a test wants."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1000), raising=False)
