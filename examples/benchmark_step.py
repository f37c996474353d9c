"""Time the step of STAC, of torch's optimizers and of those of other packages, side by side in one run.

    python examples/benchmark_step.py --shapes gpt2-small

The contestants take turns, step by step and in an order drawn anew each round, so that noise of the machine hits all
alike. They share parameters and gradients and keep their own state. Times are of the wall, each step waited for. The
extra ``bench`` brings the packages of others; whichever is missing, or does not work on the device, is left out with
the reason.

A large copy and a large negation in place take turns with them and tell the bandwidth, both counted as reading and
writing each byte once. Most CPUs also read the lines of a copy's target before they write them, so what works in place
outdoes the copy there.

The first step makes state and compiles what is compiled, unless an earlier contestant or run has: it is kept on disk.
The second tells the memory: on CUDA by the allocator's statistics, on the CPU by replaying what torch's profiler saw
allocated and freed, in the thread that steps and in tasks of the thread pools that the step gives work to.

``--busy 4`` times all once more, with four processes beside that do nothing but keep the cores busy, as workers that
load data do: a third of the rounds and of the budget, for a step may take many times as long. A single step, however
long, is waited for. The report then tells for each contestant how many times its own quiet time that took.
"""

from __future__ import annotations

import math
import random
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmark_busy import spinning
from benchmark_contestants import BASELINE, CONTESTANTS, Contestant, LeftOutError
from benchmark_family import FAMILY
from benchmark_memory import held_tensors, transient_bytes_of
from benchmark_report import Busy, Report, Result, describe_machine, draw_bars, format_table, write_json
from benchmark_shapes import SHAPES, Workload
from command_line import Parser, at_least_one, not_negative, output_folder, positive, usable_device, whole_number

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# More than any cache holds, in float32.
PASS_LENGTH = 2**27


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the time that the function and all it gives the device to do take."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class Effort(NamedTuple):
    """How much is asked of each contestant: steps to warm up, timed steps, and the seconds that are enough."""

    warmup: int
    steps: int
    budget: float

    def beside_others(self) -> Effort:
        """Return less, for steps that may take many times as long."""
        return Effort(min(self.warmup, 1), math.ceil(self.steps / 3), self.budget / 3)


@dataclass
class Clock:
    """What one contestant took under one load."""

    spent: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Racer:
    """A contestant's optimizer, and what is known of its steps."""

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        self.name = contestant.name
        self.workload = workload
        self.optimizer = contestant.build(workload)
        self.first_seconds = math.nan
        self.peak_transient_bytes = 0
        self.quiet = Clock()
        self.busy = Clock()

    def take_first_steps(self) -> None:
        """Take the step that makes the state and compiles, and the one that tells the memory."""
        self.workload.give_gradients()
        self.first_seconds = seconds_of(self.optimizer.step, self.workload.device)
        self.workload.give_gradients()
        begin = time.perf_counter()
        self.peak_transient_bytes = transient_bytes_of(self.optimizer.step, self.workload.device)
        self.quiet.spent = time.perf_counter() - begin

    def step(self, clock: Clock, *, timed: bool) -> None:
        """Take one step, timed or to warm up."""
        self.workload.give_gradients()
        taken = seconds_of(self.optimizer.step, self.workload.device)
        clock.spent += taken
        if timed:
            clock.seconds.append(taken)

    def result(self, baseline_ms: float, copy_speed: float, in_place_speed: float) -> Result:
        """Return what the timed steps cost; speeds in bytes a second."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        weights = sum(param.numel() for param in params)
        # By storage, for state may be shared, or be views of one buffer.
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in held_tensors(list(self.optimizer.state.values()))
        }
        state_bytes = sum(storages.values())
        moved_bytes = sum(3 * param.nbytes for param in params) + 2 * state_bytes
        lower, median, upper = quartiles(self.quiet.seconds)
        return Result(
            name=self.name,
            weights=weights,
            steps=len(self.quiet.seconds),
            step_ms=1e3 * median,
            step_ms_quartiles=(1e3 * lower, 1e3 * upper),
            ratio=1e3 * median / baseline_ms,
            ns_per_weight=1e9 * median / weights,
            bytes_per_weight=moved_bytes / weights,
            copy_share=moved_bytes / median / copy_speed,
            in_place_share=moved_bytes / median / in_place_speed,
            state_bytes_per_weight=state_bytes / weights,
            peak_transient_bytes=self.peak_transient_bytes,
            first_step_s=self.first_seconds,
            busy=self.busy_result(median) if self.busy.seconds else None,
        )

    def busy_result(self, quiet_median: float) -> Busy:
        """Return what the steps beside spinning processes cost."""
        lower, median, upper = quartiles(self.busy.seconds)
        return Busy(
            steps=len(self.busy.seconds),
            step_ms=1e3 * median,
            step_ms_quartiles=(1e3 * lower, 1e3 * upper),
            ratio=median / quiet_median,
        )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where the system can: compiling for many tensors may take hours, Muon minutes."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise LeftOutError(f"its first two steps took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def enter(contestants: Sequence[Contestant], workload: Workload, *, limit: float) -> tuple[list[Racer], dict[str, str]]:
    """Let every contestant take its first two steps; return those that could, and the reason by name for the others."""
    racers: list[Racer] = []
    left_out: dict[str, str] = {}
    for contestant in (bar := tqdm(contestants, desc="first steps", disable=None)):
        bar.set_postfix_str(contestant.name)
        try:
            racer = Racer(contestant, workload)
            with patience(limit):
                racer.take_first_steps()
        except LeftOutError as error:
            left_out[contestant.name] = str(error)
        except Exception as error:
            if not contestant.foreign:
                raise
            left_out[contestant.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            racers.append(racer)
    return racers, left_out


def race(
    racers: Sequence[Racer], device: torch.device, effort: Effort, clock: Callable[[Racer], Clock]
) -> tuple[float, float]:
    """Let all take turns, timed by this clock: until their budget is spent, and at least one timed step.

    Returns:
        The bytes a second that a copy and a negation in place move.
    """
    source = torch.zeros(PASS_LENGTH, device=device)
    target = torch.zeros_like(source)
    copies, negations = [], []
    order = random.Random(0)
    for turn in tqdm(range(-effort.warmup, effort.steps), desc="rounds", disable=None):
        timed = turn >= 0
        copies.append(seconds_of(lambda: target.copy_(source), device))
        negations.append(seconds_of(source.neg_, device))
        for racer in order.sample(racers, len(racers)):
            own = clock(racer)
            if own.spent < effort.budget or (timed and not own.seconds):
                racer.step(own, timed=timed)
    moved = 2 * source.nbytes
    copy_seconds, in_place_seconds = (statistics.median(times[effort.warmup :]) for times in (copies, negations))
    return moved / copy_seconds, moved / in_place_seconds


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the benchmark, print the table, write the JSON and the chart, and return the report."""
    parser = Parser(__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="gpt2-small", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all weights (default: %(default)s)")
    parser.add_argument("--device", type=usable_device, default="cpu", help="for example cuda (default: %(default)s)")
    parser.add_argument("--steps", type=at_least_one, default=30, help="timed steps of each (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=not_negative, default=3, help="further untimed steps of each (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=positive, default=60, help="seconds after which one stops early (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=positive, default=300, help="seconds for the first two steps of each (default: %(default)s)"
    )
    parser.add_argument(
        "--contestants", nargs="+", metavar="PART", help=f"those with one of these in their names, and {BASELINE}"
    )
    parser.add_argument(
        "--family", action="store_true", help="the classes of stac_optimizer.optim beside the packages they come from"
    )
    parser.add_argument(
        "--busy", type=whole_number(1, 1024), metavar="N", help="then once more, beside so many spinning processes"
    )
    parser.add_argument(
        "--out", type=output_folder, default="benchmark", help="folder to write to (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    device = torch.device(options.device)
    machine = describe_machine(device)
    workload = Workload(SHAPES[options.shapes](), dtype=DTYPES[options.dtype], device=device)
    parts = options.contestants or [""]
    table = [*CONTESTANTS[:1], *FAMILY] if options.family else CONTESTANTS
    chosen = [one for one in table if one.name == BASELINE or any(part in one.name for part in parts)]
    racers, left_out = enter(chosen, workload, limit=options.patience)
    effort = Effort(options.warmup, options.steps, options.budget)
    copy_speed, in_place_speed = race(racers, device, effort, attrgetter("quiet"))
    if options.busy:
        with spinning(options.busy):
            race(racers, device, effort.beside_others(), attrgetter("busy"))
    baseline = next(racer for racer in racers if racer.name == BASELINE)
    baseline_ms = 1e3 * statistics.median(baseline.quiet.seconds)
    report = Report(
        shapes=options.shapes,
        tensors=len(workload.parameters),
        weights=workload.weights,
        dtype=options.dtype,
        device=str(device),
        copy_gb_per_s=copy_speed / 1e9,
        in_place_gb_per_s=in_place_speed / 1e9,
        results=tuple(racer.result(baseline_ms, copy_speed, in_place_speed) for racer in racers),
        left_out=left_out,
        busy_processes=options.busy,
        command=shlex.join(["python", "examples/benchmark_step.py", *(sys.argv[1:] if argv is None else argv)]),
        machine=machine,
    )
    print(format_table(report))
    stem = f"{'family-' if options.family else ''}{options.shapes}-{options.dtype}-{device.type}"
    stem += f"-busy{options.busy}" if options.busy else ""
    write_json(report, options.out / f"{stem}.json")
    draw_bars(report, options.out / f"{stem}.png")
    print(f"written: {options.out / stem}.json and .png")
    return report


if __name__ == "__main__":
    main()
