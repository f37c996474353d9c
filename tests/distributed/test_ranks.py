"""The harness itself: it must report what goes wrong on any rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _summed(value: float) -> float:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return float(total)


def _raise_on(bad: int) -> None:
    if dist.get_rank() == bad:
        raise ValueError("bad rank")


def _die() -> None:
    if dist.get_rank() == 1:
        os._exit(1)


def _hang() -> None:
    if dist.get_rank() == 0:
        time.sleep(100)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_returns_what_it_found(world_size: int) -> None:
    expected = float(sum(range(world_size)) + world_size)
    assert run_ranks(_summed, world_size, 1.0) == [expected] * world_size


def test_error_of_one_rank_is_told_with_its_rank() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*bad rank"):
        run_ranks(_raise_on, 2, 1, timeout=10)


def test_rank_that_dies_is_told() -> None:
    with pytest.raises(AssertionError, match="rank 1: died without a word"):
        run_ranks(_die, 2, timeout=10)


def test_rank_that_hangs_is_told() -> None:
    with pytest.raises(AssertionError, match="rank 0: not done after 4 s"):
        run_ranks(_hang, 2, timeout=4)
