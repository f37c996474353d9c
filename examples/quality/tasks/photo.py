"""Regression by an MLP on a real photograph: the colour of a pixel from its place, judged on pixels held back.

Places go in as random Fourier features (Tancik et al., https://arxiv.org/abs/2006.10739), without which an MLP sees
only the coarsest shapes.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional

from quality.task import Problem, Task

__all__ = ["PHOTO"]

BATCH_SIZE = 512
FEATURES = 64
FREQUENCY = 6.0  # standard deviation, in waves across the picture


@functools.cache
def load_photo() -> tuple[Tensor, Tensor]:
    """Return the places of a quarter of the pixels of scikit-learn's flower, in [0, 1], and their colours."""
    colours = torch.tensor(load_sample_image("flower.jpg"))[::2, ::2].float() / 255
    height, width = colours.shape[:2]
    places = torch.cartesian_prod(torch.linspace(0, 1, height), torch.linspace(0, 1, width))
    shuffled = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    return places[shuffled], colours.flatten(0, 1)[shuffled]


def begin(seed: int) -> Problem:
    """Return an MLP with the first weights of the seed."""
    places, colours = load_photo()
    waves = FREQUENCY * torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(0))
    angles = 2 * math.pi * places @ waves
    inputs = torch.cat([angles.sin(), angles.cos()], dim=1)
    held_back = len(places) // 10
    torch.manual_seed(seed)
    sides = [2 * FEATURES, 128, 128]
    layers: list[nn.Module] = []
    for incoming, outgoing in itertools.pairwise(sides):
        layers += [nn.Linear(incoming, outgoing), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sides[-1], 3))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(held_back, len(inputs), (BATCH_SIZE,), generator=generator)
        return functional.mse_loss(model(inputs[chosen]), colours[chosen])

    def validate() -> float:
        return functional.mse_loss(model(inputs[:held_back]), colours[:held_back]).item()

    return Problem(model=model, loss=loss, validate=validate)


PHOTO = Task(
    name="photo",
    kind="MLP regression of a photograph",
    metric="MSE of held-back pixels, of 1",
    steps=1000,
    recipe="mlp",
    begin=begin,
)
