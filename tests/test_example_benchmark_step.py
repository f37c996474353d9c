"""The benchmark of steps: what it says of busy cores, that what it starts ends with it, and whose memory it counts."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import benchmark_busy
import benchmark_step
from benchmark_busy import spinning
from benchmark_contestants import CONTESTANTS
from benchmark_memory import transient_bytes_of
from benchmark_shapes import Entry, Workload
from benchmark_step import Effort, Racer

CPU = torch.device("cpu")
MIB = 2**20
TIMEOUT = 60.0  # seconds, for what takes one


@pytest.fixture
def racer(monkeypatch: pytest.MonkeyPatch) -> Racer:
    """AdamW on a few weights."""
    monkeypatch.setattr(benchmark_step, "PASS_LENGTH", 16)
    racer = Racer(CONTESTANTS[0], Workload([Entry("w", (8,))], dtype=torch.float32, device=CPU))
    racer.take_first_steps()
    return racer


def test_busy_ratio_is_of_the_contestants_own_quiet_median(racer: Racer) -> None:
    racer.quiet.seconds[:] = [0.002, 0.001, 0.009]
    racer.busy.seconds[:] = [0.007, 0.004, 0.3, 0.009]
    result = racer.result(baseline_ms=4.0, copy_speed=1e9, in_place_speed=1e9)
    assert result.step_ms == pytest.approx(2)
    assert result.ratio == pytest.approx(0.5)
    assert result.busy is not None
    assert result.busy.steps == 4
    assert result.busy.step_ms == pytest.approx(8)
    assert result.busy.step_ms_quartiles == pytest.approx((6.25, 81.75))
    assert result.busy.ratio == pytest.approx(4)


def test_contestant_that_was_not_timed_busy_has_no_busy_result(racer: Racer) -> None:
    racer.quiet.seconds[:] = [0.002]
    assert racer.result(baseline_ms=4.0, copy_speed=1e9, in_place_speed=1e9).busy is None


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(3, 30, (1, 10, 20)), (1, 1, (1, 1, 20)), (0, 4, (0, 2, 20))]
)
def test_less_is_asked_beside_others(warmup: int, steps: int, expected: tuple[int, int, int]) -> None:
    assert Effort(warmup, steps, 60.0).beside_others() == expected


def test_one_that_has_spent_its_budget_is_timed_once(racer: Racer) -> None:
    benchmark_step.race([racer], CPU, Effort(1, 9, 1e-9), lambda racer: racer.busy)
    assert len(racer.busy.seconds) == 1
    assert racer.quiet.seconds == []


def test_busy_run_reports_both_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    @contextmanager
    def watched(number: int) -> Iterator[list[subprocess.Popen[str]]]:
        with spinning(number) as processes:
            seen.extend(processes)
            yield processes
            assert [process.poll() for process in processes] == [None] * number

    monkeypatch.setattr(benchmark_step, "PASS_LENGTH", 16)
    monkeypatch.setattr(benchmark_step, "spinning", watched)
    arguments = ["--shapes", "char-lm-wide", "--steps", "4", "--warmup", "0", "--contestants", "SGD", "--busy", "2"]
    report = benchmark_step.main([*arguments, "--out", str(tmp_path)])
    assert len(seen) == 2
    assert all(process.returncode is not None for process in seen)
    told = json.loads((tmp_path / "char-lm-wide-float32-cpu-busy2.json").read_text())
    assert told["busy_processes"] == report.busy_processes == 2
    assert (tmp_path / "char-lm-wide-float32-cpu-busy2.png").stat().st_size > 0
    heading, *rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("contestant", "AdamW "))
    ]
    assert heading.split("x AdamW")[1].split()[:4] == ["busy", "ms", "x", "quiet"]
    for result, row in zip(report.results, told["results"], strict=True):
        assert result.busy is not None
        assert (result.steps, result.busy.steps) == (4, 2)
        assert result.busy.ratio == result.busy.step_ms / result.step_ms
        assert row["busy"]["ratio"] == result.busy.ratio
    assert f"{told['results'][0]['busy']['ratio']:.2f}" in rows[0].split()


def test_quiet_run_says_nothing_of_busy_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_step, "PASS_LENGTH", 16)
    arguments = ["--shapes", "char-lm-wide", "--steps", "1", "--warmup", "0", "--contestants", "SGD"]
    report = benchmark_step.main([*arguments, "--out", str(tmp_path)])
    assert report.busy_processes is None
    assert all(result.busy is None for result in report.results)
    assert "busy" not in capsys.readouterr().out


def test_processes_keep_cores_busy() -> None:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
        return children.ru_utime + children.ru_stime

    before = used()
    with spinning(1):
        time.sleep(1.5)
    assert used() - before > 0.3  # one that only waits takes a tenth of that to begin


def test_processes_end_where_the_measurement_fails() -> None:
    with pytest.raises(KeyboardInterrupt), spinning(2) as processes:
        raise KeyboardInterrupt
    assert all(process.returncode is not None for process in processes)


def test_process_that_cannot_spin_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_busy, "SPIN", "")
    with pytest.raises(RuntimeError, match="ended at once"), spinning(1):
        pass


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(os.killpg, signal.SIGINT, id="interrupted-at-the-terminal"),
        pytest.param(os.kill, signal.SIGTERM, id="terminated"),
        pytest.param(os.kill, signal.SIGKILL, id="killed"),
    ],
)
def test_processes_end_with_the_benchmark_however_it_ends(send: Callable[[int, int], None], number: int) -> None:
    script = (
        "import signal, time, benchmark_busy\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background may ignore it
        "with benchmark_busy.spinning(2): print('all spin', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(benchmark_busy.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as at a terminal
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "all spin\n"
        send(process.pid, number)
        # All hold the standard error, so it ends when the last has ended.
        _, told = process.communicate(timeout=TIMEOUT / 2)
    assert process.returncode != 0
    assert told.count("Traceback") == (number == signal.SIGINT)


def test_memory_of_other_threads_counts() -> None:
    meeting = threading.Barrier(3, timeout=TIMEOUT)

    def hold(_: int) -> None:
        held = torch.ones(MIB, dtype=torch.uint8)
        meeting.wait()  # until all three hold theirs
        del held
        meeting.wait()

    with ThreadPoolExecutor(3) as pool:
        assert transient_bytes_of(lambda: list(pool.map(hold, range(3))), CPU) == 3 * MIB


def test_memory_that_threads_hold_one_after_the_other_counts_once() -> None:
    turn = threading.Lock()

    def hold(_: int) -> None:
        with turn:
            held = torch.ones(MIB, dtype=torch.uint8)
            del held

    def together() -> None:
        held = torch.ones(MIB, dtype=torch.uint8)
        list(pool.map(hold, range(3)))
        del held

    with ThreadPoolExecutor(3) as pool:
        assert transient_bytes_of(together, CPU) == 2 * MIB


def test_memory_freed_by_another_thread_is_free() -> None:
    def hand_over() -> None:
        for _ in range(3):
            handed = [torch.ones(MIB, dtype=torch.uint8)]
            pool.submit(handed.clear).result()

    with ThreadPoolExecutor(1) as pool:
        assert transient_bytes_of(hand_over, CPU) == MIB


def test_failed_measurement_of_memory_changes_nothing() -> None:
    submit = ThreadPoolExecutor.submit
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # a recorder that went on would refuse the second
            with pytest.raises(ZeroDivisionError):
                transient_bytes_of(lambda: pool.submit(divmod, 1, 0).result(), CPU)
        assert transient_bytes_of(lambda: pool.submit(torch.ones, 256).result(), CPU) == 1024
    assert ThreadPoolExecutor.submit is submit
