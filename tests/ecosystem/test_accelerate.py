"""STAC under accelerate: on one process, with its GradScaler, and on two ranks."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from stac_optimizer import STAC, MajorityVote
from tests.ecosystem.by_hand import train
from tests.ecosystem.pages import Run, continued, named_state, own_warnings, run
from tests.ranks import run_ranks
from tests.support import assert_same_bits, seeded_loss, small_model
from tests.voting import seed_of


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    AcceleratorState._reset_state(True)


def whole_weights(done: Run) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in done.model.state_dict().items()}


def test_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, again = continued("accelerate", tmp_path, 7)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))


def test_run_is_the_loop_by_hand(tmp_path: Path) -> None:
    prepared = "model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)"
    kept = f"kept = copy.deepcopy((model, optimizer))\n{prepared}"
    imports = {"import torch\nfrom acc": "import copy\n\nimport torch\nfrom acc"}
    done = run("accelerate", tmp_path, change={prepared: kept, **imports})
    model, optimizer = done.names["kept"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    train(model, optimizer, schedule, done.names["data"])
    assert_same_bits(done.model.state_dict(), model.state_dict())


def test_wrapper_hands_on_no_attributes() -> None:
    optimizer = Accelerator(cpu=True).prepare(STAC(small_model()))
    with pytest.raises(AttributeError, match="partition"):
        _ = optimizer.partition
    assert optimizer.optimizer.partition.cap_layer_names == ("3",)


@pytest.mark.parametrize("before", [True, False])
def test_before_or_after_prepare_is_the_same(before: bool) -> None:
    accelerator, model = Accelerator(cpu=True), small_model()
    twin = copy.deepcopy(model)
    if before:
        prepared, optimizer = accelerator.prepare(model, STAC(model))
    else:
        prepared = accelerator.prepare(model)
        optimizer = accelerator.prepare(STAC(prepared))
    plain = STAC(twin)
    for seed in range(3):
        for each, stepping in ((prepared, optimizer), (twin, plain)):
            stepping.zero_grad()
            seeded_loss(each, seed).backward()
            stepping.step()
    assert_same_bits(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("fused", [None, True])
def test_scaler_of_accelerate_skips_and_steps(fused: bool | None) -> None:
    Accelerator(cpu=True)
    model = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(STAC(model, fused=fused), scaler=scaler)
    for seed in range(3):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(seeded_loss(model, seed)).backward()
        if seed == 1:
            scaler.scale(model.get_parameter("0.weight").sum() * torch.inf).backward()
        optimizer.step()
        assert optimizer.step_was_skipped is (seed == 1 and not fused)  # a fused step skips by itself
        assert torch.equal(before["0.weight"], model.get_parameter("0.weight")) is (seed == 1)


def on_rank(function: Any, *arguments: Any) -> Any:
    """On a rank: let other packages warn, and tell accelerate that there are others."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    AcceleratorState._reset_state(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def sharded_run(folder: Path) -> tuple[int, ...]:
    """The program of the page, whole and killed; accelerate would not shard on a CPU, so it hears of GPUs."""

    def on_cpu(name: str, **arguments: Any) -> Run:
        AcceleratorState._reset_state(True)
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return run("fsdp2", folder / name, **arguments)

    with own_warnings() as told:
        whole, killed = on_cpu("whole"), on_cpu("killed", kill_after=7)
        again = on_cpu("killed")
        assert_same_bits(whole_weights(again), whole_weights(whole))
        held = sum(value.nbytes for state in whole.optimizer.state.values() for value in state.values())
    assert told == []
    assert (whole.steps, killed.steps, again.steps) == (12, 7, 9)  # one of them only makes state to load into
    return whole.optimizer.state_bytes(), held


def test_sharded_run_goes_on_to_the_bit_and_state_bytes_are_of_all_ranks(tmp_path: Path) -> None:
    (said, held), (other_said, _) = run_ranks(on_rank, 2, sharded_run, tmp_path, timeout=120.0)
    assert said == other_said == held


def voted(order: str) -> list[str]:
    """What is warned of by a vote that is built before the model is wrapped, or after it."""
    accelerator, model = Accelerator(cpu=True), small_model()
    with own_warnings() as told:
        prepared: nn.Module
        if order == "before":
            optimizer: Any = STAC(model, vote=MajorityVote())
            prepared, optimizer = accelerator.prepare(model, optimizer)
        else:
            prepared = accelerator.prepare(model)
            optimizer = accelerator.prepare(STAC(prepared, vote=MajorityVote()))
        for step in range(2):
            optimizer.zero_grad()
            accelerator.backward(seeded_loss(prepared, seed_of(step)))
            optimizer.step()
    return told


@pytest.mark.parametrize(("order", "count"), [("before", 1), ("after", 0)])
def test_vote_wants_the_prepared_model(order: str, count: int) -> None:
    for told in run_ranks(on_rank, 2, voted, order):
        assert len(told) == count
        assert all("as in transformers' Trainer and accelerate" in message for message in told)
