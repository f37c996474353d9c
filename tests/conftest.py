"""Marks: tests that need a CUDA device are skipped where there is none. Threads: one."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

# Without a CUDA device Triton's kernels run in its interpreter. It has to know before it is imported, hence before all
# that may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What inductor has compiled for one kind of vectors, its cache would hand to a run with another.
if "ATEN_CPU_CAPABILITY" in os.environ:
    capability = os.environ["ATEN_CPU_CAPABILITY"]
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

import pytest
from hypothesis import settings

# A busy machine may take longer over an example than hypothesis allows; what is slow, no test asserts.
settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")

# The tensors here are tiny: a second thread only waits for the first, and longer where the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Whatever a test has set."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine cannot run."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
