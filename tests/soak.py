"""Many steps of a tiny model on each path and state dtype, beside a float64 reference; no part of the ordinary suite.

    python -m tests.soak --steps 1000000 --processes 2

Beside each run goes the trunk's reference from the first step to the last, never corrected, with a bound of what
rounding can have made of it (``Bounded`` in ``tests/stack/soak_cases.py``). From time to time one step is compared
closely, by the twins of ``tests/stack/twins.py``: the trunk with the reference from the bits before it, the cap with
``torch.optim.AdamW``. Counters must be exact, and memory flat: nothing may be left by a step that the next one does not
free.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn, optim

from stac_optimizer import STAC
from stac_optimizer.optim.signum.fused import devices as fused_paths
from tests.stack.soak_cases import CASES, DECAY, LR, Bounded, Case, Gradients
from tests.stack.twins import Alone, Reference, Tally, Twin

__all__ = ["CASES", "Case", "Row", "soak"]

BETAS, EPS = (0.9, 0.999), 1e-8
CHECKS = 1000


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
MORE = Memory(tensors=0, objects=64, blocks=2048, resident=8 << 20)
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


def kernels_of(case: Case) -> contextlib.AbstractContextManager[Any]:
    """Let fused=True run Triton's kernels on the CPU where the case wants them."""
    if case.way == "triton":
        return mock.patch.object(fused_paths, "by_cpp", fused_paths.by_triton)
    return contextlib.nullcontext()


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
    with kernels_of(case), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's about its own compiler
        run = Run(case)
        every, tenth = max(1, steps // CHECKS), max(2, min(steps // 10, 1000))
        run.steps_to(tenth, every=max(1, tenth // 10))
        before, begin = Memory.now(), time.process_time()
        run.steps_to(steps - 2 * tenth, every)
        seconds, stepped = time.process_time() - begin, run.steps - tenth
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
