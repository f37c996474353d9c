"""Signs as bits: 64 of them in one integer, and the majority of several voters. Knows no rule and no process group.

A vote is one plane of bits for "up", and in ternary votes a second one for "down"; where neither is set the voter
abstains. Everything works on 64-bit integers, for comparisons that make booleans cost several times as much on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["WORD", "majority", "pack_", "unpack", "words_for"]

WORD = 64
# Words of all voters that are worked on at once: half a dozen such temporaries stay in the cache of a core.
CHUNK = 32 * 1024


def _signed(number: int) -> int:
    """The signed 64-bit integer with these bits."""
    return number - 2**64 if number >= 2**63 else number


# For eight bytes in one integer, the first one lowest. A product with GATHER moves the lowest bit of byte i to bit i of
# the highest byte, and nothing carries. A byte times SPREAD is in all eight; PICK keeps bit i of byte i.
GATHER = 0x0102040810204080
SPREAD = 0x0101010101010101
PICK = _signed(0x8040201008040201)
ALMOST = 0x7F7F7F7F7F7F7F7F
LOWEST = SPREAD


def words_for(numel: int) -> int:
    """How many integers hold the bits of so many elements."""
    return -(-numel // WORD)


def pack_(values: Tensor, planes: Tensor) -> None:
    """Write the signs of a flat tensor into planes of bits.

    Args:
        values: floating-point numbers; NaN counts as zero.
        planes: 64-bit integers, one row for ternary votes' "up" and one for "down"; a single row, where zero counts as
            up, for binary ones.
    """
    signs = torch.sign(values).to(torch.int8)
    if signs.numel() % WORD:
        signs = pad(signs, (0, -signs.numel() % WORD))
    eights = signs.view(torch.int64)
    minus = (eights >> 7).bitwise_and_(LOWEST)  # -1 has all bits of its byte
    if len(planes) == 1:
        _gather_(minus.bitwise_xor_(LOWEST), planes[0])
        return
    _gather_((eights & LOWEST).bitwise_xor_(minus), planes[0])
    _gather_(minus, planes[1])


def _gather_(eights: Tensor, plane: Tensor) -> None:
    plane.view(torch.uint8).copy_(eights.mul_(GATHER).bitwise_right_shift_(WORD - 8))


def unpack(planes: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """The values 1, 0 and -1 that two planes stand for."""
    plus, minus = (_spread(plane) for plane in planes)
    return plus.bitwise_or_(minus.mul_(0xFF)).view(torch.int8)[:numel].to(dtype)


def _spread(plane: Tensor) -> Tensor:
    """Bits as bytes of 0 and 1, eight in one integer."""
    eights = plane.view(torch.uint8).to(torch.int64).mul_(SPREAD).bitwise_and_(PICK)
    return eights.add_(ALMOST).bitwise_right_shift_(7).bitwise_and_(LOWEST)


def majority(votes: Tensor) -> Tensor:
    """Where more voters say "up" than "down", and the reverse.

    Args:
        votes: voters x planes x words.

    Returns:
        Two planes; of a tie neither.
    """
    decided = votes.new_empty((2, votes.shape[-1]))
    step = max(WORD, CHUNK // len(votes))
    for start in range(0, votes.shape[-1], step):
        part = votes[..., start : start + step]
        up = part[:, 0]
        more, less = _compared(_count(up), _count(part[:, 1] if part.shape[1] > 1 else ~up))
        decided[0, start : start + step] = more
        decided[1, start : start + step] = less
    return decided


def _count(bits: Tensor) -> list[Tensor]:
    """How many voters have each bit set, as binary digits, the lowest first.

    Half of the voters are added to the other half until one sum is left, so operations are few for any number of them.
    """
    digits = [bits]
    while len(digits[0]) > 1:
        if len(digits[0]) % 2:
            digits = [torch.cat([digit, torch.zeros_like(digit[:1])]) for digit in digits]
        half = len(digits[0]) // 2
        lowest = digits[0]
        sums, carry = [lowest[:half] ^ lowest[half:]], lowest[:half] & lowest[half:]
        for digit in digits[1:]:
            left, right = digit[:half], digit[half:]
            either = left ^ right
            sums.append(either ^ carry)
            carry = (left & right) | (either & carry)
        digits = [*sums, carry]
    return [digit[0] for digit in digits]


def _compared(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where one of two binary numbers, lowest digit first, is greater, and where it is less."""
    greater, less = torch.zeros_like(left[0]), torch.zeros_like(left[0])
    for one, other in zip(left, right, strict=True):  # a higher digit overrules the lower ones
        differs = one ^ other
        greater = (greater & ~differs) | (one & differs)
        less = (less & ~differs) | (other & differs)
    return greater, less
