"""Runs of the examples that are killed while they save lose nothing, and end where runs left alone end, to the bit.

Twenty kills, with what each met: ``STAC_KILLS=20 python -m pytest -s tests/test_crash_safety.py -k again_and_again``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

import checkpoint_file
import checkpoint_folder
import train_char_lm
from tests.ranks import run_ranks
from tests.support import assert_same_bits
from tests.test_example_distributed import SMALL, train_here, trained

KILLS = int(os.environ.get("STAC_KILLS", "2"))
STEPS = 40 * KILLS
TIMEOUT = 120.0  # seconds, for what takes two or three


class Death(BaseException):
    """As the process would die: nothing on the way may catch it."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills in another way")
def test_run_killed_again_and_again_ends_where_one_left_alone_does(tmp_path: Path) -> None:
    chance = random.Random(0)
    saved, straight = tmp_path / "run" / "saved.pt", tmp_path / "straight.pt"
    arguments = ["--batch-size", "4", "--context", "16", "--width", "16", "--steps", str(STEPS), "--save-every", "2"]
    arguments += ["--out", str(tmp_path / "curves.png"), "--save"]
    train_char_lm.main([*arguments, str(straight)])
    met, step = [], 0
    for number in range(KILLS):
        # In turn at any moment, also before the first save, and in the middle of one for certain.
        saves, pause = chance.randrange(10), chance.uniform(0, 0.03)
        met.append(kill([*arguments, str(saved), "--resume"], saved, saves, pause, in_save=number % 2 == 1))
        before, step = step, torch.load(saved, weights_only=True)["step"] if step or saved.exists() else 0
        assert step >= before
        assert {path.name for path in saved.parent.glob("*")} <= {"saved.pt", "saved.pt.partial"}
        print(f"kill {number + 1}: {'in the middle of a save' if met[-1] else 'between saves'}; whole to step {step}")
    assert sum(met) >= KILLS // 2
    train_char_lm.main([*arguments, str(saved), "--resume"])
    assert [path.name for path in saved.parent.iterdir()] == ["saved.pt"]
    assert_same_bits(torch.load(saved, weights_only=True), torch.load(straight, weights_only=True))
    print(f"{KILLS} kills, {sum(met)} in the middle of a save: after {STEPS} steps the same checkpoint, to the bit")


def kill(command: list[str], saved: Path, saves: int, pause: float, *, in_save: bool) -> bool:
    """Start the example and kill it after some saves and a pause, if wanted as soon as a save is under way.

    Returns:
        Whether one was.
    """
    half, begin, deadline = saved.with_name("saved.pt.partial"), time.time_ns(), time.monotonic() + TIMEOUT
    process = subprocess.Popen([sys.executable, train_char_lm.__file__, *command], stdout=subprocess.DEVNULL)
    try:
        seen, last = 0, modified(saved)
        while seen < saves:
            time.sleep(0.0005)
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            seen, last = seen + (modified(saved) != last), modified(saved)
        time.sleep(pause)
        while time.monotonic() < deadline:
            # Held still, so that what is seen here is what the kill meets.
            process.send_signal(signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), "it ended by itself"
            is_in_save = modified(half) > begin  # else it is what another kill has left
            if is_in_save or not in_save:
                return is_in_save
            process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    raise AssertionError("no save was seen")


def modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_save_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = tmp_path / "saved.pt", ("step",)
    checkpoint_file.save_checkpoint({"step": 1}, path)
    (tmp_path / "saved.pt.partial").write_bytes(b"half a checkpoint")
    with pytest.raises(AttributeError):
        checkpoint_file.save_checkpoint({"step": lambda: 2}, path)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, _no_space)
            with pytest.raises(OSError, match="disk"):
                checkpoint_file.save_checkpoint({"step": 2}, path)
        assert checkpoint_file.load_checkpoint(path, keys) == {"step": 1}
        assert [each.name for each in tmp_path.iterdir()] == ["saved.pt"]


def _no_space(*_: object) -> None:
    raise OSError("no space left on the disk")


def test_save_to_a_link_leaves_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "saved.pt"
    link.symlink_to(tmp_path / "elsewhere" / "real.pt")
    for step in range(2):
        checkpoint_file.save_checkpoint({"step": step}, link)
    assert link.is_symlink()
    assert checkpoint_file.load_checkpoint(tmp_path / "elsewhere" / "real.pt", ("step",)) == {"step": 1}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(8), repeat=2)))
def test_folder_of_a_checkpoint_is_whole_wherever_processes_die(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies before one of the seven calls that change files, and so does the one that resumes."""
    write_folder(tmp_path, "1")
    for text, last in (("2", first), ("3", second)):
        before = read_folder(tmp_path)
        with monkeypatch.context() as patched:
            calls = itertools.count()
            for module, name in ((os, "replace"), (shutil, "rmtree"), (checkpoint_folder, "sync_folder")):
                patched.setattr(module, name, partial(die_or_call, getattr(module, name), calls, last))
            with contextlib.suppress(Death):
                write_folder(tmp_path, text)
        assert read_folder(tmp_path) in ((before, text) if last < 7 else (text,))
    write_folder(tmp_path, "4")
    assert read_folder(tmp_path) == "4"
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def die_or_call(function: Callable[..., Any], calls: Iterator[int], last: int, *arguments: Any, **named: Any) -> None:
    if next(calls) == last:
        raise Death
    function(*arguments, **named)


def write_folder(path: Path, text: str) -> None:
    """As :func:`checkpoint_folder.save_folder`, of one file."""
    checkpoint_folder.make_partial(path)
    (path / "partial" / ".metadata").write_text(text)
    checkpoint_folder.put_in_place(path)


def read_folder(path: Path) -> str:
    folder = checkpoint_folder.folder_to_load(path)
    assert folder is not None
    return (folder / ".metadata").read_text()


def die_in_second_save(arguments: list[str]) -> None:
    """The first rank is killed once torch has written the weights of its second checkpoint, and not yet the rest."""
    saves, patch = itertools.count(1), pytest.MonkeyPatch()

    def saving(*given: Any, **named: Any) -> None:
        if next(saves) == 2 and dist.get_rank() == 0:
            patch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        save(*given, **named)

    patch.setattr(checkpoint_folder, "save", saving)
    train_here(arguments)


def test_ranks_killed_in_mid_save_go_on_to_the_same_weights(tmp_path: Path) -> None:
    arguments = [*SMALL, "--save-every", "2", "--resume", "--save"]
    straight = trained(2, *arguments, tmp_path / "straight")
    saved = tmp_path / "saved"
    with pytest.raises(AssertionError, match="rank 0: died without a word"):
        run_ranks(die_in_second_save, 2, [*arguments, str(saved)])
    assert {each.name for each in saved.iterdir()} == {"checkpoint", "partial"}
    assert len(list((saved / "partial").iterdir())) > 0
    resumed = trained(2, *arguments, saved)
    assert resumed.resumed_digest not in (None, straight.digest)
    assert resumed.digest == straight.digest
    assert {each.name for each in saved.iterdir()} == {"checkpoint"}
