"""Whose steps are voted on, and by which ranks: of groups, roles, and parameters that come later."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC, MajorityVote, named
from stac_optimizer.optim import Signum
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.support import seeded_loss, small_model
from tests.voting import seed_of, voting


class Schedule:
    def __repr__(self) -> str:
        return f"<Schedule at {os.getpid()}>"  # as addresses, another one in every process


class Scheduled(torch.optim.SGD):
    """Its groups hold an object."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["schedule"] = Schedule()


def apart() -> bool:
    """Each rank a model of its own kind, in a process group of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(6, 5 + rank), nn.Linear(5 + rank, 3))
    ddp = DistributedDataParallel(model, process_group=groups[rank])
    optimizer = voting(ddp)
    before = model.get_parameter("0.weight").detach().clone()
    seeded_loss(ddp, 0).backward()
    optimizer.step()
    return not torch.equal(model.get_parameter("0.weight"), before)


def test_ranks_of_other_process_groups_may_train_other_models() -> None:
    assert run_ranks(apart, 2, timeout=20) == [True, True]


def extended() -> tuple[list[Any], list[Any]]:
    """By rank the gradients of an early, a late and a cap parameter, and the weights after a step.

    The cap's guest must count as the same on both ranks.
    """
    model = small_model()
    ddp = DistributedDataParallel(model)
    model[1].requires_grad_(False)
    optimizer = voting(ddp, cap_optimizer=Scheduled, weight_decay=0.0)
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[1].named_parameters("1")), "stac_role": "trunk"})
    seeded_loss(ddp, seed_of(0)).backward()
    params = [model.get_parameter(name) for name in ("0.weight", "1.weight", "3.weight")]
    grads = [param.grad.clone() for param in params if param.grad is not None]
    optimizer.step()
    return grads, [param.detach().clone() for param in params]


def test_parameters_added_later_are_voted_on_and_not_averaged() -> None:
    (grads, weights), (others, other_weights) = run_ranks(extended, 2)
    assert list(map(torch.equal, grads, others)) == [False, False, True]
    assert list(map(torch.equal, weights, other_weights)) == [True, True, True]


def _added(vote: MajorityVote | None, value: str | None) -> STAC:
    optimizer = STAC(small_model(), vote=vote)
    group = {"params": list(nn.Linear(2, 2).named_parameters("4")), "stac_role": "trunk", "vote": value}
    optimizer.add_param_group(group)
    return optimizer


def _overridden(vote: MajorityVote | None, value: str | None) -> STAC:
    return STAC(small_model(), vote=vote, overrides=[(named("0"), {"vote": value})])


@pytest.mark.parametrize("build", [_overridden, _added], ids=["override", "added"])
def test_groups_vote_as_the_whole_optimizer_does(tmp_path: Path, build: Callable[..., STAC]) -> None:
    with pytest.raises(ValueError, match=r"vote is 'ternary', .* it is None"):
        build(None, "ternary")
    with process_group(tmp_path):
        for value in (None, "binary"):
            with pytest.raises(ValueError, match=rf"vote is {value!r}, .* it is 'ternary'"):
                build(MajorityVote(), value)
        optimizer = build(MajorityVote(), "ternary")
    assert {group["vote"] for group in optimizer.param_groups if group["stac_role"] == "trunk"} == {"ternary"}


def test_vote_of_the_caps_optimizer_is_refused(tmp_path: Path) -> None:
    with process_group(tmp_path), pytest.raises(ValueError, match=r"group 1: vote is 'ternary', .* it is None"):
        STAC(small_model(), cap_optimizer=partial(Signum, vote=MajorityVote()))
