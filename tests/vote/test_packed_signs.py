"""Signs as bits, and majorities of them, against arithmetic on the numbers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stac_optimizer.distributed import packed_signs

SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38])


def voted(values: Tensor, planes: int) -> Tensor:
    """The majority of rows of numbers, by way of bits."""
    votes = torch.zeros(len(values), planes, packed_signs.words_for(values.shape[1]), dtype=torch.int64)
    for row, vote in zip(values, votes, strict=True):
        packed_signs.pack_(row, vote)
    return packed_signs.unpack(packed_signs.majority(votes), values.shape[1], values.dtype)


@given(
    voters=st.integers(1, 20),
    numel=st.one_of(st.integers(1, 300), st.just(70_000)),
    planes=st.integers(1, 2),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_majority_is_the_sign_of_the_sum_of_signs(
    voters: int, numel: int, planes: int, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(voters, numel, generator=generator)
    values[torch.rand(voters, numel, generator=generator) < zeros] = 0
    signs = values.sign() if planes == 2 else torch.where(values >= 0, 1.0, -1.0)
    assert torch.equal(voted(values, planes), signs.sum(0).sign())


@pytest.mark.parametrize("voters", [1, 2, 63, 64, 127, 128, 300])
def test_counts_do_not_overflow(voters: int) -> None:
    values = torch.ones(voters, 3)
    values[: voters // 2, 1] = -1
    values[:, 2] = -1
    assert voted(values, 2).tolist() == [1.0, float(voters % 2), -1.0]


def test_special_values_have_their_signs_and_nan_abstains() -> None:
    assert voted(SPECIAL[None], 2).tolist() == [0.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 1.0]
    assert voted(SPECIAL[None], 1).tolist()[3:5] == [1.0, 1.0]
    others = torch.ones(2, len(SPECIAL))
    assert torch.equal(voted(torch.cat([SPECIAL[None], others]), 2), torch.ones(len(SPECIAL)))


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
def test_bits_beyond_the_last_element_stay_out_of_what_follows(numel: int) -> None:
    words = packed_signs.words_for(numel)
    planes = torch.zeros(2, words + 1, dtype=torch.int64)
    packed_signs.pack_(-torch.ones(numel), planes[:, :words])
    assert planes[:, -1].tolist() == [0, 0]
    assert torch.equal(packed_signs.unpack(planes[:, :words], numel, torch.float32), -torch.ones(numel))
