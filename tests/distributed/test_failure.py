"""Ranks that die, raise alone or meet a bad gradient: an error on every rank in time, never a hang or silent drift."""

from __future__ import annotations

import math
import os
import re
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC
from stac_optimizer.distributed.shards import local_views
from tests.ranks import run_ranks
from tests.support import assert_same_bits, small_model

TIME_OUT = 2.0


def _is_odd() -> bool:
    """Whether this rank is the one to which it happens: the last."""
    return dist.get_rank() == dist.get_world_size() - 1


def _sharded(model: nn.Module, **arguments: Any) -> nn.Module:
    fully_shard(model, **arguments)
    return model


def _die(when: str) -> None:
    model = _sharded(small_model())
    if _is_odd() and when == "construction":
        os._exit(1)
    optimizer = STAC(model, error_if_nonfinite=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    if _is_odd():
        os._exit(1)
    optimizer.step()


@pytest.mark.parametrize(("when", "where"), [("construction", "check_agreement"), ("step", "check_finite")])
def test_rank_that_dies_fails_the_others(when: str, where: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(_die, 3, when, timeout=30)
    told = str(caught.value)
    assert "rank 2: died without a word" in told
    for rank in range(2):
        assert re.search(rf"(?s)rank {rank}: Traceback((?!\nrank ).)*in {where}\n((?!\nrank ).)*RuntimeError: ", told)


def _alone(what: str) -> tuple[str, float]:
    """The odd rank raises and stays; what each rank is told, and seconds until then."""
    mesh = DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=TIME_OUT)), "cpu")
    model = _sharded(small_model(dtype=torch.bfloat16), mesh=mesh)
    arguments: dict[str, Any] = {"stochastic_rounding": True, "trunk_cautious": True}
    dist.barrier()
    start = time.monotonic()
    try:
        if what == "constructor":
            STAC(model, **arguments, trunk_momentum=2.0 if _is_odd() else 0.9)
        else:
            optimizer = STAC(model, **arguments)
            model = model.float() if _is_odd() else model
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
    except (ValueError, RuntimeError) as error:
        seconds = time.monotonic() - start
        time.sleep(2 * TIME_OUT if _is_odd() else 0)
        return f"{type(error).__name__}: {error}", seconds
    return "no error", time.monotonic() - start


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("constructor", "ValueError: trunk_momentum must be"),
        ("gradient", "RuntimeError: '0.weight' (trunk) is torch.float32, and stochastic_rounding is for"),
    ],
)
def test_rank_that_raises_alone_costs_the_others_the_time_out(what: str, message: str) -> None:
    (others, waited), (odd, _) = run_ranks(_alone, 2, what)
    assert odd.startswith(message)
    assert others.startswith("RuntimeError: ")
    assert TIME_OUT * 0.9 < waited < 10 * TIME_OUT


def _held(model: nn.Module, optimizer: STAC) -> list[Tensor]:
    """Everything that a step may change on this rank."""
    tensors = [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
    return [tensor.detach().clone() for tensor in local_views(tensors)]


def _meet_nan(kind: str) -> str:
    """One step, then one with NaN in what the odd rank has of the second layer's weight."""
    model = small_model()
    if kind == "mixed":
        _sharded(model[3])
    elif kind == "sharded":
        _sharded(model)
    wrapped = DistributedDataParallel(model) if kind == "replicated" else model
    optimizer = STAC(wrapped, error_if_nonfinite=True)
    for value in (1.0, math.nan):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        grad = model.get_parameter("1.weight").grad
        assert grad is not None
        (local,) = local_views([grad])
        if kind == "replicated":
            optimizer.zero_grad()
            wrapped(torch.full((2, 6), value if _is_odd() else 1.0)).sum().backward()
        elif _is_odd():
            local[0] = value
        before = _held(model, optimizer)
        try:
            optimizer.step()
        except RuntimeError as error:
            assert_same_bits(_held(model, optimizer), before)
            return str(error).partition(" holds NaN or infinity. Nothing was changed")[0]
    return "no error"


@pytest.mark.parametrize(("kind", "name"), [("sharded", "1.weight"), ("replicated", "0.weight"), ("mixed", "1.weight")])
def test_nan_on_one_rank_is_refused_on_every_rank(kind: str, name: str) -> None:
    assert run_ranks(_meet_nan, 3, kind, timeout=30) == [f"non-finite gradients: that of {name!r} (trunk)"] * 3
