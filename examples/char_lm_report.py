"""How a comparison on the character model is reported: a table for the terminal, a drawing of the curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from command_line import output_file

__all__ = ["Summary", "draw_curves", "format_table", "picture_file"]

COLORS = ("tab:orange", "tab:blue", "tab:green", "tab:red")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one optimizer reached and what it cost.

    Attributes:
        name: of the optimizer.
        validation_loss: at the end, in nats per character.
        state_bytes: size of all tensors in the optimizer's state.
        step_ms: median time of the optimizer's step alone, in milliseconds.
        iteration_ms: median time of forward, backward and step together, in milliseconds.
        train_losses: one per step.
        validation_losses: by the number of steps done.
    """

    name: str
    validation_loss: float
    state_bytes: int
    step_ms: float
    iteration_ms: float
    train_losses: list[float]
    validation_losses: dict[int, float]


def format_table(summaries: Sequence[Summary]) -> str:
    """Return the figures of all contestants, one line each under a heading."""
    lines = [f"{'optimizer':<10}{'validation loss':>16}{'state bytes':>14}{'step, ms':>10}{'iteration, ms':>15}"]
    for summary in summaries:
        times = f"{summary.step_ms:>10.2f}{summary.iteration_ms:>15.2f}"
        lines.append(f"{summary.name:<10}{summary.validation_loss:>16.4f}{summary.state_bytes:>14,}{times}")
    return "\n".join(lines)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return, for each place, the mean over ``window`` values around it, over fewer at the ends."""
    starts = range(-(window // 2), len(values) - window // 2)
    chunks = (values[max(0, start) : start + window] for start in starts)
    return [sum(chunk) / len(chunk) for chunk in chunks]


def picture_file(text: str) -> Path:
    """Check that a drawing can be written to a file; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it cannot, as where the name does not tell one of matplotlib's formats.
    """
    path = output_file(text)
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(sorted(formats))}, got {text!r}")
    return path


def draw_curves(summaries: Sequence[Summary], path: Path, *, title: str) -> None:
    """Write the training losses, smoothed, and the validation losses of all contestants to a PNG."""
    # A figure with its own canvas needs no display and leaves pyplot's global state alone.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for summary, color in zip(summaries, COLORS, strict=False):
        window = max(1, len(summary.train_losses) // 30)
        axes.plot(
            range(1, len(summary.train_losses) + 1),
            smooth(summary.train_losses, window),
            color=color,
            alpha=0.4,
            label=f"{summary.name}, training (mean of {window} steps)",
        )
        axes.plot(
            list(summary.validation_losses),
            list(summary.validation_losses.values()),
            color=color,
            marker="o",
            markersize=4,
            label=f"{summary.name}, validation ({summary.validation_loss:.3f} at the end)",
        )
    firsts = [next(iter(summary.validation_losses.values()), 0.0) for summary in summaries]
    if all(firsts):
        # The fall from a uniform guess looks alike for every optimizer; the differences come after it.
        axes.set_ylim(top=1.1 * max(firsts))
    axes.margins(x=0.01)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
