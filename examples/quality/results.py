"""What the runs say: for each task and contestant the winner's figures on fresh seeds, and who beats whom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from quality.contestants import ADAMW
from quality.search import Values
from quality.tournament import Tournament
from quality.training import Record

__all__ = ["LEVEL", "Result", "difference", "results_of", "share_to_reach", "verdict"]

# Standard errors of a difference within which two contestants are level.
LEVEL = 2.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contestant on one task. What cannot be said, such as the spread of a single seed, is no number (NaN).

    Attributes:
        task, contestant: names.
        values: those that won the tuning.
        seeds: how many fresh seeds there are.
        failed: how many of those runs failed.
        mean, error: of the final metric over the seeds, and the standard error of that mean.
        to_adamw: the difference to AdamW's mean, in standard errors of the difference; below 0 is better.
        steps_to_adamw: the share of all steps after which its mean curve is at AdamW's final mean; infinite if never.
        step_ms, iteration_ms: medians over the seeds of a run's medians.
        state_bytes: size of the optimizer's state.
        state_share: of AdamW's.
        curve: by steps done, mean and standard error of the metric.
        trials: what each trial's values came to, the mean over the tuning seeds.
    """

    task: str
    contestant: str
    values: Values
    seeds: int
    failed: int
    mean: float
    error: float
    to_adamw: float
    steps_to_adamw: float
    step_ms: float
    iteration_ms: float
    state_bytes: int
    state_share: float
    curve: dict[int, tuple[float, float]]
    trials: list[tuple[Values, float]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which one value does not tell."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def difference(mean: float, error: float, other_mean: float, other_error: float) -> float:
    """Return how far a mean is above another, in standard errors of the difference."""
    if mean == other_mean:
        return 0.0
    if math.isinf(mean) or math.isinf(other_mean):
        return mean - other_mean
    spread = math.hypot(error, other_error)
    return (mean - other_mean) / spread if spread else math.copysign(math.inf, mean - other_mean)


def verdict(apart: float) -> str:
    """Return "won", "level" or "lost" for a difference in standard errors."""
    if math.isnan(apart) or abs(apart) <= LEVEL:
        return "level"
    return "won" if apart < 0 else "lost"


def share_to_reach(curve: dict[int, tuple[float, float]], goal: float) -> float:
    """Return the share of all steps after which a mean curve is at or below a goal, straight between its points."""
    points = [(step, mean) for step, (mean, _) in sorted(curve.items())]
    total = points[-1][0]
    for index, (step, mean) in enumerate(points):
        if mean <= goal:
            if index == 0:
                return step / total
            before, above = points[index - 1]
            return (before + (step - before) * (above - goal) / (above - mean)) / total
    return math.inf


def mean_curve(records: Sequence[Record]) -> dict[int, tuple[float, float]]:
    """Return mean and standard error by step, for the steps that all runs have reached."""
    steps = [step for step in records[0].curve if all(step in record.curve for record in records)]
    return {step: mean_and_error([record.curve[step] for record in records]) for step in steps}


def results_of(tournament: Tournament) -> list[Result]:
    """Return the results of all that is finished, task by task in the order of the plan."""
    results = []
    for task in tournament.plan.tasks:
        finished = {name: finals(tournament, task, name) for name in tournament.plan.contestants}
        finished = {name: records for name, records in finished.items() if records}
        baseline = finished.get(ADAMW)
        for name, records in finished.items():
            results.append(result_of(tournament, task, name, records, baseline))
    return results


def finals(tournament: Tournament, task: str, contestant: str) -> list[Record]:
    """Return the winner's runs on fresh seeds, none where some are missing."""
    plan, records = tournament.plan, tournament.records
    if (task, contestant) in tournament.left_out or any(
        run.key not in records for run in plan.tuning_runs(task, contestant)
    ):
        return []
    runs = plan.final_runs(task, contestant, tournament.winner(task, contestant))
    return [records[run.key] for run in runs] if all(run.key in records for run in runs) else []


def result_of(
    tournament: Tournament, task: str, contestant: str, records: Sequence[Record], baseline: Sequence[Record] | None
) -> Result:
    """Return one contestant's result beside AdamW's runs."""
    mean, error = mean_and_error([record.final for record in records])
    curve = mean_curve(records)
    to_adamw, steps_to_adamw, state_share = math.nan, math.nan, math.nan
    if baseline is not None:
        adamw_mean, adamw_error = mean_and_error([record.final for record in baseline])
        to_adamw = difference(mean, error, adamw_mean, adamw_error)
        steps_to_adamw = share_to_reach(curve, adamw_mean) if math.isfinite(adamw_mean) else math.nan
        state_share = records[0].state_bytes / baseline[0].state_bytes
    return Result(
        task=task,
        contestant=contestant,
        values=records[0].run.values,
        seeds=len(records),
        failed=sum(record.failed for record in records),
        mean=mean,
        error=error,
        to_adamw=to_adamw,
        steps_to_adamw=steps_to_adamw,
        step_ms=statistics.median(record.step_ms for record in records),
        iteration_ms=statistics.median(record.iteration_ms for record in records),
        state_bytes=records[0].state_bytes,
        state_share=state_share,
        curve=curve,
        trials=tournament.trials(task, contestant),
    )
