"""The examples of several processes: every strategy trains, and resumes on other numbers of them; costs on paper."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark_vote
import distributed_costs
import train_distributed
from distributed_report import Report
from tests.ranks import run_ranks

PAGE = (Path(__file__).parents[1] / "docs" / "many-processes.md").read_text(encoding="utf-8")
MEASURED = (Path(__file__).parents[1] / "examples" / "README.md").read_text(encoding="utf-8")
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"
SMALL = ["--steps", "6", "--batch-size", "12", "--context", "64", "--width", "16", "--depth", "1", "--heads", "2"]
EVERY = ["--validate-every", "2"]


runs_fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs CUDA")


def quieten() -> None:
    """Pass over warnings of torch 2.6: of random numbers on shards, of which there are none, and of its own files."""
    warnings.filterwarnings("ignore", "(DTensor random operators|TypedStorage is deprecated)", UserWarning)


def train_here(arguments: list[str]) -> Report:
    quieten()
    return train_distributed.train(arguments)


def trained(ranks: int, *arguments: object) -> Report:
    first, *others = run_ranks(train_here, ranks, [str(argument) for argument in arguments])
    assert all(other.digest == first.digest for other in others)
    assert isinstance(first, Report)
    return first


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=runs_fsdp2), "vote"])
def test_strategy_trains_and_resumes_on_other_numbers_of_processes(strategy: str, tmp_path: Path) -> None:
    half = trained(2, *SMALL, *EVERY, "--strategy", strategy, "--stop-at", 4, "--save", tmp_path)
    assert list(half.train_losses) == list(half.validation_losses) == [2, 4]
    assert half.validation_losses[4] < half.validation_losses[2]
    assert half.wire_bytes == "only Linux has /proc/net/dev" or float(half.wire_bytes) > 0
    for ranks in (1, 4):
        rest = trained(ranks, "--strategy", strategy, "--resume", tmp_path)
        assert rest.resumed_digest == half.digest
        assert list(rest.validation_losses) == [6]
        assert rest.validation_losses[6] < half.validation_losses[4]
        shards = 2 / ranks if strategy == "fsdp2" else 1
        assert rest.state_bytes == pytest.approx(half.state_bytes * shards, rel=0.05)


@runs_fsdp2
def test_votes_are_resumed_on_shards(tmp_path: Path) -> None:
    half = trained(2, *SMALL, *EVERY, "--strategy", "vote", "--stop-at", 2, "--save", tmp_path)
    rest = trained(3, "--strategy", "fsdp2", "--resume", tmp_path)
    assert rest.resumed_digest == half.digest
    assert rest.validation_losses[6] < half.validation_losses[2]
    assert rest.state_bytes < half.state_bytes / 2


def test_one_command_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    arguments = ["--strategy", "vote", "--encoding", "binary", *SMALL, "--save", str(tmp_path / "saved")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step +6: training loss \d\.\d+, validation loss \d\.\d+$", done.stdout, flags=re.MULTILINE)
    assert "vote, binary, on 2 processes: 6 steps" in done.stdout
    assert (tmp_path / "saved" / "checkpoint" / ".metadata").exists()


def run_page(code: str) -> list[bytes]:
    """The weights of all models after the page's example."""
    namespace: dict[str, Any] = {}
    exec(compile(code, "many-processes.md", "exec"), namespace)
    assert namespace["sharding"].partition.trunk_layer_names == namespace["averaging"].partition.trunk_layer_names
    optimizer = namespace["optimizer"]
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().numpy().tobytes() for tensor in (*namespace["model"].parameters(), *state)]


def test_documented_example_of_many_processes_leaves_ranks_alike() -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    first, second = run_ranks(run_page, 2, code)
    assert first == second


def test_costs_on_paper_are_those_that_are_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    for table in distributed_costs.main([]).split("\n\n"):
        assert f"\n\n{table}\n\n" in MEASURED
    assert "7 B | 1,024" in capsys.readouterr().out


def test_costs_on_paper() -> None:
    """Small numbers, counted by hand: of 4 ranks each sends, twice, 3 of 4 slices."""
    assert distributed_costs.averaging(100, 4, 4) == 2 * 3 * 25 * 4
    assert distributed_costs.vote(100, 4, cap=0.0) == distributed_costs.averaging(100, 4, 4) / 16
    assert distributed_costs.vote(100, 4, cap=1.0) == distributed_costs.averaging(100, 4, 4)
    assert distributed_costs.state(100, cap=1.0) == 800
    assert distributed_costs.state(100, cap=0.0, shards=4) == 100


def test_benchmark_of_votes_times_every_contestant() -> None:
    for results in run_ranks(benchmark_vote.compare, 2, 1 << 16, 2):
        assert len(results) == 8
        assert all(nanoseconds > 0 for nanoseconds in results.values())
