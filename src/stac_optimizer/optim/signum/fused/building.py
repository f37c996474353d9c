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
# Each operation rounds once, and none is taken for finite, also where CXX asks for fast ones, which would change the
# whole process. Without the next two, roots and comparisons would be called or made one by one, for flags that nobody
# reads. The last lets loops say that they may become vectors.
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=default", "-w",
    "-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only", "-fsigned-zeros", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
)  # fmt: skip


def load_library(source: Path, macros: Mapping[str, str]) -> ctypes.CDLL:
    """Compile a source, unless a run before has, and load what comes of it.

    Args:
        source: its path.
        macros: names that it leaves open, and what they stand for.

    Raises:
        OSError: there is no compiler, it fails, or the library cannot be written or loaded.
    """
    compiler = _compiler()
    target, predefined = _target(compiler)
    command = [*compiler, *FLAGS, *target, *(f"-D{name}={value}" for name, value in macros.items()), str(source)]
    # A folder may be shared by machines of other CPUs and compilers, which the predefined macros tell apart.
    said = "\0".join([*command[:-1], predefined, source.read_text(encoding="utf-8")])
    name = f"{source.stem}-{hashlib.sha256(said.encode(errors='replace')).hexdigest()[:32]}.so"
    folder = _cache_folder()
    kept = None if folder is None else folder / name
    if kept is not None and kept.exists():
        with contextlib.suppress(OSError):
            return _loaded(kept)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / name
        _run([*command, "-o", str(made)])
        if kept is not None:
            with contextlib.suppress(OSError):  # where nothing may be written, or executed
                _keep(made, kept)
                return _loaded(kept)
        return ctypes.CDLL(str(made))


def _keep(made: Path, kept: Path) -> None:
    """Put a library among those that are kept, where no other process has meanwhile, and loaded it."""
    with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as beside:
        copy = Path(beside) / kept.name
        shutil.copy(made, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())  # whole, before it has its name
        if not kept.exists():
            copy.replace(kept)


def _loaded(kept: Path) -> ctypes.CDLL:
    """Load a library that is kept; one that cannot be loaded is not kept."""
    try:
        return ctypes.CDLL(str(kept))
    except OSError:
        kept.unlink(missing_ok=True)
        raise


def _run(command: Sequence[str]) -> str:
    """What a compiler prints; an OSError with its first complaint where it fails."""
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    complaints = ran.stderr.decode(errors="replace").splitlines()
    if ran.returncode:
        first = [line.strip() for line in complaints if "error" in line] or complaints
        raise OSError(f"{command[0]} failed: {first[0] if first else f'exit status {ran.returncode}'}")
    return ran.stdout.decode(errors="replace")


def _target(compiler: Sequence[str]) -> tuple[list[str], str]:
    """The options for the vector instructions of this CPU, and the macros that a compiler predefines with them."""
    ask = ["-dM", "-E", "-x", "c++", os.devnull]
    try:
        return ["-march=native"], _run([*compiler, "-march=native", *ask])
    except OSError:  # Apple's compilers know no such option for their own CPUs, all of which have the same instructions
        return [], _run([*compiler, *ask])


def _compiler() -> list[str]:
    """The command of the C++ compiler: what the environment names, else the first that is there."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']!r} is no command: {error}") from error
    for words in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(words[0]):
            return words
    raise FileNotFoundError(f"no C++ compiler: {named[0] if named else ', '.join(COMPILERS)} is not on the path")


def _cache_folder() -> Path | None:
    """Where libraries are kept; None where the user has no such folder, or others may write to it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "stac_optimizer"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError, ValueError):
        return None
    is_own = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return folder if is_own and folder.is_absolute() else None
