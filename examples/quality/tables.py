"""The results as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality.contestants import BASELINES
from quality.results import LEVEL, Result, difference, verdict
from quality.search import Values
from quality.tasks import TASKS
from quality.tournament import Tournament

__all__ = ["as_markdown", "write_json"]

HEADINGS = (
    "contestant",
    "values",
    "mean ± standard error",
    "to AdamW, in standard errors",
    "steps to AdamW's final",
    "ms a step",
    "ms an iteration",
    "state bytes",
    "of AdamW's",
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float, form: str) -> str:
    """Return a number in a form, or what says that there is none."""
    return "-" if math.isnan(value) else format(value, form)


def share(value: float) -> str:
    """Return a share in percent."""
    return "never" if math.isinf(value) else shown(value, ".0%")


def shown_values(values: Values) -> str:
    """Return tuned values in one cell."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def task_row(result: Result) -> list[str]:
    """Return a contestant's line in the table of a task."""
    mean = "failed" if math.isinf(result.mean) else f"{result.mean:.4g} ± {shown(result.error, '.2g')}"
    return [
        result.contestant,
        shown_values(result.values),
        mean + (f" ({result.failed} of {result.seeds} failed)" if result.failed else ""),
        shown(result.to_adamw, "+.1f"),
        share(result.steps_to_adamw),
        f"{result.step_ms:.2f}",
        f"{result.iteration_ms:.1f}",
        f"{result.state_bytes:,}",
        share(result.state_share),
    ]


def summary(results: Sequence[Result], contestants: Sequence[str]) -> str:
    """Return how many tasks each contestant won, shared and lost against each baseline."""
    by_place = {(result.task, result.contestant): result for result in results}
    tasks = dict.fromkeys(result.task for result in results)
    baselines = [name for name in BASELINES if name in contestants]
    rows = []
    for name in contestants:
        row = [name]
        for baseline in baselines:
            pairs = [(by_place.get((task, name)), by_place.get((task, baseline))) for task in tasks]
            told = [
                verdict(difference(one.mean, one.error, other.mean, other.error))
                for one, other in pairs
                if one and other
            ]
            counts = [str(told.count(each)) for each in ("won", "level", "lost")]
            row.append("-" if name == baseline else " / ".join(counts))
        rows.append(row)
    return table(["contestant", *(f"against {name}" for name in baselines)], rows)


def as_markdown(tournament: Tournament, results: Sequence[Result], command: str, machine: dict[str, Any]) -> str:
    """Return the whole report."""
    plan = tournament.plan
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    about = f"{machine['date']}; {machine['cores']} cores of {machine['cpu']}; Python {machine['python']}; {versions}"
    parts = [
        "# Quality",
        f"`{command}`\n\n{about}",
        f"Each contestant: {plan.trials} trials on {plan.tuning_seeds} tuning seed(s), the winner by the final metric "
        f"on {plan.seeds} fresh seed(s). Smaller is better everywhere.",
        f"## Tasks won / level / lost\n\nWon or lost: by more than {LEVEL:g} standard errors of the difference.\n\n"
        + summary(results, plan.contestants),
    ]
    for name in dict.fromkeys(result.task for result in results):
        rows = [task_row(result) for result in results if result.task == name]
        task = TASKS[name]
        steps = min(task.steps, plan.steps or task.steps)
        parts.append(f"## {name}\n\n{task.kind}; {task.metric}; {steps} steps.\n\n" + table(HEADINGS, rows))
    if tournament.left_out:
        lines = [f"- {contestant} on {task}: {reason}" for (task, contestant), reason in tournament.left_out.items()]
        parts.append("## Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def finite(value: Any) -> Any:
    """Return what JSON can hold: nothing in place of numbers that are none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def write_json(
    tournament: Tournament, results: Sequence[Result], path: Path, command: str, machine: dict[str, Any]
) -> None:
    """Write all figures, with what gave them."""
    report = {
        "command": command,
        "machine": machine,
        "plan": dataclasses.asdict(tournament.plan),
        "left_out": [[*place, reason] for place, reason in tournament.left_out.items()],
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(finite(report), indent=1) + "\n", encoding="utf-8")
