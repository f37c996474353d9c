"""A library of C++ functions, compiled for the machine's CPU when it is first asked for, and kept for later runs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["load_library"]

COMPILERS = ("c++", "g++", "clang++")
# Each operation rounds once, and none is taken for finite. Without the next two, roots and comparisons would be called
# or made one by one, for flags that nobody reads. The last lets loops say that they may become vectors.
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-w",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
)  # fmt: skip


def load_library(source: Path, macros: Mapping[str, str]) -> ctypes.CDLL:
    """Compile a source, unless a run before has, and load what comes of it.

    Args:
        source: its path.
        macros: names that it leaves open, and what they stand for.

    Raises:
        OSError: there is no compiler, it finds a fault, or the library cannot be written or loaded.
    """
    compiler = _compiler()
    target, predefined = _target(compiler)
    command = [*compiler, *FLAGS, *target, *(f"-D{name}={value}" for name, value in macros.items())]
    # A folder may be shared by machines of other CPUs and compilers, which the predefined macros tell apart.
    said = "\0".join([*command, predefined, source.read_text(encoding="utf-8")])
    name = f"{source.stem}-{hashlib.sha256(said.encode()).hexdigest()[:32]}.so"
    folder = _cache_folder()
    if folder is not None and (folder / name).exists():
        with contextlib.suppress(OSError):  # one that a crash of the machine left incomplete is made anew
            return ctypes.CDLL(str(folder / name))
    # Elsewhere first, for others may be looking for it, or compiling it too. Once loaded it needs no file.
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / name
        _run([*command, str(source), "-o", str(made)])
        return ctypes.CDLL(str(made if folder is None else made.replace(folder / name)))


def _run(command: Sequence[str]) -> str:
    """What a compiler prints; an OSError with its first complaint where it fails."""
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ran.returncode:
        complaints = [line.strip() for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines()
        raise OSError(f"{command[0]} failed: {complaints[0] if complaints else f'exit status {ran.returncode}'}")
    return ran.stdout


def _target(compiler: Sequence[str]) -> tuple[list[str], str]:
    """The options for the vector instructions of this CPU, and the macros that a compiler predefines with them."""
    ask = ["-dM", "-E", "-x", "c++", os.devnull]
    try:
        return ["-march=native"], _run([*compiler, "-march=native", *ask])
    except OSError:  # Apple's compilers know no such option for their own CPUs, all of which have the same instructions
        return [], _run([*compiler, *ask])


def _compiler() -> list[str]:
    """The command of the C++ compiler: what the environment names, else the first that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(words[0]):
            return words
    raise FileNotFoundError(f"no C++ compiler: {named[0] if named else ', '.join(COMPILERS)} is not on the path")


def _cache_folder() -> Path | None:
    """Where libraries are kept; None where the user has no folder to write to."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "stac_optimizer"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return None
