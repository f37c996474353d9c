"""What ``tests/soak.py`` runs, its gradients, and the trunk's reference beside a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import reference
from tests.optim.comparisons import as_array

__all__ = ["CASES", "DECAY", "LR", "Bounded", "Case", "Gradients"]

# Powers of two, so that neither the step nor the decay of a weight is itself rounded: 1 - LR * DECAY is exact.
LR, DECAY, MOMENTUM = 2.0**-6, 0.5, 0.9
# Gradients come from tables which are drawn anew; a prime, for a table not to end with anything else.
TABLE, RENEWED = 61, 61 * 64
LARGEST = 4.0
# Half the distance of neighbouring float32 numbers, by their size, and all of it in bfloat16.
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-7


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        name: what the table calls it.
        arguments: of STAC.
        way: "eager", "compiled" (the step by torch.compile) or "triton" (its kernels, interpreted).
        dtype: of the weights.
        share: of the steps.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    way: str = "eager"
    dtype: torch.dtype = torch.float32
    share: float = 1.0

    @property
    def momentum(self) -> float:
        """The trunk's."""
        momentum: float = self.arguments.get("trunk_momentum", MOMENTUM)
        return momentum

    @property
    def stored(self) -> torch.dtype:
        """What averages are held in."""
        dtype: torch.dtype = self.arguments.get("trunk_state_dtype", self.dtype)
        return dtype

    @property
    def is_by_chance(self) -> bool:
        """Whether weights are rounded by chance."""
        return bool(self.arguments.get("stochastic_rounding"))


SINGLE, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
IN_BFLOAT16, IN_INT8 = {"trunk_state_dtype": torch.bfloat16}, {"trunk_state_dtype": torch.int8}
CAUTIOUS, MEMORYLESS, BY_CHANCE = {"trunk_cautious": True}, {"trunk_momentum": 0.0}, {"stochastic_rounding": True}
CASES = (
    Case("single", SINGLE),
    Case("foreach", FOREACH),
    Case("fused", FUSED),
    Case("compiled", SINGLE, "compiled"),
    Case("single bfloat16 averages", {**SINGLE, **IN_BFLOAT16}, share=0.1),
    Case("single int8 averages", {**SINGLE, **IN_INT8}, share=0.1),
    Case("foreach bfloat16 averages", {**FOREACH, **IN_BFLOAT16}, share=0.05),
    Case("fused bfloat16 averages", {**FUSED, **IN_BFLOAT16}, share=0.05),
    Case("fused int8 averages", {**FUSED, **IN_INT8}, share=0.05),
    Case("compiled bfloat16 averages", {**SINGLE, **IN_BFLOAT16}, "compiled"),
    Case("compiled int8 averages", {**SINGLE, **IN_INT8}, "compiled"),
    Case("single cautious", {**SINGLE, **CAUTIOUS}, share=0.05),
    Case("fused cautious", {**FUSED, **CAUTIOUS}, share=0.05),
    Case("compiled cautious", {**SINGLE, **CAUTIOUS}, "compiled"),
    Case("single momentum 0", {**SINGLE, **MEMORYLESS}, share=0.05),
    Case("compiled momentum 0", {**SINGLE, **MEMORYLESS}, "compiled"),
    Case("single by chance", {**SINGLE, **BY_CHANCE}, dtype=torch.bfloat16, share=0.05),
    Case("fused by chance", {**FUSED, **BY_CHANCE}, dtype=torch.bfloat16, share=0.05),
    Case("compiled by chance", {**SINGLE, **BY_CHANCE}, "compiled", torch.bfloat16),
    Case("compiled by chance momentum 0", {**SINGLE, **BY_CHANCE, **MEMORYLESS}, "compiled", torch.bfloat16, 0.2),
    Case("compiled by chance int8 averages", {**SINGLE, **BY_CHANCE, **IN_INT8}, "compiled", torch.bfloat16, 0.2),
    Case("triton", FUSED, "triton", share=0.002),
    Case("triton int8 averages", {**FUSED, **IN_INT8}, "triton", share=0.002),
    Case("triton cautious momentum 0", {**FUSED, **CAUTIOUS, **MEMORYLESS}, "triton", share=0.002),
)


class Gradients:
    """Tables of gradients, the same for the same step, drawn anew in the same memory."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._params = params
        self.tables = {name: [torch.zeros_like(param) for _ in range(TABLE)] for name, param in params.items()}
        self.exact = [as_array(grad) for grad in self.tables["0.weight"]]
        self._number = -1

    def at(self, step: int) -> int:
        """Put the gradients of a step into parameters; where they stand in the tables."""
        number, index = step // RENEWED, step % TABLE
        if number != self._number:
            self._renew(number)
        for name, param in self._params.items():
            assert param.grad is not None
            param.grad.copy_(self.tables[name][index])
        return index

    def _renew(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self._number = number
        for name, param in self._params.items():
            lean = torch.randn(param.shape, generator=generator)  # so that averages differ from noise, and turn
            for grad in self.tables[name]:
                drawn = torch.randn(param.shape, generator=generator) + lean / 2
                grad.copy_(drawn.clamp_(-LARGEST, LARGEST))
        for exact, grad in zip(self.exact, self.tables["0.weight"], strict=True):
            exact[...] = as_array(grad)


class Bounded:
    """The trunk's reference beside a whole run, with what rounding can have made of the run at most.

    For an average, e <- mu e + s (|m| + e) + 6 (1 - mu) u G, where u = 2^-24 is half the distance of float32 numbers, G
    the largest gradient, and s what storing it costs: u, in bfloat16 the distance of neighbours, in 8 bits that of
    codes. Before it is stored, which is where the sign is taken, the second term is u. A sign is in doubt where |m| is
    no larger. For a weight, w <- (1 - lr wd) w + 3 r (|p| + lr) + 2 lr [in doubt], r being u or bfloat16's distance.
    Under a mask all of a tensor is in doubt where any of it is, and a step may be as long as 1 / 1e-3.
    """

    def __init__(self, case: Case, weights: Tensor) -> None:
        self.case = case
        self.p = as_array(weights)
        self.m, self.e, self.w = np.zeros_like(self.p), np.zeros_like(self.p), np.zeros_like(self.p)
        self.doubts = 0
        self._is_cautious = bool(case.arguments.get("trunk_cautious"))

    def step(self, g: reference.Array) -> None:
        """One step."""
        mu, m, e = self.case.momentum, self.m, self.e
        if mu:
            m += (1 - mu) * (g - m)
            size = np.abs(m)
            e *= mu
            e += FLOAT32 * (6 * (1 - mu) * LARGEST + size)
            doubts = size <= e
            self._store(size)
        else:
            m[...] = g
            doubts = np.zeros(m.shape, dtype=bool)
        direction, longest = np.sign(m), 1.0
        if self._is_cautious:
            mask = direction * g > 0
            share = max(mask.mean(), 1e-3)
            direction *= mask / share
            doubts |= doubts.any()
            longest = 2 / share
        self.doubts += np.count_nonzero(doubts)
        self.p *= 1 - LR * DECAY
        self.p -= LR * direction
        self.w *= 1 - LR * DECAY
        rounding = FLOAT32 if self.case.dtype == torch.float32 else BFLOAT16
        self.w += 3 * rounding * (np.abs(self.p) + LR * longest)
        self.w += 2 * LR * longest * doubts

    def _store(self, size: reference.Array) -> None:
        if self.case.stored == torch.bfloat16:
            self.e += BFLOAT16 * (size + self.e)
        elif self.case.stored == torch.int8:
            most = size + self.e
            largest = most.max(axis=1, keepdims=True)
            self.e += 2 * np.sqrt(most * largest) / 127 + largest / 127**2

    def check(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Assert that a run is within the bounds."""
        if self.case.momentum:
            held = as_array(state["exp_avg"])
            if "exp_avg_scale" in state:
                held = reference.decoded(held, as_array(state["exp_avg_scale"]))
            off = np.abs(held - self.m)
            assert (off <= self.e).all(), f"averages are off by {(off / self.e).max()} of what rounding can do"
        off = as_array(param) - self.p
        assert (np.abs(off) <= self.w).all(), (
            f"weights are off by {(np.abs(off) / self.w).max()} of what rounding can do"
        )
        if self.case.is_by_chance and not self.case.momentum:
            # Errors of weights, which are below 2 and so at most 2^-7 apart, are independent, and have a mean of 0: the
            # variance of one is at most that of fair coins for each step, of which 1 - lr wd is left by the next.
            deviation = BFLOAT16 / 2 / np.sqrt((1 - (1 - LR * DECAY) ** 2) * off.size)
            assert abs(off.mean()) < 6 * deviation, f"weights drift by {off.mean()}, of a deviation of {deviation}"
