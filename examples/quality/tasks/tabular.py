"""Regression by an MLP on a real table: how far 392 cars go on a gallon, which mlxtend ships.

The table is small: a third of it, the same for every run, is what all are judged on, so what a run reaches says as much
about how well it avoids overfitting as about how fast it learns.
"""

from __future__ import annotations

import functools
import itertools

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from quality.task import Problem, Task

__all__ = ["TABULAR"]

BATCH_SIZE = 32


@functools.cache
def load_cars() -> list[Tensor]:
    """Return features to learn from and to validate on, and targets likewise, in units of the first's spread.

    Raises:
        ModuleNotFoundError: mlxtend, of the extra ``bench``, is missing.
    """
    from mlxtend.data import autompg_data  # noqa: PLC0415 - an extra, which other tasks do without

    features, miles = autompg_data()
    features = features[:, :7]  # the last column, the name, is empty
    parts = [torch.tensor(part, dtype=torch.float32) for part in (features, miles[:, None])]
    split = train_test_split(*parts, test_size=1 / 3, random_state=0)
    result = []
    for train, validation in zip(split[::2], split[1::2], strict=True):
        result += [(part - train.mean(dim=0)) / train.std(dim=0) for part in (train, validation)]
    return result


def begin(seed: int) -> Problem:
    """Return an MLP with the first weights of the seed."""
    train, validation, targets, validation_targets = load_cars()
    torch.manual_seed(seed)
    sides = [train.shape[1], 64, 64, 64]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sides):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(sides[-1], 1))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(train), (BATCH_SIZE,), generator=generator)
        return functional.mse_loss(model(train[chosen]), targets[chosen])

    def validate() -> float:
        return functional.mse_loss(model(validation), validation_targets).item()

    return Problem(model=model, loss=loss, validate=validate)


TABULAR = Task(
    name="tabular",
    kind="MLP regression on 392 cars",
    metric="validation MSE, share of the variance",
    steps=600,
    recipe="mlp",
    begin=begin,
)
