"""Train a small classifier on scikit-learn's digits with STAC, through one interruption.

Half of the training is done by one model and optimizer, which go into a checkpoint; a fresh pair resumes from it and
finishes. Run from the repository root: ``python examples/digits.py``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from checkpoint_file import load_checkpoint, save_checkpoint
from command_line import Parser, at_least_two, output_file, positive, seed
from stac_optimizer import STAC

BATCH_SIZE = 64


@dataclass(frozen=True)
class DigitsData:
    """Images as rows of 64 numbers between -1 and 1, and the digit each one shows."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor


@dataclass(frozen=True)
class DigitsResult:
    """What a run came to: the share of test images named correctly, and the steps before and after the interruption."""

    accuracy: float
    steps_before: int
    steps_after: int


def load_data() -> DigitsData:
    """Return the 1,797 digits, a quarter of each kind held back for the test; the same split always."""
    images, digits = load_digits(return_X_y=True)
    # Pixels count from 0 to 16.
    images = images / 8 - 1
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, digits, test_size=0.25, stratify=digits, random_state=0
    )
    return DigitsData(
        torch.tensor(train_images, dtype=torch.float32),
        torch.tensor(train_digits),
        torch.tensor(test_images, dtype=torch.float32),
        torch.tensor(test_digits),
    )


class Training:
    """A model, its optimizer and its schedule, together as one thing that can be saved and loaded."""

    def __init__(self, *, epochs: int, steps_per_epoch: int, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        self.optimizer = STAC(self.model, lr=lr, last_n_layers=1, weight_decay=1e-2)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=epochs * steps_per_epoch)
        self.seed = seed
        self.epoch = 0

    def run_epoch(self, data: DigitsData) -> int:
        """Visit every training image once; return the number of steps it took."""
        # The order follows from seed and epoch alone, so a resumed run sees the batches the first would have seen.
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        batches = torch.randperm(len(data.train_images), generator=generator).split(BATCH_SIZE)
        for batch in batches:
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(data.train_images[batch]), data.train_digits[batch]).backward()
            self.optimizer.step()
            self.scheduler.step()
        self.epoch += 1
        return len(batches)

    def save(self, path: Path) -> None:
        """Write everything that the rest of the training depends on."""
        checkpoint = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        save_checkpoint(checkpoint, path)

    def load(self, path: Path) -> None:
        """Take up the training where the one that wrote ``path`` stopped."""
        checkpoint = load_checkpoint(path, ("epoch", "model", "optimizer", "scheduler"))
        self.epoch = checkpoint["epoch"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])

    @torch.no_grad()
    def accuracy(self, data: DigitsData) -> float:
        """Return the share of test images whose digit the model names."""
        right = self.model(data.test_images).argmax(dim=1).eq(data.test_digits).sum().item()
        return int(right) / len(data.test_digits)


def train_with_interruption(data: DigitsData, checkpoint: Path, *, epochs: int, lr: float, seed: int) -> DigitsResult:
    """Train half of the epochs, save to ``checkpoint``, and finish with a fresh model and optimizer that load it."""
    steps_per_epoch = math.ceil(len(data.train_images) / BATCH_SIZE)
    first = Training(epochs=epochs, steps_per_epoch=steps_per_epoch, lr=lr, seed=seed)
    print(first.optimizer.partition)
    steps_before = sum(first.run_epoch(data) for _ in range(epochs // 2))
    first.save(checkpoint)
    print(f"interrupted after {steps_before} steps, test accuracy {first.accuracy(data):.2%}")

    resumed = Training(epochs=epochs, steps_per_epoch=steps_per_epoch, lr=lr, seed=seed)
    resumed.load(checkpoint)
    steps_after = sum(resumed.run_epoch(data) for _ in range(resumed.epoch, epochs))
    accuracy = resumed.accuracy(data)
    print(f"resumed and finished {steps_after} steps later, test accuracy {accuracy:.2%}")
    return DigitsResult(accuracy, steps_before, steps_after)


def main(argv: Sequence[str] | None = None) -> DigitsResult:
    """Train, print the partition and both accuracies, and return what the run came to."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--epochs",
        type=at_least_two,
        default=20,
        help="passes over the training images, the interruption between two of them (default: %(default)s)",
    )
    parser.add_argument("--lr", type=positive, default=3e-3, help="STAC's shared learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batch order (default: %(default)s)")
    parser.add_argument("--out", type=output_file, help="where to leave the checkpoint (default: a temporary file)")
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.out or Path(folder) / "digits.pt"
        return train_with_interruption(load_data(), checkpoint, epochs=options.epochs, lr=options.lr, seed=options.seed)


if __name__ == "__main__":
    main()
