"""How a benchmark of steps is reported: a table for the terminal, a record as JSON, a bar chart. No measuring here."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Busy", "Report", "Result", "describe_machine", "draw_bars", "format_table", "write_json"]

PACKAGES = (
    "stac-optimizer",
    "torch",
    "triton",
    "lion-pytorch",
    "mlxtend",
    "schedulefree",
    "torch-optimi",
    "flashoptim",
    "heavyball",
    "torchao",
    "bitsandbytes",
)
# By the first word of a contestant's name; whoever is not listed takes the last.
COLORS = {"STAC": "tab:blue", "Lion": "tab:cyan", "AdamW": "tab:orange", "": "tab:gray"}
# A bar longer than this many times the baseline's is cut, lest the others vanish beside it.
LONGEST_BAR = 2.0


@dataclass(frozen=True, kw_only=True)
class Busy:
    """What one contestant's step costs beside spinning processes.

    Attributes:
        steps: how many were timed.
        step_ms: the median of those steps.
        step_ms_quartiles: the lower and the upper quartile.
        ratio: ``step_ms`` by that of the same contestant without the processes.
    """

    steps: int
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one contestant's step costs.

    Attributes:
        name: of the contestant.
        weights: how many it steps; not always all.
        steps: how many were timed; fewer than asked for where its time ran out.
        step_ms: the median of those steps.
        step_ms_quartiles: the lower and the upper quartile.
        ratio: ``step_ms`` by that of the baseline, ``AdamW``.
        ns_per_weight: ``step_ms`` by weight.
        bytes_per_weight: what a step must move at least: weights read and written, gradients read, state read and
            written.
        copy_share: those bytes by ``step_ms``, by the bandwidth of a copy. Above 1 where all stays in cache.
        in_place_share: likewise by the bandwidth of an operation in place.
        state_bytes_per_weight: what the optimizer keeps between steps, counters too.
        peak_transient_bytes: the most that a step holds at once beyond what was there before it.
        first_step_s: time of the first step, which makes the state and compiles what is compiled.
        busy: the same beside spinning processes, where asked for.
    """

    name: str
    weights: int
    steps: int
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    ratio: float
    ns_per_weight: float
    bytes_per_weight: float
    copy_share: float
    in_place_share: float
    state_bytes_per_weight: float
    peak_transient_bytes: int
    first_step_s: float
    busy: Busy | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the benchmark.

    Attributes:
        shapes: their name.
        tensors: how many there are.
        weights: how many they hold.
        dtype: of weights and gradients.
        device: where they live.
        copy_gb_per_s: bytes that a large copy reads and writes, by its median time.
        in_place_gb_per_s: bytes that a large operation in place reads and writes, by its median time.
        results: one per contestant, in the order of the table of contestants.
        left_out: the reason by contestant.
        busy_processes: how many spun beside the busy steps, where asked for.
        command: that gave this report.
        machine: what it ran on, as ``describe_machine`` says.
    """

    shapes: str
    tensors: int
    weights: int
    dtype: str
    device: str
    copy_gb_per_s: float
    in_place_gb_per_s: float
    results: tuple[Result, ...]
    left_out: dict[str, str]
    busy_processes: int | None
    command: str
    machine: dict[str, Any]

    def __str__(self) -> str:
        what = f"{self.shapes}: {self.weights:,} weights in {self.tensors:,} tensors, {self.dtype}, {self.device}"
        return f"{what}; a copy moves {self.copy_gb_per_s:.1f} GB/s, in place {self.in_place_gb_per_s:.1f}"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions, load and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {**versions, "torch": torch.__version__},
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Return the size of the machine's memory where the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def of_busy(write: Callable[[Busy], str]) -> Callable[[Result], str]:
    """Return a function that writes a value of the busy steps."""
    return lambda result: write(result.busy) if result.busy else ""


BUSY_COLUMNS = (
    ("busy ms", 11, of_busy(lambda busy: f"{busy.step_ms:.3f}")),
    ("x quiet", 9, of_busy(lambda busy: f"{busy.ratio:.2f}")),
    ("busy steps", 12, of_busy(lambda busy: str(busy.steps))),
)


def format_table(report: Report) -> str:
    """Return the results, one line each under a heading, and who was left out and why."""
    width = 2 + max(len(result.name) for result in report.results)
    # Heading, width, and how the value is written.
    columns: tuple[tuple[str, int, Callable[[Result], str]], ...] = (
        ("ms", 10, lambda result: f"{result.step_ms:.3f}"),
        ("x AdamW", 9, lambda result: f"{result.ratio:.3f}"),
        *(BUSY_COLUMNS if report.busy_processes else ()),
        ("ns/weight", 11, lambda result: f"{result.ns_per_weight:.3f}"),
        ("moves B/w", 11, lambda result: f"{result.bytes_per_weight:.2f}"),
        ("of copy", 9, lambda result: f"{result.copy_share:.1%}"),
        ("in place", 10, lambda result: f"{result.in_place_share:.1%}"),
        ("state B/w", 11, lambda result: f"{result.state_bytes_per_weight:.2f}"),
        ("peak MiB", 10, lambda result: f"{result.peak_transient_bytes / 2**20:.2f}"),
        ("first s", 9, lambda result: f"{result.first_step_s:.2f}"),
        ("steps", 7, lambda result: str(result.steps)),
        ("weights", 13, lambda result: f"{result.weights:,}"),
    )
    load = report.machine["load_average"]
    where = (
        report.machine["gpu"] or f"{report.machine['cpu']}, {report.machine['threads']} threads",
        f"torch {report.machine['versions']['torch']}",
        report.machine["date"],
        f"load average at the start {load[0]:.2f}" if load else "load unknown",
        *([f"busy: beside {report.busy_processes} processes that spin"] if report.busy_processes else []),
    )
    lines = [
        str(report),
        ", ".join(where),
        "contestant".ljust(width) + "".join(f"{heading:>{size}}" for heading, size, _ in columns),
    ]
    for result in report.results:
        lines.append(result.name.ljust(width) + "".join(f"{write(result):>{size}}" for _, size, write in columns))
    lines += [f"left out: {name}: {reason}" for name, reason in report.left_out.items()]
    return "\n".join(lines)


def write_json(report: Report, path: Path) -> None:
    """Write all of the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")


def draw_bars(report: Report, path: Path) -> None:
    """Write a PNG with a bar per contestant, and on each bar a line where the bandwidth would end it."""
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(report.results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = cut_length(report.results)
    for place, result in enumerate(report.results):
        color = COLORS.get(result.name.split()[0], COLORS[""])
        length = min(result.step_ms, longest)
        axes.barh(place, length, color=color)
        if result.busy:
            axes.barh(place, min(result.busy.step_ms, longest), color=color, alpha=0.3)
        limit = result.in_place_share * result.step_ms
        axes.plot(
            [limit, limit],
            [place - 0.4, place + 0.4],
            color="black",
            label="" if place else "what it must move, at the speed in place",
        )
        if result.step_ms <= longest:
            axes.plot(result.step_ms_quartiles, [place, place], color="black", linewidth=4, alpha=0.35)
        cut = "" if result.step_ms <= longest else " (bar cut)"
        text = f" {milliseconds(result.step_ms)}, {result.ratio:.3g} x AdamW{cut}"
        end = max(limit, result.step_ms_quartiles[1])
        if result.busy:
            text += f"; busy {milliseconds(result.busy.step_ms)}, {result.busy.ratio:.3g} x quiet"
            end = max(end, result.busy.step_ms)
        axes.text(min(longest, end), place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(report.results)), [result.name for result in report.results])
    axes.set_ylim(len(report.results) - 0.4, -0.6)
    axes.set_xlim(0, (2 if report.busy_processes else 1.5) * longest)
    lighter = (
        f"; lighter, maybe cut: beside {report.busy_processes} processes that spin" if report.busy_processes else ""
    )
    axes.set_xlabel(f"milliseconds a step: median, and as a band the quartiles{lighter}")
    axes.set_title(f"{report}\n{report.machine['gpu'] or report.machine['cpu']}, {report.machine['date']}", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def milliseconds(number: float) -> str:
    """Return it with no more digits than matter beside a bar."""
    return f"{number:,.{0 if number >= 1000 else 1}f} ms"


def cut_length(results: Sequence[Result]) -> float:
    """Return where the longest bar that is drawn whole ends, its band of quartiles included."""
    baseline = next(result.step_ms / result.ratio for result in results)
    kept = [result.step_ms_quartiles[1] for result in results if result.step_ms <= LONGEST_BAR * baseline]
    return max(kept, default=baseline)
