"""All runs of a comparison: tuning, then the winners on fresh seeds, over several processes, safe from being killed.

Every finished run is one line of a file. What stands there is not run again, so a killed comparison goes on, and one
of more tasks, contestants, trials or seeds adds to it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from quality.contestants import CONTESTANTS
from quality.search import Values, draw
from quality.tasks import TASKS
from quality.training import Record, Run, train

__all__ = ["FIRST_TUNING_SEED", "Plan", "Tournament", "load_records", "read_plugin", "workers"]

FIRST_TUNING_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and with how much effort.

    Attributes:
        tasks, contestants: names.
        trials: how many values each contestant tries.
        tuning_seeds: how many seeds each trial runs on.
        seeds: how many fresh seeds the winner runs on.
        steps: the most that a run takes, or None for as many as the task says.
    """

    tasks: list[str]
    contestants: list[str]
    trials: int
    tuning_seeds: int
    seeds: int
    steps: int | None

    @property
    def size(self) -> int:
        """The number of all runs."""
        return len(self.tasks) * len(self.contestants) * (self.trials * self.tuning_seeds + self.seeds)

    def runs(self, task: str, contestant: str, values: Iterable[Values], seeds: Sequence[int]) -> list[Run]:
        """Return a run for each pair of values and seed."""
        steps = min(TASKS[task].steps, self.steps or TASKS[task].steps)
        pairs = [(each, seed) for each in values for seed in seeds]
        return [Run(task=task, contestant=contestant, values=each, seed=seed, steps=steps) for each, seed in pairs]

    def tuning_runs(self, task: str, contestant: str) -> list[Run]:
        """Return the runs of all trials."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds)
        return self.runs(task, contestant, draw(CONTESTANTS[contestant].space, self.trials), seeds)

    def final_runs(self, task: str, contestant: str, winner: Values) -> list[Run]:
        """Return the winner's runs on fresh seeds."""
        return self.runs(task, contestant, [winner], range(self.seeds))


def load_records(path: Path) -> dict[str, Record]:
    """Return the runs of a file by their keys; what a kill left of a last line is cut off.

    Raises:
        ValueError: a line that is no run.
    """
    records = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = Record.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} of {path} is no run of this benchmark") from error
        records[record.run.key] = record
    return records


def read_plugin(name: str | None) -> None:
    """Import the module that adds contestants or tasks."""
    if name is not None:
        importlib.import_module(name)


def begin_worker(plugin: str | None) -> None:
    """Prepare a worker: read the plugin, and end with the process that started it, even where that is killed."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    read_plugin(plugin)


@contextmanager
def workers(jobs: int, plugin: str | None) -> Iterator[Executor | None]:
    """Start the processes that train, none where this one does."""
    if jobs == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker, initargs=(plugin,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass
class Tournament:
    """The runs of a plan.

    Attributes:
        plan: what is compared.
        path: the file of finished runs.
        pool: the processes that train, or None for this one.
        jobs: how many they are.
        records: finished runs by key.
        left_out: by task and contestant, why it could not take part.
    """

    plan: Plan
    path: Path
    pool: Executor | None
    jobs: int
    records: dict[str, Record]
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)

    def play(self, after_task: Callable[[str], object]) -> None:
        """Tune on each task, run the winners on fresh seeds, and call ``after_task`` with its name."""
        with tqdm(total=self.plan.size, desc="runs", disable=None, smoothing=0.02) as bar:
            for task in self.plan.tasks:
                names = self.plan.contestants
                self.finish([run for name in names for run in self.plan.tuning_runs(task, name)], bar)
                winners = {name: self.winner(task, name) for name in names if (task, name) not in self.left_out}
                finals = [run for name, values in winners.items() for run in self.plan.final_runs(task, name, values)]
                self.finish(finals, bar)
                after_task(task)

    def trials(self, task: str, contestant: str) -> list[tuple[Values, float]]:
        """Return the values of each trial and their mean metric over the tuning seeds."""
        runs = self.plan.tuning_runs(task, contestant)
        count = self.plan.tuning_seeds  # runs of one trial stand together
        trials = [runs[start : start + count] for start in range(0, len(runs), count)]
        return [(trial[0].values, fmean(self.records[run.key].final for run in trial)) for trial in trials]

    def winner(self, task: str, contestant: str) -> Values:
        """Return the values of least mean metric over the tuning seeds; nothing else is tuned."""
        return min(self.trials(task, contestant), key=lambda trial: trial[1])[0]

    def finish(self, runs: Sequence[Run], bar: tqdm[None]) -> None:
        """Run what is not in the records yet."""
        missing = (run for run in runs if run.key not in self.records)
        # Looked at as late as a place is free, for a contestant may be left out meanwhile.
        waiting = (run for run in missing if (run.task, run.contestant) not in self.left_out)
        bar.update(sum(run.key in self.records for run in runs))
        going: dict[Future[Record], Run] = {}
        while True:
            for run in islice(waiting, self.jobs - len(going)):
                names = [f"{each.task} {each.contestant}" for each in (*going.values(), run)]
                bar.set_postfix_str(", ".join(names))
                going[self.start(run)] = run
            if not going:
                return
            done, _ = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                self.note(going.pop(future), future)
                bar.update()

    def start(self, run: Run) -> Future[Record]:
        """Begin a run in the pool, or do it here."""
        if self.pool is not None:
            return self.pool.submit(train, run)
        future: Future[Record] = Future()
        try:
            future.set_result(train(run))
        except Exception as error:
            future.set_exception(error)
        return future

    def note(self, run: Run, future: Future[Record]) -> None:
        """Keep what a run came to."""
        error = future.exception()
        if error is not None:
            if not isinstance(error, Exception) or isinstance(error, BrokenExecutor):
                raise error
            self.left_out[run.task, run.contestant] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return
        record = future.result()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")
        self.records[run.key] = record
