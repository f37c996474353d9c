"""What docs/coming-from-adamw.md says of a run that AdamW has begun; its code runs as all pages' does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stac_optimizer import STAC, recipes
from tests.support import assert_same_bits, set_gradients, small_model

LR, DECAY, WORDS = 6e-3, 0.01, 32
SWITCH, SOON, END = 300, 310, 600


def next_word() -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of a task on which AdamW gets below what words alone tell: the fourth word hangs on the three before."""
    table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(5))

    def batch(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + number)
        words = torch.randint(WORDS, (64, 3), generator=generator)
        first, second, third = (table[words[:, place]] for place in range(3))
        logits = 2.0 * (first + second.roll(3, 1) * third)
        return words, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]

    return batch


class Trial:
    """A model that AdamW has trained for half of its schedule."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        hidden = nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, WORDS)
        self.batch = next_word()
        self.model = nn.Sequential(nn.Embedding(WORDS, 32), nn.Flatten(), *hidden)
        self.adamw = AdamW(self.model.parameters(), lr=LR, weight_decay=DECAY)
        self.schedule = self.scheduled(self.adamw)
        self.train(self.model, self.adamw, self.schedule, range(SWITCH))

    @staticmethod
    def scheduled(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * step / END))

    def train(self, model: nn.Module, optimizer: Optimizer, schedule: LambdaLR, steps: range) -> None:
        for step in steps:
            words, target = self.batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(words), target).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        fresh = map(self.batch, range(90_000, 90_010))
        return sum(float(nn.functional.cross_entropy(model(words), target)) for words, target in fresh) / 10

    def loss_after_switch(self, kind: str) -> float:
        """Of an optimizer that goes on for some steps."""
        model = copy.deepcopy(self.model)
        if kind == "adamw":
            optimizer: Optimizer = AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
            optimizer.load_state_dict(self.adamw.state_dict())
        else:
            arguments: dict[str, Any] = recipes.finetuning(LR, weight_decay=DECAY)
            if kind == "default lr":
                arguments = {"lr": LR, "weight_decay": DECAY, "trunk_cautious": True}
            optimizer = STAC(model, **arguments)
        schedule = self.scheduled(optimizer)
        if isinstance(optimizer, STAC):
            optimizer.load_adamw_state_dict(self.adamw.state_dict(), model)
            if kind == "fresh":
                optimizer.state.clear()
            for _ in range(self.schedule.state_dict()["last_epoch"]):
                schedule.step()
        else:
            schedule.load_state_dict(self.schedule.state_dict())
        self.train(model, optimizer, schedule, range(SWITCH, SOON))
        return self.loss(model)


def test_run_of_adamw_goes_on_as_the_page_says() -> None:
    trial = Trial()
    adamw, carried, fresh, default = map(trial.loss_after_switch, ("adamw", "carried over", "fresh", "default lr"))
    assert carried < adamw + 0.01
    assert carried < fresh < default


@pytest.mark.parametrize("recipe", [recipes.finetuning, recipes.mlp, recipes.transformer])
def test_averages_of_adamw_go_to_either_trunk(recipe: Callable[..., dict[str, Any]]) -> None:
    model = small_model()
    adamw = AdamW(model.parameters())
    set_gradients(model, 0)
    adamw.step()
    optimizer = STAC(model, **recipe(LR))
    optimizer.load_adamw_state_dict(adamw.state_dict(), model)
    for param in model.parameters():
        assert_same_bits(optimizer.state[param]["exp_avg"], adamw.state[param]["exp_avg"])


@pytest.mark.parametrize("recipe", [recipes.finetuning, recipes.mlp])
def test_ratios_to_adamw_are_those_of_the_page(recipe: Callable[..., dict[str, Any]]) -> None:
    optimizer = STAC(small_model(), **recipe(LR, weight_decay=DECAY))
    groups = {group["stac_role"]: group for group in optimizer.param_groups}
    of_elements = recipe is recipes.finetuning
    assert 0.2 <= groups["trunk"]["lr"] / LR <= 0.3 if of_elements else groups["trunk"]["lr"] == LR
    assert groups["cap"]["lr"] == LR
    assert groups["trunk"]["lr"] * groups["trunk"]["weight_decay"] == pytest.approx(LR * DECAY)
