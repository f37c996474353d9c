"""Units of work: what is cut, packed, left whole, and that nothing is lost on the way."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from torch import Tensor

from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.cutting import buckets, units
from stac_optimizer.tensors.units.pieces import Lists, Piece
from tests.support import assert_same_bits, set_units

LARGE = 1 << 40


def numels(lists: Lists, *, numel: int | None = None) -> list[tuple[tuple[int, ...], list[int]]]:
    """For each unit the sizes that are packed in it, and the elements of each piece."""
    return [
        (unit.sizes, [piece.tensors.param.numel() for part in unit.parts for piece in part])
        for unit in units(lists, numel=numel)
    ]


def write_index(piece: Piece) -> None:
    """Write into each weight of a piece the index that the piece says it has."""
    weight = piece.tensors.param
    index = torch.tensor(piece.offset)
    for dim, (size, stride) in enumerate(zip(weight.shape, piece.strides, strict=True)):
        index = index + (torch.arange(size) * stride).view(-1, *[1] * (weight.ndim - dim - 1))
    weight.copy_(index)


def memory_order(param: Tensor) -> Tensor:
    """What :class:`Piece` calls the index of an element, for each element of a dense tensor."""
    return torch.arange(param.numel()).as_strided(param.shape, param.stride())


@torch.no_grad()
def test_large_tensors_are_cut_and_small_ones_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=15, pack=10)
    sizes = {"matrix": (6, 10), "vector": (7,), "scalar": (), "empty": (0, 3), "transposed": (4, 5), "vector2": (8,)}
    params = [torch.arange(float(math.prod(shape))).reshape(shape) for shape in sizes.values()]
    params[4] = params[4].t()
    grads = [torch.ones_like(param) for param in params]
    assert numels(Lists(params, grads)) == [((), [15, 15, 15, 15]), ((), [15, 5]), ((7, 1, 0, 8), [16])]
    assert numels(Lists(params, grads), numel=LARGE) == [((), [60]), ((), [20]), ((7, 1, 0, 8), [16])]
    for unit in units(Lists(params, grads)):
        for piece in chain.from_iterable(unit.parts):
            piece.tensors.param.add_(1)
    for param, shape in zip(params, sizes.values(), strict=True):
        assert sorted(param.flatten().tolist()) == [1.0 + i for i in range(math.prod(shape))]


@torch.no_grad()
def test_what_shares_memory_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty ones share none, however many there are."""
    set_units(monkeypatch, block=15, pack=10)
    params = [torch.ones(3), *(torch.empty(0) for _ in range(5)), torch.ones(4)]
    grads = [torch.ones_like(param) for param in params]
    assert numels(Lists(params, grads)) == [((3, 0, 0, 0, 0, 0, 4), [7])]
    params.append(params[0].view(1, 3))
    grads.append(torch.ones(1, 3))
    assert numels(Lists(params, grads)) == [((), [3]), ((), [3]), ((0, 0, 0, 0, 0, 4), [4])]


@torch.no_grad()
@pytest.mark.parametrize("numel", [None, LARGE])
def test_tensors_of_mixed_layouts_are_sliced_and_each_piece_knows_its_elements(
    numel: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_units(monkeypatch, block=20)
    channels_last = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(1, 2, 100)
    for param, other in (
        (torch.zeros(6, 10), torch.zeros(10, 6).t()),
        (channels_last, torch.zeros(2, 3, 4, 5)),
        (wide, wide),
    ):
        found = torch.full_like(param, -1)
        (unit,) = units(Lists([found], [other]), numel=numel)
        for piece in chain.from_iterable(unit.parts):
            assert piece.tensors.param.numel() <= (numel or 20)
            write_index(piece)
        assert_same_bits(found, memory_order(param).to(found.dtype))


def test_a_recorded_step_gets_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=20, pack=100)
    params = [torch.zeros(6, 10)]
    assert numels(Lists(params, params)) == [((), [60])]


@torch.no_grad()
def test_buckets_hold_all_pieces_in_lists_of_about_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, block=20)
    params = [torch.zeros(size) for size in (45, 3, 7, 0, 12, 30)]
    dealt = [[tensor.numel() for tensor in bucket.params] for bucket in buckets(Lists(params, params))]
    assert dealt == [[20], [20], [5, 3, 7, 0, 12], [20], [10]]
    assert all(sum(sizes) < 40 for sizes in dealt)
    assert list(buckets(Lists([], []))) == []


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 128), (2, 300), (5, 64), (2, 3, 70), (1, 1000)], ids=str)
@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("numel", [None, LARGE])
def test_pieces_in_codes_are_whole_blocks(
    shape: tuple[int, ...], is_contiguous: bool, numel: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is written once, with its scale and its index, whatever the layout."""
    set_units(monkeypatch, block=256)
    param = torch.zeros(shape)
    if not is_contiguous:
        param = torch.zeros(*shape, 2)[..., 0]
    columns = math.prod(shape[1:])
    blocks = -(-columns // 128)
    codes, scale = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0], blocks)
    (unit,) = units(Lists([param], [torch.zeros(shape)], [[codes]], [scale]), numel=numel)
    for piece in chain.from_iterable(unit.parts):
        write_index(piece)
        weight, _, (piece_codes,), piece_scale = piece.tensors
        assert piece_scale is not None
        rows, count, width = weight.shape
        assert piece_scale.shape == (rows, count, 1)
        assert width == 128 or (count == 1 and width == columns % 128)
        index = (
            torch.arange(rows).view(-1, 1, 1) * piece.strides[0] + torch.arange(count).view(-1, 1) * piece.strides[1]
        )
        weight.copy_(piece.offset + index + torch.arange(width) * piece.strides[2])
        piece_codes.add_(1)
        piece_scale.add_(1)
    assert_same_bits(param.contiguous(), torch.arange(float(param.numel())).view(shape))
    assert (codes == 1).all()
    assert (scale == 1).all()


def test_empty_weight_in_codes_has_no_pieces() -> None:
    """While a step is recorded neither, where each piece is an operation."""
    empty = torch.zeros(0, 1024)
    lists = Lists([empty], [empty], [[empty.to(torch.int8)]], [torch.zeros(0, 8)])
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            (unit,) = units(lists)
            assert list(chain.from_iterable(unit.parts)) == []


class Subclass(Tensor):
    """A tensor that may stand for something else than its memory."""


def memory_like(scratch: Scratch, tensor: Tensor) -> Tensor:
    memory = scratch.like(tensor)
    assert memory is not None
    return memory


def test_scratch_keeps_its_memory() -> None:
    scratch = Scratch()
    first = memory_like(scratch, torch.zeros(6, 10))
    assert first.shape == (6, 10)
    assert first.dtype == torch.float32
    smaller = memory_like(scratch, torch.zeros(59))
    assert (smaller.data_ptr(), smaller.shape) == (first.data_ptr(), (59,))
    assert memory_like(scratch, torch.zeros(61)).shape == (61,)
    assert memory_like(scratch, torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(6, 10).t(),
        torch.zeros(4, 5).as_subclass(Subclass),
    ],
    ids=["channels-last", "transposed", "subclass"],
)
def test_scratch_is_for_plain_tensors_in_rows(tensor: Tensor) -> None:
    """In another layout an operation would take several times as long, and a subclass has memory of its own."""
    scratch = Scratch()
    first, second = memory_like(scratch, tensor), memory_like(scratch, tensor)
    assert (type(first), first.stride()) == (type(tensor), tensor.stride())
    assert first.data_ptr() != second.data_ptr()
