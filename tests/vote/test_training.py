"""Voting as part of training: DistributedDataParallel, accumulation, clipping, unused parameters, FSDP2."""

from __future__ import annotations

import gc
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC, MajorityVote
from stac_optimizer.optim import Lion, Signum
from tests.ranks import run_ranks
from tests.support import assert_same_bits, seeded_loss, small_model
from tests.voting import seed_of, voting

Weights = dict[str, Tensor]


def train(strategy: str, steps: int) -> Weights:
    """Weights after training on batches of this rank's own, each in two parts."""
    model = small_model()
    ddp = DistributedDataParallel(model)
    optimizer = voting(model if strategy.startswith("plain") else ddp)
    for step in range(steps):
        optimizer.zero_grad()
        if strategy == "ddp":
            (seeded_loss(ddp, seed_of(step)) + seeded_loss(ddp, seed_of(step, 1))).div(2).backward()
        elif strategy == "ddp-accumulating":
            with ddp.no_sync():
                seeded_loss(ddp, seed_of(step)).div(2).backward()
            seeded_loss(ddp, seed_of(step, 1)).div(2).backward()
        else:  # the optimizer averages the cap
            with ddp.no_sync():
                for part in range(2):
                    seeded_loss(ddp, seed_of(step, part)).div(2).backward()
        nn.utils.clip_grad_norm_(optimizer.partition.trunk_parameters, 0.1)
        if strategy.startswith("ddp") and strategy != "ddp-no-sync":
            nn.utils.clip_grad_norm_(optimizer.partition.cap_parameters, 10.0)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("strategy", "ranks", "steps"),
    [("ddp", 2, 200), ("ddp", 4, 200), ("ddp-accumulating", 3, 40), ("ddp-no-sync", 2, 40), ("plain-no-sync", 3, 40)],
)
def test_ranks_stay_bit_identical(strategy: str, ranks: int, steps: int) -> None:
    first, *others = run_ranks(train, ranks, strategy, steps)
    for weights in others:
        assert_same_bits(weights, first)
    assert not any(torch.equal(weight, small_model().state_dict()[name]) for name, weight in first.items())


def test_who_averages_the_cap_makes_no_difference() -> None:
    """Of two ranks, whose sums have one order."""
    expected = run_ranks(train, 2, "ddp-accumulating", 10)[0]
    for strategy in ("ddp-no-sync", "plain-no-sync"):
        assert_same_bits(run_ranks(train, 2, strategy, 10)[0], expected)


def wrapped_inside() -> Weights:
    """A trunk wrapped by itself within the model, and a rule of another sign that does not vote."""
    torch.manual_seed(0)
    model = nn.Sequential(
        DistributedDataParallel(nn.Linear(6, 5)), DistributedDataParallel(nn.Linear(5, 4)), nn.Linear(4, 3)
    )
    optimizer = voting(model)
    lion = small_model()
    groups: list[dict[str, Any]] = [
        {"params": list(lion[0].named_parameters("0")), "stac_role": "trunk"},
        {"params": list(lion[1].named_parameters("1")), "stac_role": "cap", "weight_decay": 0.1},
        {"params": list(lion[3].named_parameters("3")), "stac_role": "cap"},
    ]
    signum = partial(Signum, vote=MajorityVote())
    explicit = STAC(groups, lr=1e-2, trunk_optimizer=signum, cap_optimizer=Lion)
    for step in range(4):
        for each, held in ((model, optimizer), (lion, explicit)):
            held.zero_grad()
            seeded_loss(each, seed_of(step)).backward()
            held.step()
    return {**model.state_dict(), **{f"lion.{name}": weight for name, weight in lion.state_dict().items()}}


def test_parts_that_are_wrapped_by_themselves_and_rules_that_do_not_vote() -> None:
    first, second = run_ranks(wrapped_inside, 2)
    assert_same_bits(first, second)


def left_over(kind: str) -> bool:
    """A backward that no step consumed, then a step after one under no_sync: the cap is still averaged."""
    model = small_model()
    ddp = DistributedDataParallel(model)
    optimizer = voting(ddp)
    seeded_loss(ddp, seed_of(0)).backward()
    if kind == "dropped":
        optimizer.zero_grad()
    with ddp.no_sync():
        seeded_loss(ddp, seed_of(1)).backward()
    optimizer.step()
    return agree(model)


def agree(model: nn.Module) -> bool:
    """Whether this rank has the same weights as the first."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    first = flat.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, flat)


@pytest.mark.parametrize("kind", ["dropped", "added-to"])
def test_what_one_backward_averaged_is_forgotten_by_the_next_under_no_sync(kind: str) -> None:
    assert run_ranks(left_over, 2, kind) == [True, True]


def rebuilt() -> bool:
    """DistributedDataParallel outlives an optimizer that voted, and is trained by another."""
    model = small_model()
    ddp = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = voting(ddp)
    seeded_loss(ddp, seed_of(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    gc.collect()
    for step in range(2):
        optimizer.zero_grad()
        seeded_loss(ddp, seed_of(step)).backward()
        optimizer.step()
    return agree(model)


def test_hook_averages_everything_once_its_optimizer_is_gone() -> None:
    assert run_ranks(rebuilt, 2) == [True, True]


def halves(wrapped: bool) -> float:
    """The mean of gradients of the cap whose sum would overflow."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False)).half()
    used = DistributedDataParallel(model) if wrapped else model
    optimizer = voting(used, lr=1.0)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.bias").fill_(40000.0)
        model.get_parameter("1.weight").fill_(1e-3)
    used(torch.zeros(1, 2, dtype=torch.half)).sum().backward()
    voted = model.get_parameter("0.bias").grad
    assert voted is not None
    voted.mul_(1 + dist.get_rank())  # or ranks would have nothing to vote on
    optimizer.step()
    grad = model.get_parameter("1.weight").grad
    assert grad is not None
    return float(grad.max())


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
def test_mean_of_large_float16_gradients_is_finite(wrapped: bool) -> None:
    assert run_ranks(halves, 2, wrapped) == [40000.0, 40000.0]


class Branches(nn.Module):
    """Each rank uses a branch of its own; no rank the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 5) for _ in range(4))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = self.branches[dist.get_rank()]
        result: Tensor = self.head(chosen(inputs))
        return result


def unused(wrapped: bool) -> tuple[Weights, list[bool]]:
    model = Branches()
    used = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = voting(used)
    for step in range(5):
        optimizer.zero_grad()
        seeded_loss(used, seed_of(step)).backward()
        optimizer.step()
    return model.state_dict(), [branch.weight.grad is None for branch in model.branches]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
def test_parameters_unused_on_some_ranks_move_and_those_unused_on_all_stay(wrapped: bool) -> None:
    (first, absent), *others = run_ranks(unused, 3, wrapped)
    assert absent == [False, False, False, True]
    for weights, _ in others:
        assert_same_bits(weights, first)
    before = Branches().state_dict()
    assert [torch.equal(first[name], before[name]) for name in first if name.endswith("weight")] == [
        False,
        False,
        False,
        True,
        False,
    ]


def drift(encoding: str) -> float:
    """How far a weight moves whose gradients are all zero."""
    model = small_model()
    optimizer = voting(model, weight_decay=0.0, vote=MajorityVote(encoding=encoding))
    weight = model.get_parameter("0.weight").detach()
    before = weight.clone()
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    return float((weight - before).abs().max())


def test_only_binary_votes_drift_without_gradient() -> None:
    assert run_ranks(drift, 2, "ternary") == [0.0, 0.0]
    assert min(run_ranks(drift, 2, "binary")) > 0.03


def sharded_cap() -> tuple[Weights, bool]:
    """FSDP2 shards and averages the cap; the trunk, which it ignores, is voted on."""
    model = small_model()
    trunk = {param for name, param in model.named_parameters() if not name.startswith("3.")}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=trunk)
    optimizer = voting(model)
    for step in range(5):
        optimizer.zero_grad()
        seeded_loss(model, seed_of(step)).backward()
        optimizer.step()
    held: Any = model[3].weight
    return {name: weight for name, weight in model.state_dict().items() if name[0] in "01"}, hasattr(held, "to_local")


@pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters, reason="this torch shards all parameters or none"
)
def test_fsdp2_with_the_trunk_ignored() -> None:
    (first, is_sharded), (second, _) = run_ranks(sharded_cap, 2)
    assert is_sharded
    assert_same_bits(first, second)
