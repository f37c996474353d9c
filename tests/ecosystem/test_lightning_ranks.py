"""STAC in Lightning on two ranks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stac_optimizer import MajorityVote
from tests.ecosystem.pages import own_warnings
from tests.ecosystem.test_lightning import Net, fitted
from tests.ranks import run_ranks
from tests.support import assert_same_bits


def on_rank(folder: Path, vote: bool) -> tuple[dict[str, torch.Tensor], int, list[str]]:
    """The weights after training under DDP, the number of steps, and what was warned of."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
    os.environ.update(started, TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # as torchrun does
    arguments: dict[str, Any] = {"vote": MajorityVote()} if vote else {}
    with warnings.catch_warnings(), own_warnings() as told:
        warnings.simplefilter("ignore")
        model = Net(**arguments)
        # Clipping by one norm over both roles is not for votes, nor is one of Lightning's here.
        clip = {} if vote else {"gradient_clip_val": 0.1}
        trainer = fitted(model, folder, strategy="ddp", devices=2, num_nodes=1, **clip)
    return model.state_dict(), trainer.global_step, told


def test_ranks_have_the_same_weights(tmp_path: Path) -> None:
    (first, steps, told), (second, _, _) = run_ranks(on_rank, 2, tmp_path, False, timeout=120.0)
    assert_same_bits(first, second)
    assert steps == 12  # the sampler deals six batches of each epoch out
    assert told == []


def test_vote_that_is_built_of_the_module_within_is_told_of(tmp_path: Path) -> None:
    """Lightning gives configure_optimizers the module that DDP wraps."""
    for _, _, told in run_ranks(on_rank, 2, tmp_path, True, timeout=120.0):
        (message,) = told
        assert "so the vote decides nothing" in message
