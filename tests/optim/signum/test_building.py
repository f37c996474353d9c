"""How C++ is compiled when it is first asked for: once, whoever asks, and wherever the user may write to."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from stac_optimizer.optim.signum.fused import building
from stac_optimizer.optim.signum.fused.building import load_library

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source to compile, with nothing compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def answer(source: Path, number: int) -> int:
    library = load_library(source, {"ANSWER": str(number)})
    library.answer.restype = ctypes.c_int
    result: int = library.answer()
    return result


def answers_of_processes(source: Path, count: int) -> list[str]:
    """What so many processes get, each of which asks for 8 at about the same time. They need no torch."""
    script = """
        import pathlib, runpy, sys
        load_library = runpy.run_path(sys.argv[2])["load_library"]
        print(load_library(pathlib.Path(sys.argv[1]), {"ANSWER": "8"}).answer())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(building.__file__)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [process.communicate()[0].strip() for process in running]


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "stac_optimizer").iterdir())


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The commands that make libraries from now on."""
    commands: list[Sequence[str]] = []
    run = building._run

    def noted(command: Sequence[str]) -> str:
        if "-o" in command:
            commands.append(command)
        return run(command)

    monkeypatch.setattr(building, "_run", noted)
    return commands


def test_library_is_made_once_for_each_kind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = watch(monkeypatch)
    assert [answer(source, 1), answer(source, 2), answer(source, 1)] == [1, 2, 1]
    assert len(commands) == len(kept(tmp_path)) == 2
    source.write_text(SOURCE.replace("ANSWER;", "ANSWER + 10;"))
    assert answer(source, 1) == 11
    monkeypatch.setattr(building, "_target", lambda _: ([], "of another CPU"))
    assert answer(source, 1) == 11
    assert len(commands) == len(kept(tmp_path)) == 4


def test_incomplete_library_is_made_anew(source: Path, tmp_path: Path) -> None:
    """Made by another process, for this one would find the one that it has loaded."""
    assert answers_of_processes(source, 1) == ["8"]
    (library,) = kept(tmp_path)
    library.write_bytes(b"\x7fELF")
    assert answer(source, 8) == 8
    assert library.stat().st_size > 1000


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_folder_that_others_may_write_to_is_not_trusted(source: Path, tmp_path: Path, mode: int) -> None:
    assert answers_of_processes(source, 1) == ["8"]
    (library,) = kept(tmp_path)
    library.write_bytes(b"somebody else's")
    library.parent.chmod(mode)
    assert answer(source, 8) == 8
    assert library.read_bytes() == b"somebody else's"


def test_relative_cache_folder_is_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert answer(source, 9) == 9
    assert not (tmp_path / "cache").exists()
    assert [path.suffix for path in (tmp_path / ".cache" / "stac_optimizer").iterdir()] == [".so"]


def fails() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("is_there", [True, False])
def test_where_the_user_may_not_write_it_is_made_for_this_run(
    source: Path, tmp_path: Path, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    if is_there:
        (place / "stac_optimizer").write_text("a file in the folder's place")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    assert answer(source, 3) == 3
    assert set(tmp_path.iterdir()) == before


def test_named_compiler_is_the_one_that_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = watch(monkeypatch)
    named = [*building._compiler(), "-DOTHER"]
    monkeypatch.setenv("CXX", shlex.join(named))
    assert answer(source, 4) == 4
    assert commands[0][: len(named)] == named
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler: /nonexistent/c\+\+ is not on the path"):
        answer(source, 5)


def test_complaint_of_the_compiler_is_told_and_nothing_kept(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer() { return unknown; }")
    with pytest.raises(OSError, match=r"failed: .*unknown"):
        answer(source, 6)
    assert not kept(tmp_path)


def test_compiler_that_fails_is_not_asked_twice(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = watch(monkeypatch)
    source.write_text("int answer() { return unknown; }")
    with pytest.raises(OSError, match="unknown"):
        answer(source, 6)
    assert len(commands) == 1


def test_compiler_that_knows_no_option_for_its_own_cpu(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's."""
    run = building._run

    def refuse(command: Sequence[str]) -> str:
        if "-march=native" in command:
            raise OSError("c++ failed: error: the clang compiler does not support '-march=native'")
        return run(command)

    monkeypatch.setattr(building, "_run", refuse)
    assert answer(source, 7) == 7


def test_processes_that_ask_at_once_all_get_it(source: Path, tmp_path: Path) -> None:
    """As the ranks of a run do."""
    assert answers_of_processes(source, 4) == ["8"] * 4
    assert len(kept(tmp_path)) == 1
