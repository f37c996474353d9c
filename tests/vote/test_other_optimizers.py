"""Other optimizers beside one that votes: what DistributedDataParallel leaves to votes, none of them may take."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stac_optimizer import STAC
from stac_optimizer.optim import Lion
from tests.ranks import run_ranks
from tests.support import seeded_loss, small_model
from tests.voting import seed_of, voting

OTHERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "STAC": STAC,
    "Lion": lambda model: Lion(model.named_parameters()),
    "in-part": lambda model: SGD([nn.Parameter(torch.zeros(2)), model.get_parameter("module.0.bias")], lr=0.1),
}
CLASSES = {"fused": "AdamW", "in-part": "SGD"}


def agree(model: nn.Module) -> bool:
    """Whether this rank has the same weights as the first."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    first = flat.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, flat)


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    optimizer.zero_grad()
    seeded_loss(model, seed_of(number)).backward()
    optimizer.step()


def held_by_a_scheduler(kind: str) -> tuple[str, bool]:
    """The message for another that steps in the place of one that votes; whether it trains once that is gone."""
    ddp = DistributedDataParallel(small_model())
    optimizer: Any = voting(ddp)
    schedule = LambdaLR(optimizer, lambda number: 1.0)
    step(ddp, optimizer, 0)
    schedule.step()
    before = {name: weight.clone() for name, weight in ddp.state_dict().items()}
    weak = weakref.ref(optimizer)
    optimizer = OTHERS[kind](ddp)
    with pytest.raises(RuntimeError) as caught:
        step(ddp, optimizer, 1)
    del schedule
    gc.collect()
    assert weak() is None
    ddp.load_state_dict(before)
    optimizer = OTHERS[kind](ddp)
    for number in range(2):
        step(ddp, optimizer, number)
    return str(caught.value), agree(ddp)


@pytest.mark.parametrize("kind", OTHERS)
def test_step_on_gradients_that_were_left_to_votes_is_refused(kind: str) -> None:
    for message, is_same in run_ranks(held_by_a_scheduler, 2, kind):
        assert message.startswith(f"{CLASSES.get(kind, kind)} has stepped on gradients")
        assert "Drop all references to that optimizer" in message
        assert is_same


class Container(Optimizer):
    """Several optimizers as one, over all of their parameters."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([{"params": group["params"]} for each in inner for group in each.param_groups], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch declares two
        for each in self.inner:
            each.step()


def beside(kind: str) -> bool:
    """What others may do while the one that votes trains its model."""
    ddp = DistributedDataParallel(small_model())
    other = DistributedDataParallel(small_model(1))
    optimizer: Any = voting(ddp)
    another = SGD(other.parameters(), lr=0.1)
    if kind == "container":
        container = Container(optimizer, another)
        for number in range(4):
            container.zero_grad()
            (seeded_loss(ddp, seed_of(number)) + seeded_loss(other, seed_of(number, 1))).backward()
            container.step()
    elif kind == "checkpoint":
        seeded_loss(ddp, seed_of(0)).backward()
        optimizer.zero_grad()
        get_optimizer_state_dict(ddp, optimizer)  # by a step that makes state
    elif kind == "not-its-gradients":
        seeded_loss(ddp, seed_of(0)).backward()
        optimizer.zero_grad()
        late = SGD(ddp.parameters(), lr=0.1)
        late.step()
    elif kind == "votes-too":
        step(ddp, voting(ddp.module), 0)
    for number in range(4):
        optimizer.zero_grad()
        for part in range(2):  # each averaged
            seeded_loss(ddp, seed_of(number, part)).div(2).backward()
        if number == 2:
            continue  # a batch that is skipped
        step(other, another, number)
        optimizer.step()
    return agree(ddp) and agree(other)


@pytest.mark.parametrize("kind", ["plain", "container", "checkpoint", "not-its-gradients", "votes-too"])
def test_others_that_leave_its_gradients_alone_may_step(kind: str) -> None:
    assert run_ranks(beside, 2, kind) == [True, True]
