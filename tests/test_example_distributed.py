"""The example of several processes: every strategy trains, and resumes on other numbers of processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_distributed
from distributed_report import Report
from tests.ranks import run_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"
SMALL = ["--steps", "6", "--batch-size", "12", "--context", "64", "--width", "16", "--depth", "1", "--heads", "2"]
EVERY = ["--validate-every", "2"]


def trained(ranks: int, *arguments: object) -> Report:
    first, *others = run_ranks(train_distributed.train, ranks, [str(argument) for argument in arguments])
    assert all(other.digest == first.digest for other in others)
    assert isinstance(first, Report)
    return first


@pytest.mark.parametrize("strategy", train_distributed.STRATEGIES)
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


def test_one_command_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    arguments = ["--strategy", "vote", "--encoding", "binary", *SMALL, "--save", str(tmp_path / "saved")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step +6: training loss \d\.\d+, validation loss \d\.\d+$", done.stdout, flags=re.MULTILINE)
    assert "vote, binary, on 2 processes: 6 steps" in done.stdout
    assert (tmp_path / "saved" / ".metadata").exists()
