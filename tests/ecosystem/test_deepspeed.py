"""STAC under DeepSpeed, on two ranks; tests/stack/test_deepspeed.py does to groups what its stages 1 and 2 do."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ecosystem.pages import Run, own_warnings, run
from tests.ranks import run_ranks
from tests.support import assert_same_bits

STEPS_BEFORE_IT_DIES = 7


def weights_of(done: Run, stage: int) -> dict[str, Tensor]:
    import deepspeed  # noqa: PLC0415 - it wants to hear first that there is no other accelerator

    with deepspeed.zero.GatheredParameters(list(done.model.parameters()), enabled=stage == 3):
        return copy.deepcopy(done.model.state_dict())


def on_rank(folder: Path) -> dict[int, Any]:
    """The program of the page at each stage, whole and killed: the weights that it ended with."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(DS_ACCELERATOR="cpu", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with warnings.catch_warnings(), own_warnings() as told:
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: PLC0415
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # noqa: PLC0415

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # it would compile for a minute
        results = {}
        for stage in range(4):
            change = {'"stage": 2': f'"stage": {stage}'}
            calls = 4 if stage else 1  # of STAC's step in each of DeepSpeed's, one for each group
            whole = run("deepspeed", folder / f"whole-{stage}", change=change)
            kill_after = STEPS_BEFORE_IT_DIES * calls
            killed = run("deepspeed", folder / f"killed-{stage}", change=change, kill_after=kill_after)
            again = run("deepspeed", folder / f"killed-{stage}", change=change)
            assert (whole.steps, killed.steps, again.steps) == (12 * calls, kill_after, 8 * calls)
            results[stage] = weights_of(whole, stage)
            assert_same_bits(weights_of(again, stage), results[stage])
    assert told == []
    return results


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    first, second = run_ranks(on_rank, 2, tmp_path_factory.mktemp("deepspeed"), timeout=300.0)
    assert_same_bits(first, second)
    return dict(first)


def test_killed_run_goes_on_to_the_bit_at_every_stage(by_stage: dict[int, Any]) -> None:
    assert list(by_stage) == [0, 1, 2, 3]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_weights_are_those_of_stage_0(by_stage: dict[int, Any], stage: int) -> None:
    """Stages 2 and 3 sum gradients in another order."""
    for name, weight in by_stage[0].items():
        if stage == 1:
            assert_same_bits(by_stage[stage][name], weight)
        torch.testing.assert_close(by_stage[stage][name], weight, msg=f"{name} at stage {stage}")
