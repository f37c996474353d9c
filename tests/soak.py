"""Many steps of a tiny model on each path and state dtype, beside a float64 reference; no part of the ordinary suite.

    python -m tests.soak --steps 1000000 --processes 2

Beside each run goes the trunk's reference from the first step to the last, never corrected, with a bound of what
rounding can have made of it (:class:`Bounded`). From time to time one step is compared closely, by the twins of
``tests/stack/twins.py``: the trunk with the reference from the bits before it, the cap with ``torch.optim.AdamW``.
Counters must be exact, and memory flat: nothing may be left by a step that the next one does not free.

What is slow takes a share of the steps. ``tests/stack/test_soak.py`` runs a few thousand steps of it all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import resource
import sys
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn, optim

from stac_optimizer import STAC
from stac_optimizer.optim.signum import fused as fused_paths
from stac_optimizer.tensors import cutting
from tests import reference
from tests.optim.comparisons import as_array
from tests.stack.twins import Alone, Reference, Tally, Twin

__all__ = ["CASES", "Case", "Row", "soak"]

# Powers of two, so that neither the step nor the decay of a weight is itself rounded: 1 - LR * DECAY is exact.
LR, DECAY, MOMENTUM = 2.0**-6, 0.5, 0.9
BETAS, EPS = (0.9, 0.999), 1e-8
# Gradients come from tables which are drawn anew; a prime, for a table not to end with anything else.
TABLE, RENEWED = 61, 61 * 64
LARGEST = 4.0
# Half the distance of neighbouring float32 numbers, by their size, and all of it in bfloat16.
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-7
CHECKS = 1000


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
    Case("single bfloat16 averages", {**SINGLE, **IN_BFLOAT16}),
    Case("single int8 averages", {**SINGLE, **IN_INT8}),
    Case("foreach bfloat16 averages", {**FOREACH, **IN_BFLOAT16}, share=0.1),
    Case("fused bfloat16 averages", {**FUSED, **IN_BFLOAT16}, share=0.1),
    Case("fused int8 averages", {**FUSED, **IN_INT8}, share=0.1),
    Case("compiled bfloat16 averages", {**SINGLE, **IN_BFLOAT16}, "compiled"),
    Case("compiled int8 averages", {**SINGLE, **IN_INT8}, "compiled"),
    Case("single cautious", {**SINGLE, **CAUTIOUS}, share=0.1),
    Case("fused cautious", {**FUSED, **CAUTIOUS}, share=0.1),
    Case("compiled cautious", {**SINGLE, **CAUTIOUS}, "compiled"),
    Case("single momentum 0", {**SINGLE, **MEMORYLESS}, share=0.1),
    Case("compiled momentum 0", {**SINGLE, **MEMORYLESS}, "compiled"),
    Case("single by chance", {**SINGLE, **BY_CHANCE}, dtype=torch.bfloat16, share=0.05),
    Case("fused by chance", {**FUSED, **BY_CHANCE}, dtype=torch.bfloat16, share=0.05),
    Case("compiled by chance", {**SINGLE, **BY_CHANCE}, "compiled", torch.bfloat16),
    Case("compiled by chance momentum 0", {**SINGLE, **BY_CHANCE, **MEMORYLESS}, "compiled", torch.bfloat16),
    Case("compiled by chance int8 averages", {**SINGLE, **BY_CHANCE, **IN_INT8}, "compiled", torch.bfloat16),
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


@dataclass(frozen=True)
class Memory:
    """What a process holds."""

    tensors: int
    objects: int
    blocks: int
    resident: int

    @staticmethod
    def now() -> Memory:
        """At present."""
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(each), Tensor) for each in objects)
        count = len(objects)
        del objects
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        return Memory(tensors, count, sys.getallocatedblocks(), pages * resource.getpagesize())


# How much more a process may hold after a run than after its beginning: caches of torch and Python fill by and by.
MORE = Memory(tensors=0, objects=64, blocks=1024, resident=8 << 20)
# Bytes that Python may hold more after the last steps than before them, of what was allocated since then: what takes
# the place of older things counts too.
MORE_TRACED = 32 << 10


@dataclass(frozen=True)
class Row:
    """What came of a run."""

    case: Case
    steps: int
    microseconds: float
    tally: Tally
    doubts: int
    growth: Memory
    traced: int

    def __str__(self) -> str:
        grown = self.growth
        return (
            f"{self.case.name:34} {self.steps:9,} {self.microseconds:7.0f} {self.tally.compared:11,} "
            f"{self.tally.left_out:6,} {self.doubts:12,} {grown.tensors:4} {grown.objects:5} {grown.blocks:6} "
            f"{grown.resident >> 10:7,} {self.traced:7,}"
        )


HEADER = (
    f"{'run':34} {'steps':>9} {'us/step':>7} {'compared':>11} {'untold':>6} {'in doubt':>12} "
    "more: tensors, objects, blocks, KiB resident, bytes traced"
)


@contextlib.contextmanager
def kernels_for_small_tensors(case: Case) -> Iterator[None]:
    """Let fused=True run kernels on a tiny model: on the CPU compiled ones, else Triton's."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(cutting, "PACK_NUMEL", 0))
        if case.way == "triton":
            patches.enter_context(mock.patch.object(fused_paths, "step_compiled", fused_paths.by_triton))
        yield


class Run:
    """A model, its optimizer, and what they are compared with."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 2, bias=False), nn.Linear(2, 2)).to(case.dtype)
        self.case, self.params = case, dict(model.named_parameters())
        for param in self.params.values():
            param.grad = torch.zeros_like(param)
        self.optimizer = STAC(model, lr=LR, trunk_lr=LR, weight_decay=DECAY, **case.arguments)
        self.take: Callable[[], Any] = self.optimizer.step
        if case.way == "compiled":
            self.take = torch.compile(self.optimizer.step)
        self.gradients = Gradients(self.params)
        self.bounded = Bounded(case, self.params["0.weight"])
        self.twins = {name: self._twin(name, param) for name, param in self.params.items()}
        self.tally, self.steps = Tally(), 0

    def _twin(self, name: str, param: Tensor) -> Twin:
        arguments, by_chance = self.case.arguments, self.case.is_by_chance
        common = {"lr": LR, "weight_decay": DECAY, "maximize": False}
        if name == "0.weight":
            own = {"momentum": self.case.momentum, "cautious": bool(arguments.get("trunk_cautious"))}
            return Reference("signum", param, {**common, **own}, self.case.stored == torch.int8, by_chance)
        if by_chance or self.case.way == "compiled":  # whose cap is torch's capturable arithmetic: close, not equal
            hyper = {**common, "betas": BETAS, "eps": EPS, "amsgrad": False}
            return Reference("adamw", param, hyper, False, by_chance, self.case.way == "compiled")
        paths = {key: arguments[key] for key in ("foreach", "fused") if key in arguments}
        return Alone(optim.AdamW, param, **common, **paths)

    def step(self, *, is_compared: bool = False) -> None:
        """A step, compared with the twins or not."""
        index = self.gradients.at(self.steps)
        if is_compared:
            for name, param in self.params.items():
                self.twins[name].align(param, self.optimizer.state.get(param, {}))
                self.twins[name].step(self.gradients.tables[name][index])
        self.take()
        self.bounded.step(self.gradients.exact[index])
        self.steps += 1
        if is_compared:
            self._compare(index)

    def _compare(self, index: int) -> None:
        for name, param in self.params.items():
            state = self.optimizer.state[param]
            assert state["step"] == self.steps, f"{name}: counter {state['step']} after {self.steps} steps"
            assert param.grad is not None
            assert torch.equal(param.grad, self.gradients.tables[name][index]), f"{name}: gradient was written to"
            try:
                self.twins[name].check(param, state, self.tally)
            except AssertionError as error:
                raise AssertionError(f"step {self.steps}, {name}: {error}") from error
        trunk = self.params["0.weight"]
        self.bounded.check(trunk, self.optimizer.state[trunk])

    def steps_to(self, last: int, every: int) -> None:
        """Step on, comparing each so many steps and the last."""
        while self.steps < last:
            self.step(is_compared=self.steps % every == 0 or self.steps == last - 1)

    def traced(self, steps: int) -> int:
        """Bytes that Python holds more after some steps than after as many before them."""
        tracemalloc.start()
        held = []
        for _ in range(2):
            for _ in range(steps):
                self.step()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return held[1] - held[0]


def soak(case: Case, steps: int) -> Row:
    """Run a case for so many steps, all told.

    Raises:
        AssertionError: what differs from the reference, or has grown.
    """
    with kernels_for_small_tensors(case), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's about its own compiler
        run = Run(case)
        every, tenth = max(1, steps // CHECKS), max(2, min(steps // 10, 1000))
        run.steps_to(tenth, every=max(1, tenth // 10))
        before, begin = Memory.now(), time.perf_counter()
        run.steps_to(steps - 2 * tenth, every)
        seconds, stepped = time.perf_counter() - begin, run.steps - tenth
        now = Memory.now()
        traced = run.traced(tenth)
        grown = Memory(*(getattr(now, name) - getattr(before, name) for name in vars(now)))
        run.step(is_compared=True)
    row = Row(case, run.steps, 1e6 * seconds / stepped, run.tally, int(run.bounded.doubts), grown, traced)
    for name, most in vars(MORE).items():
        assert getattr(grown, name) <= most, f"{name} have grown by {getattr(grown, name)}: {row}"
    assert traced <= MORE_TRACED, f"{traced} bytes more are held by Python: {row}"
    return row


def reported(case_and_steps: tuple[Case, int]) -> tuple[str, bool]:
    """A line of the table, and whether all was right."""
    case, steps = case_and_steps
    torch.set_num_threads(1)
    try:
        return str(soak(case, steps)), True
    except Exception:
        return f"{case.name}: FAILED\n{traceback.format_exc()}", False


def main() -> int:
    """Run all cases, or those named, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES], help="names of runs")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    work = [(case, max(100, int(case.share * given.steps))) for case in CASES if case.name in given.only]
    print(HEADER, flush=True)
    are_right = []
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(given.processes, maxtasksperchild=1) as pool:
        for line, is_right in pool.imap_unordered(reported, work, chunksize=1):
            print(line, flush=True)
            are_right.append(is_right)
    print(f"{sum(are_right)} of {len(are_right)} runs are right, {(time.perf_counter() - begin) / 60:.1f} minutes")
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main())
