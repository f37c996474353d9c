"""Repeat the table that stac-optimizer 0.1.2 published: a small regression, every contestant on every path.

Each mean is that of the last step's loss, as the step itself computed it before it moved the weights.

A last-bit difference in a matrix product may turn a sign, and so moves a weight by twice the learning rate. Processors
differ in last bits, so STAC's means differ by processor: ``ATEN_CPU_CAPABILITY=default`` before the command shows it.
Hence each contestant has a band in which its mean must lie; what is to be equal to the bit is tested on gradients that
are the same everywhere.

Run from the repository root: ``python examples/toy_benchmark.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn
from torch.nn import functional

from command_line import Parser, at_least_one, usable_device
from stac_optimizer import STAC

PUBLISHED_SEEDS = 5
PUBLISHED_STEPS = 200


class PathArguments(TypedDict, total=False):
    """The arguments that choose how an optimizer runs, not what it computes."""

    foreach: bool
    fused: bool


PATHS: dict[str, PathArguments] = {
    "default": {},
    "foreach=False": {"foreach": False},
    "foreach=True": {"foreach": True},
    "fused=True": {"fused": True},
}

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """An optimizer of the published table.

    Attributes:
        name: of the optimizer.
        make: how to make it for a model and a path.
        published: its published mean.
        band: how far from that a processor's last bits may take the mean.
    """

    name: str
    make: Callable[[nn.Module, PathArguments], torch.optim.Optimizer]
    published: float
    band: float


@dataclass(frozen=True)
class Row:
    """One measured mean; ``is_comparable`` where seeds and steps are the published ones."""

    contestant: Contestant
    path: str
    mean: float
    is_comparable: bool

    @property
    def difference(self) -> float:
        """The mean less the published one."""
        return self.mean - self.contestant.published

    def __str__(self) -> str:
        measured = f"{self.contestant.name:<24}{self.path:<15}{self.mean:>10.6f}"
        if not self.is_comparable:
            return f"{measured}{'-':>11}{'-':>12}{'-':>10}"
        where = "in band" if abs(self.difference) <= self.contestant.band else "OUTSIDE"
        return f"{measured}{self.contestant.published:>11.6f}{self.difference:>+12.1e}{where:>10}"


CONTESTANTS = (
    Contestant(
        "STAC",
        lambda model, path: STAC(model, lr=3e-3, weight_decay=1e-2, last_n_layers=1, **path),
        published=0.033961,
        band=6e-3,
    ),
    Contestant(
        "STAC, trunk_momentum=0",
        lambda model, path: STAC(model, lr=3e-3, weight_decay=1e-2, last_n_layers=1, trunk_momentum=0, **path),
        published=0.107899,
        band=2e-3,
    ),
    Contestant(
        "AdamW",
        lambda model, path: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2, **path),
        published=0.074642,
        band=2e-5,
    ),
)


def make_model() -> nn.Module:
    """Return the model with its first weights, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def final_loss(make_optimizer: MakeOptimizer, *, seed: int, steps: int, device: torch.device | str) -> float:
    """Train on the data of ``seed``; return the loss that the last step computed before it moved the weights."""
    # All chance is drawn on the CPU, so that every device trains the same weights on the same data.
    torch.manual_seed(seed)
    inputs = torch.randn(256, 16)
    matrix = torch.randn(16, 4)
    targets = inputs @ matrix + 0.1 * torch.randn(256, 4)
    inputs, targets = inputs.to(device), targets.to(device)
    model = make_model().to(device)
    optimizer = make_optimizer(model)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()


def mean_final_loss(
    make_optimizer: MakeOptimizer,
    *,
    seeds: Iterable[int] = range(PUBLISHED_SEEDS),
    steps: int = PUBLISHED_STEPS,
    device: torch.device | str = "cpu",
) -> float:
    """Return the mean of ``final_loss`` over ``seeds``; the defaults are the published benchmark.

    Example:
        >>> mean = mean_final_loss(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2))
        >>> print(f"{mean:.6f}")
        0.074642
    """
    losses = [final_loss(make_optimizer, seed=seed, steps=steps, device=device) for seed in seeds]
    return sum(losses) / len(losses)


def measure(contestant: Contestant, path: str, *, seeds: int, steps: int, device: str) -> Row:
    """Run one contestant on one path, named as in ``PATHS``."""
    mean = mean_final_loss(
        lambda model: contestant.make(model, PATHS[path]), seeds=range(seeds), steps=steps, device=device
    )
    return Row(contestant, path, mean, (seeds, steps) == (PUBLISHED_SEEDS, PUBLISHED_STEPS))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table row by row as it is measured, and return it."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help="where to train, for example cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=at_least_one,
        default=PUBLISHED_SEEDS,
        help="how many seeds, counted from 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=PUBLISHED_STEPS, help="training steps per seed (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    rows = []
    print(f"{'contestant':<24}{'path':<15}{'mean loss':>10}{'published':>11}{'difference':>12}")
    for contestant in CONTESTANTS:
        for path in PATHS:
            row = measure(contestant, path, seeds=options.seeds, steps=options.steps, device=options.device)
            rows.append(row)
            print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
