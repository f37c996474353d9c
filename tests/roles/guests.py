"""Runs that the tests of guests compare: a foreign optimizer in a role of STAC, and its class alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import lion_pytorch
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from stac_optimizer import STAC

from ..support import set_gradients, through_file

Function: TypeAlias = Callable[[Any], torch.optim.Optimizer]

CLASSES: dict[str, Function] = {
    "Adadelta": optim.Adadelta,
    "Adafactor": optim.Adafactor,
    "Adagrad": partial(optim.Adagrad, initial_accumulator_value=0.1),
    "Adam": partial(optim.Adam, amsgrad=True),
    "AdamW": partial(optim.AdamW, weight_decay=0.1),
    "Adamax": optim.Adamax,
    "ASGD": partial(optim.ASGD, lr=0.01, t0=2),
    "NAdam": partial(optim.NAdam, momentum_decay=4e-3),
    "RAdam": optim.RAdam,
    "RMSprop": partial(optim.RMSprop, momentum=0.9, centered=True),
    "Rprop": optim.Rprop,
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Lion": partial(lion_pytorch.Lion, betas=(0.9, 0.98)),
}
if hasattr(optim, "Muon"):  # since torch 2.9
    CLASSES["Muon"] = optim.Muon
STEPS, SAVED_AT = 6, 3
LR = 3e-3


def two_layers(seed: int = 0, *, bias: bool = True) -> nn.Sequential:
    """Layer "0" is the trunk, "2" the cap."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


def completed(function: Function, **values: Any) -> Function:
    """The function with what STAC gives where it has not written a value, for the class alone."""
    function = function if isinstance(function, partial) else partial(function)
    known = inspect.signature(function.func).parameters
    missing = {key: value for key, value in values.items() if key in known and key not in function.keywords}
    # A tensor in a partial would be one lr of all that it makes.
    return lambda params: function(params, **missing, **_unshared(function.keywords))


def _unshared(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() for key, value in values.items() if isinstance(value, Tensor)}


def decaying(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A schedule that multiplies."""
    return LambdaLR(optimizer, _decayed)


def _decayed(epoch: int) -> float:
    return 1 / (1 + epoch)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A schedule that wants a value for each group."""
    rates = [2 * float(group["lr"]) for group in optimizer.param_groups]
    return OneCycleLR(optimizer, rates, total_steps=STEPS + 1, cycle_momentum=False)


def trajectory(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Iterable[LRScheduler] = (),
    seeds: Iterable[int] = range(STEPS),
) -> list[list[Tensor]]:
    """The parameters after each step; in step 1 the first has no gradient."""
    path = []
    for seed in seeds:
        set_gradients(model, seed, skip={"0.weight"} if seed == 1 else ())
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        path.append([param.detach().clone() for param in model.parameters()])
    return path


def hosted(
    model: nn.Module,
    build: Callable[[nn.Module], STAC],
    schedule: Callable[[torch.optim.Optimizer], LRScheduler],
    *,
    is_pickled: bool = True,
) -> dict[str, list[list[Tensor]]]:
    """The trajectory under STAC, and those of copies that are made half-way.

    Args:
        model: the model; resumed is into a copy of other values.
        build: makes the optimizer.
        schedule: and its scheduler.
        is_pickled: whether one copy is by pickle.
    """
    optimizer = build(model)
    scheduler = schedule(optimizer)
    path = trajectory(model, [optimizer], [scheduler], range(SAVED_AT))
    run = (model, optimizer, scheduler)
    saved = through_file([each.state_dict() for each in run])
    runs: dict[str, Any] = {"itself": run, "deepcopied": copy.deepcopy(run)}
    if is_pickled:
        runs["unpickled"] = pickle.loads(pickle.dumps(run))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    fresh = build(other)
    runs["resumed"] = (other, fresh, schedule(fresh))
    for each, state in zip(runs["resumed"], saved, strict=True):
        each.load_state_dict(state)
    return {
        name: path + trajectory(some_model, [some_optimizer], [some_scheduler], range(SAVED_AT, STEPS))
        for name, (some_model, some_optimizer, some_scheduler) in runs.items()
    }
