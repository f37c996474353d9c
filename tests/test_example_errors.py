"""What the examples say to a slip on the command line: one line, exit code 2, and nothing is trained or written."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

import benchmark_step
import benchmark_vote
import digits
import distributed_costs
import low_precision
import toy_benchmark
import train_char_lm
import train_distributed
from tests.ranks import run_ranks
from tests.test_example_distributed import SMALL, quieten, train_here

WHOLE = "must be a whole number of at least 1, got '0'"
SLIPS: list[tuple[ModuleType, str, str]] = [
    (train_char_lm, "--steps 0", "steps = 0, but it must be a whole number of at least 1"),
    (train_char_lm, "--threads 0", "--threads: must be a whole number from 1 to 1024, got '0'"),
    (train_char_lm, "--threads many", "--threads: must be a whole number from 1 to 1024, got 'many'"),
    (train_char_lm, "--batch-size 0", "batch_size = 0, but it must be a whole number of at least 1"),
    (train_char_lm, "--warmup -1", "warmup = -1, but it must be a whole number of at least 0"),
    (train_char_lm, "--seed -1", "seed = -1, but it must be a whole number of at least 0"),
    (train_char_lm, "--seed 4294967296", "seed = 4294967296, but it must be below 2**32"),
    (train_char_lm, "--stac-cap-lr nan", "stac_cap_lr = nan, but it must be a finite number of at least 0"),
    (train_char_lm, "--no-recipe --stac-trunk-momentum 1.5", r"trunk_momentum must be a number in [0, 1), got 1.5"),
    (train_char_lm, "--stac-trunk-lr 1e-3", "stac_trunk_lr = 0.001 would not be read: add --no-recipe"),
    (train_char_lm, "--no-recipe --recipe-lr 1e-3", "recipe_lr = 0.001 would not be read: leave out --no-recipe"),
    (train_char_lm, "--width 10 --heads 3", "width = 10 must be a multiple of heads = 3"),
    (train_char_lm, "--context 10000000", "context = 10000000, but the text to validate on allows"),
    (train_char_lm, "--device cuda:99", "torch cannot use the device 'cuda:99' here"),
    (train_char_lm, "--device meta", "torch cannot use the device 'meta' here"),
    (train_char_lm, "--device abacus", "torch cannot use the device 'abacus' here"),
    (train_char_lm, "--stop-at 0", WHOLE),
    (train_char_lm, "--save folder", "--save: must name a file, but 'folder' is none"),
    (train_char_lm, "--save a_file/saved.pt", "nothing can be written to 'a_file'"),
    (train_char_lm, "--save-every 2", "--save-every needs --save PATH"),
    (train_char_lm, "--save s.pt --save-every 0", WHOLE),
    (train_char_lm, "--resume", "--resume without PATH needs --save PATH"),
    (train_char_lm, "--resume nowhere.pt", "there is no checkpoint nowhere.pt"),
    (train_char_lm, "--resume half.pt", "half.pt is damaged or no checkpoint"),
    (train_char_lm, "--resume random.pt", "random.pt is damaged or no checkpoint"),
    (train_char_lm, "--resume empty.pt", "empty.pt is damaged or no checkpoint"),
    (train_char_lm, "--resume folder", "folder is damaged or no checkpoint"),
    (train_char_lm, "--resume module.pt", "module.pt is damaged or no checkpoint"),
    (train_char_lm, "--resume list.pt", "list.pt is no checkpoint of this example"),
    (train_char_lm, "--resume other.pt", "other.pt is no checkpoint of this example"),
    (train_char_lm, "--resume older.pt", "another version of this example"),
    (train_char_lm, "--save random.pt --resume", "random.pt is damaged or no checkpoint"),
    (train_char_lm, "--out a_file/curves.png", "nothing can be written to 'a_file'"),
    (train_char_lm, "--out curves.txt", "--out: must end in one of"),
    (train_char_lm, "--stpes 3", "unrecognized arguments: --stpes 3"),
    (train_distributed, "", "start it with torchrun"),
    (train_distributed, "--threads 0", "--threads: must be a whole number from 1 to 1024, got '0'"),
    (train_distributed, "--device cuda:99", "torch cannot use the device 'cuda:99' here"),
    (train_distributed, "--save a_file", "nothing can be written to 'a_file'"),
    (benchmark_vote, "", "start it with torchrun"),
    (benchmark_vote, "--numel 0", WHOLE),
    (digits, "--epochs 1", "--epochs: must be a whole number of at least 2, got '1'"),
    (digits, "--lr nan", "--lr: must be a number above 0, got 'nan'"),
    (digits, "--seed -1", "--seed: must be a whole number from 0 to 4294967295, got '-1'"),
    (digits, "--out folder", "--out: must name a file, but 'folder' is none"),
    (digits, "--out a_file/digits.pt", "nothing can be written to 'a_file'"),
    (toy_benchmark, "--steps 0", WHOLE),
    (toy_benchmark, "--seeds 0", WHOLE),
    (toy_benchmark, "--device cuda:99", "torch cannot use the device 'cuda:99' here"),
    (low_precision, "--steps 0", WHOLE),
    (low_precision, "--threads 0", "--threads: must be a whole number from 1 to 1024, got '0'"),
    (low_precision, "--seeds 0 -1", "--seeds: must be a whole number from 0 to 4294967295, got '-1'"),
    (benchmark_step, "--steps 0", WHOLE),
    (benchmark_step, "--warmup -1", "--warmup: must be a whole number of at least 0, got '-1'"),
    (benchmark_step, "--patience 0", "--patience: must be a number above 0, got '0'"),
    (benchmark_step, "--busy 0", "--busy: must be a whole number from 1 to 1024, got '0'"),
    (benchmark_step, "--busy -1", "--busy: must be a whole number from 1 to 1024, got '-1'"),
    (benchmark_step, "--busy many", "--busy: must be a whole number from 1 to 1024, got 'many'"),
    (benchmark_step, "--device cuda:99", "torch cannot use the device 'cuda:99' here"),
    (benchmark_step, "--out a_file", "nothing can be written to 'a_file'"),
    (distributed_costs, "--steps 0", "unrecognized arguments: --steps 0"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is worked in, with files that are no checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("folder").mkdir()
    Path("a_file").touch()
    Path("empty.pt").touch()
    Path("random.pt").write_bytes(random.Random(0).randbytes(1000))
    torch.save({"step": 1, "model": torch.zeros(1000)}, "other.pt")
    Path("half.pt").write_bytes(Path("other.pt").read_bytes()[:2000])
    torch.save([1], "list.pt")
    torch.save(nn.Linear(1, 1), "module.pt")
    torch.save({key: {} for key in train_char_lm.CHECKPOINT_KEYS}, "older.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "arguments", "told"), SLIPS, ids=[f"{module.__name__} {arguments}" for module, arguments, _ in SLIPS]
)
def test_slip_ends_in_one_line(
    module: ModuleType, arguments: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    with pytest.raises(SystemExit) as caught:
        module.main(arguments.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_results_go_into_folders_that_do_not_exist(tmp_path: Path) -> None:
    new = tmp_path / "new"
    digits.main(["--epochs", "2", "--out", str(new / "digits" / "digits.pt")])
    small = ["--steps", "1", "--batch-size", "1", "--context", "8", "--width", "8"]
    train_char_lm.main([*small, "--save", str(new / "lm" / "saved.pt"), "--out", str(new / "png" / "curves.png")])
    assert len([path for path in new.rglob("*") if path.is_file()]) == 3


def test_missing_checkpoint_of_save_begins_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "3", "--batch-size", "1", "--context", "8", "--width", "8", "--out", str(tmp_path / "c.png")]
    command = [*small, "--save", str(tmp_path / "saved.pt"), "--resume"]
    losses = [train_char_lm.main([*command, *more])["STAC"].train_losses for more in (["--stop-at", "2"], [], [])]
    assert [len(each) for each in losses] == [2, 3, 3]
    assert losses[1] == losses[2]
    assert re.findall(r"saved\.pt at step \d", capsys.readouterr().out) == ["saved.pt at step 2", "saved.pt at step 3"]


def refusals(folder: str) -> list[str]:
    """What a rank is told of each checkpoint."""
    quieten()
    save({"weights": torch.zeros(3)}, checkpoint_id=f"{folder}/other/checkpoint")
    told = []
    for name in ("nowhere", "random", "half", "other"):
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
            train_here(["--resume", f"{folder}/{name}"])
        told.append(err.getvalue().replace(folder, "HERE"))
    for slip in ("--batch-size 3", "--steps 0", "--context 10000000"):
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
            train_here([*SMALL, *slip.split()])
        told.append(err.getvalue())
    return told


def test_ranks_refuse_alike(tmp_path: Path) -> None:
    run_ranks(train_here, 1, [*SMALL, "--stop-at", "1", "--save", str(tmp_path / "half")])
    for part in (tmp_path / "half" / "checkpoint").glob("*.distcp"):
        os.truncate(part, part.stat().st_size // 2)
    (tmp_path / "random" / "checkpoint").mkdir(parents=True)
    (tmp_path / "random" / "checkpoint" / ".metadata").write_bytes(random.Random(0).randbytes(1000))
    damaged = r"HERE/{}/checkpoint is damaged or no checkpoint of this example: \w+"
    expected = [
        "there is no checkpoint in HERE/nowhere",
        *(damaged.format(name) for name in ("random", "half", "other")),
        "batch_size = 3 must be a multiple of the 2 processes",
        "steps = 0, but it must be a whole number of at least 1",
        r"context = 10000000, but the text to validate on allows \d+ at most",
    ]
    for told in run_ranks(refusals, 2, str(tmp_path), timeout=150):
        for line, pattern in zip(told, expected, strict=True):
            assert re.fullmatch(rf".*: error: {pattern}\n", line)


@pytest.mark.slow
def test_slip_is_at_the_end_of_what_torchrun_reports() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, train_distributed.__file__, "--batch-size", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    told = "train_distributed.py: error: batch_size = 3 must be a multiple of the 2 processes"
    assert done.stderr.count(told) == 1
    last, rule = done.stderr.rstrip().splitlines()[-2:]
    assert last.endswith(told)
    assert set(rule) == {"="}
