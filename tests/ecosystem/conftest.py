"""Leaves the folder out where its packages are not installed; warnings of others are theirs, ours are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.ecosystem.pages import own_warnings

PACKAGES = ("accelerate", "deepspeed", "diffusers", "lightning", "peft", "timm", "torchtitan", "transformers")
collect_ignore_glob = [] if all(map(find_spec, PACKAGES)) else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let other packages warn as they like."""
    for item in items:
        if "/ecosystem/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def told() -> Iterator[list[str]]:
    """What this package warned of. A test that expects it clears the list."""
    with own_warnings() as messages:
        yield messages
    assert messages == []
