"""Three drawings of a task: the curves, what a learning rate changes, what the memory buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quality.contestants import CONTESTANTS
from quality.results import Result
from quality.tasks import TASKS

__all__ = ["draw"]


def color_of(contestant: str) -> tuple[float, ...]:
    """Return a color that a contestant keeps in all drawings."""
    return tuple(colormaps["tab20"](list(CONTESTANTS).index(contestant) % 20))


def draw_curves(results: Sequence[Result], axes: Axes) -> None:
    """Draw the mean over fresh seeds by step, in a band of a standard error to each side."""
    for result in results:
        steps = [step for step in result.curve if step > 0]
        means, errors = zip(*(result.curve[step] for step in steps), strict=True) if steps else ((), ())
        color = color_of(result.contestant)
        axes.plot(steps, means, color=color, label=result.contestant)
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_title("mean ± standard error over fresh seeds")


def draw_sensitivity(results: Sequence[Result], axes: Axes) -> None:
    """Draw what the trials came to by the learning rate, the trunk's where there are two."""
    for result in results:
        points = [(values.get("trunk_lr", values.get("lr")), final) for values, final in result.trials]
        points = sorted((lr, final) for lr, final in points if lr is not None and math.isfinite(final))
        if points:
            lrs, finals = zip(*points, strict=True)
            axes.plot(lrs, finals, marker="o", markersize=4, color=color_of(result.contestant), label=result.contestant)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate, of the trunk where there are two (decay and the cap's rate vary too)")
    axes.set_title("what the trials came to")


def draw_memory(results: Sequence[Result], axes: Axes) -> None:
    """Draw the metric by the size of the state."""
    for result in results:
        if math.isfinite(result.mean):
            error = 0.0 if math.isnan(result.error) else result.error
            axes.errorbar(
                result.state_bytes,
                result.mean,
                yerr=error,
                marker="o",
                capsize=3,
                color=color_of(result.contestant),
                label=result.contestant,
            )
    axes.set_xlabel("bytes of optimizer state")
    axes.set_title("mean ± standard error over fresh seeds")


def draw(task: str, results: Sequence[Result], folder: Path) -> None:
    """Write the three drawings of one task as PNGs."""
    drawings = {"curves": draw_curves, "sensitivity": draw_sensitivity, "memory": draw_memory}
    for name, drawing in drawings.items():
        # A figure with its own canvas needs no display and leaves pyplot's global state alone.
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawing(results, axes)
        finals = [result.mean for result in results if math.isfinite(result.mean)]
        if finals and min(finals) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(TASKS[task].metric)
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        figure.suptitle(f"{task}: {TASKS[task].kind}")
        figure.savefig(folder / f"{task}-{name}.png", dpi=120)
