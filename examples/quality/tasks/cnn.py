"""A convolutional network with batch normalization on MNIST's digits."""

from __future__ import annotations

import torch
from torch import nn

from quality.task import Problem, Task
from quality.tasks.mnist import begin_images

__all__ = ["CNN"]


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    """Return convolution, normalization and activation, and halve the sides."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def begin(seed: int) -> Problem:
    """Return a CNN with the first weights of the seed."""
    torch.manual_seed(seed)
    layers = [*convolution(1, 8), *convolution(8, 16), *convolution(16, 32)]
    return begin_images(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 3 * 3, 10)))


CNN = Task(
    name="cnn",
    kind="CNN with batch normalization, 3 convolutions",
    metric="validation loss on 1,000 MNIST digits",
    steps=400,
    recipe="vision",
    begin=begin,
)
