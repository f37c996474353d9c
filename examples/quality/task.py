"""What a task of the comparison is: a model, what it learns from, and what it is judged on. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Problem", "Task"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task with the first weights of one seed.

    Attributes:
        model: with its first weights.
        loss: the training loss of a step, on a batch drawn from the generator.
        validate: what the model is judged on, smaller is better; called without gradients and in evaluation mode.
    """

    model: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    validate: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train, for how long, and how it is judged.

    Attributes:
        name: as on the command line.
        kind: of model, in words.
        metric: what ``validate`` returns, in words.
        steps: length of a run.
        recipe: the name of STAC's recipe for the kind of model.
        begin: from a seed to the problem; the same seed, the same first weights.
        betas: averaging factors of Adam's kind, the field's custom for the kind of model.
        points: how many times a run is validated, the first weights apart.
    """

    name: str
    kind: str
    metric: str
    steps: int
    recipe: str
    begin: Callable[[int], Problem]
    betas: tuple[float, float] = (0.9, 0.999)
    points: int = 20

    def validates_at(self, step: int) -> bool:
        """Whether to validate once so many steps are done: evenly over the run, the last step included."""
        return step * self.points // self.steps > (step - 1) * self.points // self.steps
