"""Ranks whose gradients are equal have nothing to vote on, which the first step says."""

from __future__ import annotations

import warnings

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_ranks
from tests.support import seeded_loss, small_model
from tests.voting import seed_of, voting

EQUAL = "are the same on all of them, so the vote decides nothing"


def _warnings_of(kind: str) -> list[str]:
    """Of four steps; rank by rank other data, but for one kind."""
    model: nn.Module = small_model()
    wrapped = model if kind in ("plain", "same-data") else DistributedDataParallel(model)
    optimizer = voting(wrapped if kind == "built-of-the-wrapped" else model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()  # without gradients, it tells nothing
        for step in range(4):
            optimizer.zero_grad()
            seeded_loss(wrapped, step if kind == "same-data" else seed_of(step)).backward()
            optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("kind", "warns"),
    [("plain", False), ("built-of-the-wrapped", False), ("built-before-it-was-wrapped", True), ("same-data", True)],
)
def test_ranks_with_equal_gradients_warn_once(kind: str, warns: bool) -> None:
    for messages in run_ranks(_warnings_of, 2, kind):
        assert [EQUAL in message for message in messages] == [True] * warns
