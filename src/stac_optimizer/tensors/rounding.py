"""Stochastic rounding to bfloat16, by a hash instead of a generator. Knows no rule.

Of the two neighbours of a float32 value the farther one is taken the more often the closer it comes to it, so that the
mean is right: adding 16 random bits to the 16 that bfloat16 lacks, and cutting them off, does that. The random bits are
a hash of the seed, the parameter's place, its step and the element's index. So they need no state, every path and every
resumed run finds the same, and blocks may be computed in any order. 8-bit codes are rounded by such bits too.

Reference: Revisiting BFloat16 Training (Zamirai et al.), https://arxiv.org/abs/2010.06192. The hash ends in that of
MurmurHash3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_optimizer.tensors import device_tables
from stac_optimizer.tensors.units.pieces import Piece, Unit

__all__ = ["counts", "noise_of", "noise_seeds", "round_into"]

# Odd constants as signed 32-bit integers, for torch's unsigned ones know no arithmetic: 2^32 by the golden ratio, and
# those of MurmurHash3.
SPREAD = 0x9E3779B1 - 2**32
FIRST = 0x85EBCA6B - 2**32
SECOND = 0xC2B2AE35 - 2**32


def _wrapped(number: int) -> int:
    """The signed 32-bit integer with the same lowest 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _mixed(values: Tensor) -> Tensor:
    """Hash 32-bit integers in place. Products wrap around; masks make the shifts logical ones."""
    values.bitwise_xor_((values >> 16).bitwise_and_(0xFFFF)).mul_(FIRST)
    values.bitwise_xor_((values >> 13).bitwise_and_(0x7FFFF)).mul_(SECOND)
    return values


def counts(steps: Sequence[Tensor]) -> Tensor:
    """Counts of steps as one tensor, on the device of the first."""
    return torch.stack([step.to(steps[0].device) for step in steps])


def noise_seeds(
    seed: int, positions: Sequence[int], steps: Tensor, *, kind: int = 0, offsets: Sequence[int] = ()
) -> Tensor:
    """One 32-bit integer for each parameter and step.

    Args:
        seed: of the run.
        positions: for each parameter its place among all of the run.
        steps: what :func:`counts` made. Their bits are hashed, as integers they would have to end at 2^31.
        kind: tells the tensors of one parameter apart, up to 3.
        offsets: for each parameter the index of its first element, where this rank holds a part of it; none: 0.
    """
    places = _table([4 * position + kind for position in positions], steps.device)
    noise_seed = _mixed((places * SPREAD).add_(_wrapped(seed)))
    noise_seed = _mixed(noise_seed.add_(steps.float().view(torch.int32) * SPREAD))
    if not any(offsets):
        return noise_seed
    return noise_seed + _table([_wrapped(offset * SPREAD) for offset in offsets], noise_seed.device)


def _table(values: Sequence[int], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling() or device.type == "cpu":
        return torch.tensor(values, dtype=torch.int32, device=device)
    return device_tables.integers(values, device).to(torch.int32)


def noise_of(piece: Piece, unit: Unit, noise_seed: Tensor, *, of_blocks: bool = False) -> Tensor:
    """Random int32, one for each element of a piece.

    Args:
        piece: of the unit.
        unit: holds the positions of its parameters in ``noise_seed``.
        noise_seed: what :func:`noise_seeds` made.
        of_blocks: only for the first of the last dimension, which is a block's.
    """
    like = piece.tensors.param[..., :1] if of_blocks else piece.tensors.param
    index: Tensor | int = _wrapped(piece.offset)
    for dim, (size, stride) in enumerate(zip(like.shape, piece.strides, strict=True)):
        along = torch.arange(size, dtype=torch.int32, device=like.device).mul_(_wrapped(stride))
        index = along.view(-1, *[1] * (like.ndim - dim - 1)) + index
    if unit.sizes:
        chosen = noise_seed[list(unit.members)].to(like.device)
        sizes = torch.tensor(unit.sizes, device="cpu")
        starts = (sizes.cumsum(0) - sizes).to(torch.int32)
        index = index - starts.repeat_interleave(sizes, output_size=like.numel())
        chosen = chosen.repeat_interleave(sizes, output_size=like.numel())
    else:
        chosen = noise_seed[unit.members[0]].to(like.device)
        if not isinstance(index, Tensor):
            index = torch.zeros((), dtype=torch.int32, device=like.device)
    return _noise(index, chosen)


def _noise(index: Tensor, noise_seed: Tensor) -> Tensor:
    """Random int32 for 32-bit indices of elements."""
    return _mixed(index * SPREAD + noise_seed)


def round_into(weight: Tensor, param: Tensor, noise: Tensor) -> None:
    """Round float32 values into a bfloat16 tensor: up or down, by chance, right in the mean.

    Args:
        weight: the values.
        param: the tensor.
        noise: 16 random bits for each, the highest of an int32.
    """
    bits = (weight.view(torch.int32) + (noise >> 16).bitwise_and_(0xFFFF)).bitwise_and_(~0xFFFF)
    # The sum carries some NaN over into numbers; NaN differs from itself.
    param.copy_(torch.where(weight == weight, bits.view(torch.float32), weight))  # noqa: PLR0124
