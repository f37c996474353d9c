"""Who takes part: what is tuned of each, and how it is built for a model. A script, or ``--plugin``, may add more.

Every learning rate is drawn from a range of one width around what is usual for its rule on small models, every decay
from three values. What is not tuned is each rule's usual value. Those of two roles share one split, so what differs
between them is the rule of the matrices alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from quality.search import Choice, Rate, Space, Values
from quality.task import Task
from stac_optimizer import STAC, embeddings, last_layers, optim, partition_trainable_layers, recipes, vectors

__all__ = ["ADAMW", "BASELINES", "CAP", "CONTESTANTS", "WARMUP_SHARE", "Built", "Contestant", "two_rates"]

ADAMW = "AdamW"
# Whom the others are counted against.
BASELINES = (ADAMW, "AdamW, two rates", "Lion", "schedule-free AdamW")
WARMUP_SHARE = 0.05
CAP = embeddings() | vectors() | last_layers(1)

ADAM_RATE, SIGN_RATE, SGD_RATE = Rate(1e-3), Rate(2e-4), Rate(3e-2)
ADAM_DECAY, SIGN_DECAY, SGD_DECAY = Choice((0.0, 0.01, 0.1)), Choice((0.0, 0.1, 1.0)), Choice((0.0, 1e-4, 1e-3))

Built = Optimizer | Sequence[Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One way to train a model.

    Attributes:
        space: what is tuned.
        build: from a model, values of the space and the task to an optimizer, or to several that step in turn.
        scheduled: whether its learning rates follow the schedule that all others do.
    """

    space: Space
    build: Callable[[nn.Module, Values, Task], Built]
    scheduled: bool = True


def of_class(optimizer: Callable[..., Optimizer], *, uses_betas: bool = False, **arguments: Any) -> Any:
    """Return how to build an optimizer of all parameters, with one learning rate and one decay."""

    def build(model: nn.Module, values: Values, task: Task) -> Optimizer:
        betas = {"betas": task.betas} if uses_betas else {}
        return optimizer(model.parameters(), lr=values["lr"], weight_decay=values["decay"], **betas, **arguments)

    return build


def two_rates(trunk: Rate, cap: Rate, decay: Choice) -> Space:
    """Return the space of a contestant with two roles, the cap without decay."""
    return {"trunk_lr": trunk, "cap_lr": cap, "decay": decay}


def adamw_of_two_rates(model: nn.Module, values: Values, task: Task) -> Optimizer:
    """Build AdamW over the split of STAC's recipes: what two rates are worth without another rule."""
    partition = partition_trainable_layers(model, cap=CAP)
    groups = [
        {"params": partition.trunk_parameters, "lr": values["trunk_lr"], "weight_decay": values["decay"]},
        {"params": partition.cap_parameters, "lr": values["cap_lr"], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=task.betas)


def schedule_free(model: nn.Module, values: Values, task: Task) -> Optimizer:
    """Build schedule-free AdamW, which brings a warm-up of its own."""
    from schedulefree import AdamWScheduleFree  # noqa: PLC0415 - an extra, which the others do without

    warmup = max(1, round(WARMUP_SHARE * task.steps))
    optimizer: Optimizer = AdamWScheduleFree(
        model.parameters(), lr=values["lr"], weight_decay=values["decay"], warmup_steps=warmup
    )
    return optimizer


def torch_muon(model: nn.Module, values: Values, task: Task) -> list[Optimizer]:
    """Build torch's Muon for the matrices of the trunk, and its AdamW for all else, convolutions too."""
    trunk = partition_trainable_layers(model, cap=CAP).trunk_parameters
    matrices = [param for param in trunk if param.ndim == 2]
    chosen = set(map(id, matrices))
    others = [param for param in model.parameters() if id(param) not in chosen]
    adamw = torch.optim.AdamW(others, lr=values["cap_lr"], weight_decay=0.0, betas=task.betas)
    if not matrices:
        return [adamw]
    decay = values["decay"]
    muon = torch.optim.Muon(matrices, lr=values["trunk_lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def stac_default(model: nn.Module, values: Values, task: Task) -> STAC:
    """Build STAC as it is without arguments but lr and decay."""
    with warnings.catch_warnings():
        # That the trunk holds an embedding is so on purpose: this is what one gets who never chose a cap.
        warnings.filterwarnings("ignore", message="the trunk holds the embedding")
        return STAC(model, lr=values["lr"], weight_decay=values["decay"], betas=task.betas)


def stac_of_two_rates(model: nn.Module, values: Values, task: Task, **arguments: Any) -> STAC:
    """Build STAC with the cap of its recipes; more arguments say what the trunk is."""
    return STAC(
        model,
        cap=CAP,
        trunk_lr=values["trunk_lr"],
        cap_lr=values["cap_lr"],
        trunk_weight_decay=values["decay"],
        betas=task.betas,
        **arguments,
    )


def stac_recipe(model: nn.Module, values: Values, task: Task) -> STAC:
    """Build STAC by its recipe for the kind of model, which is given one learning rate and one decay, as AdamW is."""
    return STAC(model, **getattr(recipes, task.recipe)(values["lr"], weight_decay=values["decay"]))


ALL_ADAM: Space = {"lr": ADAM_RATE, "decay": ADAM_DECAY}
ALL_SIGN: Space = {"lr": SIGN_RATE, "decay": SIGN_DECAY}

CONTESTANTS: dict[str, Contestant] = {
    ADAMW: Contestant(ALL_ADAM, of_class(torch.optim.AdamW, uses_betas=True)),
    "AdamW, two rates": Contestant(two_rates(ADAM_RATE, ADAM_RATE, ADAM_DECAY), adamw_of_two_rates),
    # At the weight of the Laplacian that its authors advise for physics-informed networks and perceptrons.
    "LAdam": Contestant(ALL_ADAM, of_class(optim.LAdam, uses_betas=True, c2=1e-5, decoupled_weight_decay=True)),
    "NAdam": Contestant(ALL_ADAM, of_class(torch.optim.NAdam, uses_betas=True, decoupled_weight_decay=True)),
    "Lion": Contestant(ALL_SIGN, of_class(optim.Lion)),
    "Signum": Contestant(ALL_SIGN, of_class(optim.Signum)),
    "SGD": Contestant({"lr": SGD_RATE, "decay": SGD_DECAY}, of_class(torch.optim.SGD, momentum=0.9)),
    "schedule-free AdamW": Contestant(ALL_ADAM, schedule_free, scheduled=False),
    "torch Muon + AdamW": Contestant(two_rates(ADAM_RATE, ADAM_RATE, ADAM_DECAY), torch_muon),
    "STAC default": Contestant({"lr": SIGN_RATE, "decay": SIGN_DECAY}, stac_default),
    "STAC cautious": Contestant(
        two_rates(SIGN_RATE, ADAM_RATE, SIGN_DECAY), partial(stac_of_two_rates, trunk_cautious=True)
    ),
    "STAC Muon": Contestant(
        two_rates(ADAM_RATE, ADAM_RATE, ADAM_DECAY), partial(stac_of_two_rates, trunk_optimizer=optim.Muon)
    ),
    "STAC recipe": Contestant(ALL_ADAM, stac_recipe),
}
