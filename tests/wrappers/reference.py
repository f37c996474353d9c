"""Float64 references of the wrappers, in NumPy, written from the papers and from what holocron computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Lookahead", "Mechanic", "Scout"]

Array = npt.NDArray[np.float64]


class Mechanic:
    """Algorithm 1 of arXiv 2306.00144 with the clipping of h and the epsilon in m of the authors' code."""

    def __init__(self, x: Array, betas: Sequence[float], s_decay: float, s_init: float) -> None:
        self.x_ref, self.delta = x.copy(), np.zeros_like(x)
        self.beta, self.decay, self.s_init = np.array(betas), s_decay, s_init
        n = len(betas)
        self.v, self.r, self.m, self.s = np.zeros(n), np.zeros(n), np.zeros(n), np.full(n, s_init)

    def step(self, x: Array, g: Array, u: Array) -> Array:
        """The next weights, of weights, their gradient, and the base's update there."""
        eps = 1e-8
        direction = g + self.decay * self.s.sum() * np.linalg.norm(g) / (np.linalg.norm(x) + eps) * x
        h = -np.dot(self.delta, direction)
        clipped = np.clip(h, -self.m, self.m)
        self.m = np.maximum(self.beta * self.m, abs(h) + eps)
        self.v = self.beta**2 * self.v + h**2
        self.r = self.beta * self.r + clipped * self.s
        wealth = self.s_init / len(self.beta) * self.m + np.maximum(self.r, 0)
        self.s = wealth / (np.sqrt(self.v) + eps)
        self.delta = self.delta + u
        moved: Array = self.x_ref + self.s.sum() * self.delta
        return moved


class Lookahead:
    """Algorithm 1 of arXiv 1907.08610."""

    def __init__(self, x: Array, alpha: float, k: int) -> None:
        self.phi, self.alpha, self.k, self.t = x.copy(), alpha, k, 0

    def step(self, theta: Array) -> Array:
        """The next weights, of those that the base has reached."""
        self.t += 1
        if self.t % self.k:
            return theta
        phi: Array = self.phi + self.alpha * (theta - self.phi)
        self.phi = phi
        return phi


class Scout:
    """What holocron's Scout computes, for one parameter or several; without what has no value there."""

    def __init__(self, parts: Sequence[Array], rate: float, k: int) -> None:
        self.phi = [part.copy() for part in parts]
        self.held = [[part.copy()] for part in parts]
        self.rate, self.k = rate, k
        self.rates: list[float] = []

    def step(self, parts: Sequence[Array]) -> list[Array]:
        """The next weights of each parameter, of those that the base has reached."""
        for held, part in zip(self.held, parts, strict=True):
            held.append(part.copy())
        if len(self.held[0]) <= self.k:
            return list(parts)
        means = [mean for mean in map(self._similarity, self.held) if mean is not None]
        rate = max(1 - float(np.mean(means)), self.rate) if means else self.rate
        self.rates.append(rate)
        self.phi = [phi + rate * (part - phi) for phi, part in zip(self.phi, parts, strict=True)]
        self.held = [[phi.copy()] for phi in self.phi]
        return self.phi

    @staticmethod
    def _similarity(held: Sequence[Array]) -> float | None:
        updates = np.diff(np.stack(held), axis=0)
        if len(updates) == 1:
            return None
        furthest = np.abs(updates - updates.mean(0)).max(0)
        eps = np.finfo(np.float64).eps
        told = updates.max(0) - updates.min(0) > 4 * eps * np.maximum(np.abs(held[0]), np.abs(held[-1]))
        return float((updates.std(0, ddof=1)[told] / furthest[told]).mean()) if told.any() else None
