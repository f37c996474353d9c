"""What may be tuned, and which values are tried: as many for each contestant, over ranges of one width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["DECADES", "Choice", "Rate", "Space", "Values", "draw"]

DECADES = 1.5
Values = dict[str, float]


@dataclass(frozen=True)
class Rate:
    """A learning rate, even in its logarithm from ``low`` on; all ranges are ``DECADES`` wide.

    Attributes:
        low: the least.
    """

    low: float

    @property
    def high(self) -> float:
        """The most."""
        return self.low * 10**DECADES

    def at(self, place: float) -> float:
        """Return the value at a place from 0 to 1, in three digits, as tables show it."""
        return float(f"{self.low * 10 ** (DECADES * place):.3g}")


@dataclass(frozen=True)
class Choice:
    """A few values, each as likely.

    Attributes:
        options: the values.
    """

    options: tuple[float, ...]

    def at(self, place: float) -> float:
        """Return the value at a place from 0 to 1."""
        return self.options[min(int(place * len(self.options)), len(self.options) - 1)]


Space = Mapping[str, Rate | Choice]


def draw(space: Space, trials: int) -> list[Values]:
    """Return the values of each trial: a scrambled Sobol sequence, always the same; more trials only add to fewer.

    Spaces of the same number of tunables are tried at the same places.
    """
    engine = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0)
    places = engine.draw(trials, dtype=torch.float64).tolist()
    return [{name: space[name].at(x) for name, x in zip(space, place, strict=True)} for place in places]
