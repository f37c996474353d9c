"""Runs that tests compare: models with their optimizers, stepped, resumed, equal to the bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_state_dict

from stac_optimizer import STAC
from tests.support import assert_same_bits, seeded_loss, small_model, snapshot, take_steps, through_file

Build = Callable[[nn.Module], STAC]
Make = Callable[[int, torch.dtype], nn.Sequential]
Run = tuple[nn.Module, STAC]


def built(
    build: Build, dtype: torch.dtype = torch.float32, *, seed: int = 0, make: Make = small_model
) -> tuple[nn.Sequential, STAC]:
    """A model, by default a small one, and the optimizer that ``build`` makes of it."""
    model = make(seed, dtype)
    return model, build(model)


def stepped(
    steps: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    make: Make = small_model,
    **arguments: Any,
) -> tuple[nn.Sequential, STAC]:
    """A model, by default a small one, and its optimizer after these many steps."""
    model, optimizer = built(lambda model: STAC(model, **{"lr": 1e-2, **arguments}), dtype, seed=seed, make=make)
    take_steps(model, optimizer, range(steps))
    return model, optimizer


def twins(dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Run, Run]:
    """Two equal runs that have not begun."""

    def build(model: nn.Module) -> STAC:
        return STAC(model, **copy.deepcopy({"lr": 1e-2, **arguments}))

    return built(build, dtype), built(build, dtype)


def train(run: Run, seeds: Iterable[int], loss: Callable[[nn.Module, int], Tensor] = seeded_loss) -> None:
    """An ordinary loop: for each seed zero_grad, backward, step."""
    model, optimizer = run
    for seed in seeds:
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.step()


def through_file_into(target: Run, held: Run) -> Run:
    """The target, once it has loaded weights and optimizer of a run through a file."""
    weights, saved = through_file((held[0].state_dict(), held[1].state_dict()))
    target[0].load_state_dict(weights)
    target[1].load_state_dict(saved)
    return target


def assert_equal_runs(one: Run, other: Run) -> None:
    """Both are in one state to the bit, and stay so over three further steps."""
    assert_same_bits(snapshot(*one), snapshot(*other))
    for model, optimizer in (one, other):
        take_steps(model, optimizer, range(100, 103))
    assert_same_bits(snapshot(*one), snapshot(*other))


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A process group of this process alone, on the CPU."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def has_flattened_without_state() -> bool:
    """Whether this torch can load a flattened state dict in which some parameter has no state."""
    return "_reconstruct_nested_dict" in inspect.getsource(torch_state_dict)
