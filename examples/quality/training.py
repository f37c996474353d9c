"""One training run, the same for every contestant: weights, batches, clipping, schedule, and what is recorded."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from char_lm_setup import Settings, make_schedule
from quality.contestants import CONTESTANTS, WARMUP_SHARE
from quality.search import Values
from quality.task import Problem
from quality.tasks import TASKS
from stac_optimizer import STAC

__all__ = ["Record", "Run", "train"]

CLIP = 1.0
# A run whose training loss grows to so many times its first has diverged.
DIVERGED = 100.0
# Batches that renew the averages of batch normalization where validation judges other weights than training steps on.
RENEWING = 40
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run. Two runs are the same where these are.

    Attributes:
        task, contestant: names.
        values: of the contestant's space.
        seed: of weights and batches.
        steps: length of the run.
    """

    task: str
    contestant: str
    values: Values
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """What tells runs apart."""
        return repr((self.task, self.contestant, sorted(self.values.items()), self.seed, self.steps))


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run came to.

    Attributes:
        run: what was run.
        curve: the metric by the number of steps done.
        final: the metric at the end; infinite where the run failed.
        failed: whether a loss or the metric became no number, infinite or absurd; the run then ended early.
        step_ms: median time of the optimizer's step.
        iteration_ms: median time of forward, backward, clipping and step.
        state_bytes: size of the optimizer's state.
        seconds: that the whole run took.
    """

    run: Run
    curve: dict[int, float]
    final: float
    failed: bool
    step_ms: float
    iteration_ms: float
    state_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it, which knows no infinity."""
        kept = {step: value for step, value in self.curve.items() if math.isfinite(value)}
        return {**dataclasses.asdict(self), "curve": kept, "final": None if self.failed else self.final}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Record:
        """Return what ``to_json`` was made of."""
        curve = {int(step): value for step, value in entry["curve"].items()}
        final = math.inf if entry["final"] is None else entry["final"]
        return cls(**{**entry, "run": Run(**entry["run"]), "curve": curve, "final": final})


@contextmanager
def judged(problem: Problem, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Put model and optimizers into the state in which the model is judged, and back.

    Schedule-free optimizers judge an average of the weights, and statistics of batch normalization belong to the
    weights that were trained on; so, as their authors ask, some batches renew them first.
    """
    averaging = [optimizer for optimizer in optimizers if hasattr(optimizer, "eval")]
    for optimizer in averaging:
        optimizer.eval()
    with torch.no_grad():
        if averaging and any(isinstance(module, BATCH_NORMS) for module in problem.model.modules()):
            generator = torch.Generator().manual_seed(0)
            for _ in range(RENEWING):
                problem.loss(generator)
        problem.model.eval()
        yield
    problem.model.train()
    for optimizer in averaging:
        optimizer.train()  # type: ignore[attr-defined]


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Return the size of all tensors in the optimizers' state."""
    total = 0
    for optimizer in optimizers:
        if isinstance(optimizer, STAC):
            total += optimizer.state_bytes()
        else:
            tensors = (value for entry in optimizer.state.values() for value in entry.values())
            total += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return total


class Training:
    """A model on its way: what steps it, and what has been measured of it."""

    def __init__(self, run: Run) -> None:
        task = dataclasses.replace(TASKS[run.task], steps=run.steps)
        contestant = CONTESTANTS[run.contestant]
        self.problem = task.begin(run.seed)
        built = contestant.build(self.problem.model, run.values, task)
        self.optimizers = [built] if isinstance(built, Optimizer) else list(built)
        settings = Settings(steps=task.steps, warmup=round(WARMUP_SHARE * task.steps))
        self.schedules = [make_schedule(each, settings) for each in self.optimizers if contestant.scheduled]
        self.generator = torch.Generator().manual_seed(run.seed)
        self.step_seconds: list[float] = []
        self.iteration_seconds: list[float] = []
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()

    def step(self) -> float:
        """Learn from one batch; return its loss."""
        begin = time.perf_counter()
        self.problem.model.zero_grad()
        loss = self.problem.loss(self.generator)
        loss.backward()
        clip_grad_norm_(self.problem.model.parameters(), CLIP)
        before_step = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        for schedule in self.schedules:
            schedule.step()
        self.step_seconds.append(end - before_step)
        self.iteration_seconds.append(end - begin)
        return loss.item()

    def validate(self) -> float:
        """Return the metric."""
        with judged(self.problem, self.optimizers):
            return self.problem.validate()


def train(run: Run) -> Record:
    """Train one model from its first weights, and return the record."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    task = dataclasses.replace(TASKS[run.task], steps=run.steps)
    training = Training(run)
    curve = {0: training.validate()}
    bound = math.inf
    for step in range(1, run.steps + 1):
        loss = training.step()
        bound = DIVERGED * loss if step == 1 else bound
        if not loss <= bound:
            break
        if task.validates_at(step):
            curve[step] = training.validate()
            if not math.isfinite(curve[step]):
                break

    final = curve.get(run.steps, math.inf)
    failed = not math.isfinite(final)
    return Record(
        run=run,
        curve=curve,
        final=math.inf if failed else final,
        failed=failed,
        step_ms=1e3 * statistics.median(training.step_seconds),
        iteration_ms=1e3 * statistics.median(training.iteration_seconds),
        state_bytes=state_bytes(training.optimizers),
        seconds=time.perf_counter() - begin,
    )
