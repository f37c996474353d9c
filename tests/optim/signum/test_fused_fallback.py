"""Where the kernel of ``fused=True`` cannot be compiled: the default path, and one warning."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stac_optimizer.optim.signum.fused import building, cpu
from tests.optim.signum.fused_runs import assert_fused_steps_alike


@pytest.fixture(autouse=True)
def _nothing_warned() -> Iterator[None]:
    """What other tests warned of may be warned of anew."""
    cpu.WARNED.clear()
    yield
    cpu.WARNED.clear()


def assert_falls_back(dtypes: tuple[torch.dtype, ...]) -> str:
    """That all dtypes step as by default, with one warning; which is returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in dtypes:
            assert_fused_steps_alike(dtype)
    messages = [str(warning.message) for warning in caught if "fused=True" in str(warning.message)]
    assert len(messages) == 1, messages
    return messages[0]


@pytest.fixture
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither in this process nor before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._kernels.cache_clear()
    yield
    cpu._kernels.cache_clear()


@pytest.mark.usefixtures("_nothing_compiled")
def test_machine_without_a_compiler_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    message = assert_falls_back((torch.float32, torch.bfloat16))
    assert "could not be compiled and loaded (no C++ compiler: c++, g++, clang++ is not on the path)" in message


# Commands in place of a compiler, and what the warning says of them.
BROKEN = {
    "raise SystemExit('error: no C++ here')": "error: no C++ here",
    "import sys; sys.stderr.buffer.write(b'error: \\xe9'); sys.exit(1)": "error: \ufffd",
    "pass": "No such file",
    # A library, but not of these functions.
    "import subprocess, sys; sys.exit(subprocess.run(['c++', *sys.argv[1:], '-Dupdate=other']).returncode)": "update",
    "import sys; '-o' in sys.argv and open(sys.argv[-1], 'w').write('no library')": "file too short",
}


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("program", BROKEN)
def test_compiler_that_fails_falls_back_with_one_warning(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first complaint is told, and nothing is left behind."""
    monkeypatch.setenv("CXX", shlex.join([sys.executable, "-c", program]))
    assert BROKEN[program] in assert_falls_back((torch.float32, torch.bfloat16))
    folder = building._cache_folder()
    assert folder is not None
    assert not list(folder.iterdir()) or "-Dupdate" in program  # which can be loaded


@pytest.mark.usefixtures("_nothing_compiled")
def test_compiler_that_is_no_command_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    assert "is no command: No closing quotation" in assert_falls_back((torch.float32,))


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("option", ["-ffast-math", "-funsafe-math-optimizations", "-fvisibility=hidden"])
def test_options_that_the_environment_adds_change_nothing(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library linked with fast mathematics would also flush subnormals, of the whole process."""
    monkeypatch.setenv("CXX", shlex.join([*building._compiler(), option]))
    assert_fused_steps_alike(torch.float32)
    assert torch.tensor(1e-40) * 0.5 > 0
