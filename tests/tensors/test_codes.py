"""Block-wise 8-bit codes: against the equation of their docstring, at its ends, and where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from stac_optimizer.tensors.codes import (
    BLOCK,
    CHANCE_PARTS,
    LEAST_SCALE,
    can_be_coded,
    decode,
    encode_,
    matrix_shape,
    scales_shape,
)
from tests import reference
from tests.support import assert_same_bits

# The level of an element, up to 127, goes through three roundings of float32: this close to a tie it may be either.
NEAR_TIE = 3 * 127 * 2.0**-24
# Between levels, in parts of their distance, which the square tells twice as well as its root.
NEAR_CHANCE = 4 * NEAR_TIE


def encoded(average: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks, the last dimension a block's."""
    codes = torch.full(average.shape, 99, dtype=torch.int8)
    scale = torch.full((*average.shape[:-1], 1), torch.nan)
    encode_(average.clone(), codes, scale, noise)
    return codes, scale


def noise_for(blocks: int, *, seed: int = 0) -> Tensor:
    """A random int32 for each block."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (blocks, 1), generator=generator, dtype=torch.int32)


def chances_of(noise: Tensor, width: int) -> reference.Array:
    """In integers: twelve bits of the block's number, the first seven flipped by the place, as the middle of a part."""
    place = np.arange(width) * 79 % 128
    drawn = (noise.numpy().astype(np.int64) & 0xFFF) ^ (place << 5)
    chances: reference.Array = (2 * drawn + 1) / 2**13
    return chances


def round_trip(average: Tensor) -> Tensor:
    return decode(*encoded(average))


def averages(blocks: int, width: int, *, seed: int = 0) -> Tensor:
    """Blocks of all magnitudes, as gradients of different layers have, with elements from large to lost beside them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(blocks, width, generator=generator) ** 3
    return values * 10 ** torch.empty(blocks, 1).uniform_(-12, 12, generator=generator)


def as_array(tensor: Tensor) -> reference.Array:
    array: reference.Array = tensor.double().numpy()
    return array


@pytest.mark.parametrize("width", [128, 64, 1])
def test_codes_are_the_rounded_levels_of_the_equation(width: int) -> None:
    average = averages(2000, width)
    _, scale = encoded(average)
    scales = reference.block_scales(as_array(average))
    assert np.array_equal(as_array(scale), scales)
    exact = reference.exact_levels(as_array(average), scales)
    for noise in (None, noise_for(2000)):
        codes, _ = encoded(average, noise)
        chances = 0.5 if noise is None else chances_of(noise, width)
        near = [reference.rounded_levels(exact, chances + shift) for shift in (-NEAR_CHANCE, NEAR_CHANCE)]
        # So close below a level there is no chance to stay under it.
        near[1] = np.where(np.ceil(exact) - exact < NEAR_TIE, np.ceil(exact), near[1])
        levels = np.abs(as_array(codes))
        assert ((levels == near[0]) | (levels == near[1])).all()
        assert (near[0] != near[1]).mean() < 4 * NEAR_CHANCE  # were levels evenly spread, twice NEAR_CHANCE
        assert (np.sign(as_array(codes)) * np.sign(as_array(average)) >= 0).all()


def test_chances_are_compared_exactly() -> None:
    """With 127^2 as the largest of a block squares are the averages themselves: exact on every level and path."""
    levels = torch.arange(127.0)
    noise = torch.tensor([0x12345])
    chances = torch.from_numpy(chances_of(noise.view(1, 1).int(), 127)[0]).float()
    at_chance = levels**2 + chances * (2 * levels + 1)
    most = torch.tensor([127.0**2])
    # Sums of 27 bits: what the chance is compared with is the rounded one.
    is_above = (at_chance.double() - levels.double() ** 2) / (2 * levels.double() + 1) > chances
    codes, _ = encoded(torch.cat([at_chance, most])[None], noise.view(1, 1).int())
    assert codes[0, :127].tolist() == (levels + is_above).int().tolist()
    below, _ = encoded(torch.cat([torch.nextafter(at_chance, levels**2), most])[None], noise.view(1, 1).int())
    assert (below[0, :127] <= codes[0, :127]).all()
    whole, _ = encoded(torch.cat([levels**2, most])[None], torch.full((1, 1), -1, dtype=torch.int32))
    assert whole[0].tolist() == list(range(128))


def test_next_to_a_level_no_chance_tells_on_which_side_a_root_was_rounded() -> None:
    """So levels may be found by any operation that is nearly right."""
    levels = torch.arange(128.0)
    every_chance = torch.arange(CHANCE_PARTS // 2, dtype=torch.int32).view(-1, 1)
    for towards in (0.0, 128.0**2):
        squares = levels**2
        for _ in range(3):
            squares[-1] = 127.0**2
            codes, _ = encoded(squares.expand(len(every_chance), -1), every_chance)
            assert (codes == levels).all()
            squares = torch.nextafter(squares, torch.tensor(towards))


def test_decoded_averages_are_within_a_level() -> None:
    average = averages(2000, 128, seed=1)
    for noise in (None, noise_for(2000)):
        codes, scale = encoded(average, noise)
        actual, scales = as_array(decode(codes, scale)), as_array(scale)
        # Three roundings of float32: of 1 / 127^2, of its product with the scale, and of that with the code.
        np.testing.assert_allclose(actual, reference.decoded(as_array(codes), scales), rtol=3 * 2.0**-24)
        spacing = scales * (2 * np.floor(reference.exact_levels(as_array(average), scales)) + 1) / 127**2
        error = np.abs(actual - as_array(average)) / np.where(spacing, spacing, 1)
        assert error.max() <= (0.5 if noise is None else 1) + NEAR_CHANCE


def test_codes_by_chance_are_right_in_the_mean() -> None:
    """Over all numbers of a block, to the part that chances go by."""
    average = averages(1, 128, seed=3) ** 3
    every = torch.arange(2**12, dtype=torch.int32).view(-1, 1)
    codes, scale = encoded(average.expand(2**12, 128).contiguous(), every)
    mean = as_array(decode(codes, scale)).mean(0)
    scales = as_array(scale[:1])
    spacing = (scales * (2 * np.floor(reference.exact_levels(as_array(average), scales)) + 1) / 127**2)[0]
    assert np.abs(mean - as_array(average)[0]).max() > 0
    assert (np.abs(mean - as_array(average)[0]) <= spacing * (1 / CHANCE_PARTS + NEAR_CHANCE)).all()


@given(st.integers(-(2**31), 2**31 - 1))
def test_numbers_of_a_block_are_spread_evenly(number: int) -> None:
    chances = chances_of(torch.tensor([[number]], dtype=torch.int32), BLOCK)
    assert sorted((chances * BLOCK).astype(int).flatten().tolist()) == list(range(BLOCK))


def test_zeros_stay_and_the_largest_of_a_block_is_kept() -> None:
    average = averages(5000, 128, seed=2)
    average[:, ::3] = 0.0
    average[0] = -0.0
    codes, scale = encoded(average, noise_for(5000))
    decoded = decode(codes, scale)
    assert not decoded[:, ::3].any()
    assert not decoded[0].any()
    largest = average.abs().argmax(1, keepdim=True)[1:]
    assert (codes[1:].gather(1, largest).abs() == 127).all()
    torch.testing.assert_close(decoded[1:].gather(1, largest), average[1:].gather(1, largest), rtol=2.0**-23, atol=0)


def test_an_element_a_thousand_times_smaller_than_the_largest_is_told_from_zero() -> None:
    """Evenly spaced codes would lose it."""
    decoded = round_trip(torch.tensor([1.0, 1e-3, -1e-3, 1e-5]))
    assert decoded[1] == -decoded[2]
    assert decoded[1].item() == pytest.approx(1e-3, rel=0.15)
    assert decoded[3] == 0


@pytest.mark.parametrize("largest", [1e-30, 1e-31, 1e-38, 1e-42, 0.0])
def test_averages_too_small_for_a_scale_become_zeros(largest: float) -> None:
    average = torch.tensor([largest, -largest / 2, 0.0])
    codes, scale = encoded(average)
    assert not codes.any()
    assert scale.item() == torch.tensor(largest).item()
    assert not decode(codes, scale).any()


@pytest.mark.parametrize("largest", [2e-30, 3e38])
def test_averages_at_both_ends_of_the_range_are_held(largest: float) -> None:
    average = torch.tensor([largest, -largest / 4, 0.0])
    torch.testing.assert_close(round_trip(average), average, rtol=0.02, atol=0)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 77, 127])
def test_block_with_a_value_that_is_not_finite_decodes_to_nan_and_its_neighbours_stay(value: float, place: int) -> None:
    average = averages(3, 128).view(1, 3, 128)
    expected = round_trip(average)
    average[0, 1, place] = value
    codes, scale = encoded(average)
    decoded = decode(codes, scale)
    assert not codes[0, 1].any()
    assert scale[0, 1].item() == torch.inf
    assert decoded[0, 1].isnan().all()
    assert_same_bits(decoded[:, ::2], expected[:, ::2])
    assert round_trip(decoded)[0, 1].isnan().all()


@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=130),
    st.sampled_from([1.0, 2.0**-60, 2.0**-100]),
)
@example([1.0, -0.25, 0.1], 1.0)
def test_averages_once_in_codes_keep_them(values: list[float], scale: float) -> None:
    """What is encoded again moves by no more than the scale does, whose two roundings may come out otherwise."""
    values = values[:BLOCK]
    codes, scales = encoded(torch.tensor([values]) * scale, noise_for(1))
    once = decode(codes, scales)
    again, new_scales = encoded(once, noise_for(1, seed=1))
    if scales > LEAST_SCALE * 1.01:
        assert_same_bits(again, codes)
    torch.testing.assert_close(new_scales * codes.any(), scales * codes.any(), rtol=2.0**-23, atol=0)


SHAPES = [
    # Shape, dtype, whether it can be coded, the matrix, the scales.
    ((3, 64), torch.float32, True, (3, 64), (3, 1)),
    ((3, 64), torch.bfloat16, True, (3, 64), (3, 1)),
    ((3, 64), torch.float16, True, (3, 64), (3, 1)),
    ((3, 64), torch.float64, False, (3, 64), (3, 0)),
    ((3, 64), torch.complex64, False, (3, 64), (3, 0)),
    ((3, 63), torch.float32, False, (3, 63), (3, 0)),
    ((3, 128), torch.float32, True, (3, 128), (3, 1)),
    ((3, 129), torch.float32, True, (3, 129), (3, 2)),
    ((1, 1000), torch.float32, True, (1, 1000), (1, 8)),
    ((2, 8, 4, 2), torch.float32, True, (2, 64), (2, 1)),
    ((64, 1, 3, 3), torch.float32, False, (64, 9), (64, 0)),
    ((1000,), torch.float32, False, (1000, 1), (1000, 0)),
    ((), torch.float32, False, (1, 1), (1, 0)),
    ((0, 64), torch.float32, True, (0, 64), (0, 1)),
    ((5, 0), torch.float32, False, (5, 0), (5, 0)),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "is_codable", "matrix", "scales"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in SHAPES],
)
def test_rows_of_at_least_64_single_precision_elements_are_coded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_codable: bool,
    matrix: tuple[int, int],
    scales: tuple[int, int],
) -> None:
    param = torch.zeros(shape, dtype=dtype)
    assert can_be_coded(param) is is_codable
    assert matrix_shape(param) == matrix
    assert tuple(scales_shape(param)) == scales


def test_integers_cannot_be_coded() -> None:
    assert not can_be_coded(torch.zeros(3, 64, dtype=torch.int32))
