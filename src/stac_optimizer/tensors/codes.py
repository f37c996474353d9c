r"""Block-wise 8-bit codes of gradient averages. Knows no rule.

A tensor counts as a matrix, its first dimension the rows, and each row is cut into blocks of 128 elements, the last
one maybe shorter, so that a shard of whole rows has whole blocks. A block has one float32 scale, its largest magnitude,
and for each element :math:`m` the code

.. math::
    m \approx s \, c |c| / 127^2, \qquad |c| \in \{l, l + 1\}, \qquad l = \lfloor 127 \sqrt{|m| / s} \rfloor

Spacing the codes by the square root keeps elements a thousand times smaller than their block's largest apart from
zero, where evenly spaced codes lose them below one in 254. A block that holds NaN or infinity gets an infinite scale
and zero codes, which decode to NaN: the fault shows, in the whole block.

Note [Codes by chance]
Of the two levels around an average one is taken by chance, so that the mean is right. To the nearest, an average whose
changes are less than half of the spacing would keep its code, and its sign, for ever: at momentum 0.9 from a hundredth
of the block's largest on. The random number of an element is that of its block, its bits flipped by those of the
element's place: of a block's 128 numbers one falls into each 128th part of [0, 1), so that their errors nearly cancel,
and to make one costs two operations.

Note [Cheap operations]. On the CPU torch runs ``where``, ``trunc``, and what takes or gives booleans, element by
element, 5 to 40 times as slowly as the operations here; and memory fresh from the system costs several times what an
operation takes, so they are in place where they can be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.torch_private import without_modes

__all__ = [
    "BLOCK",
    "CHANCE_PARTS",
    "can_be_coded",
    "decode",
    "decode_matrix",
    "encode_",
    "encode_matrix_",
    "in_blocks",
    "matrix_shape",
    "scales_shape",
]

BLOCK = 128
# Rows shorter than this keep their dtype: the scale would cost as much as it saves, and such tensors (biases, norms,
# depthwise kernels) are a small share of a model.
LEAST_COLUMNS = 64
# Whole numbers, for torch.compile takes those for constants, and hands over fractions anew with every call.
LEVELS = 127**2
# Below it the quotient of LEVELS and scale could overflow; averages that small become zero.
LEAST_SCALE = 1e-30
# Square roots round differently on different paths, all of them to within one part in so many. Triton's kernel alone
# needs it: there roots may be approximations.
ROOT_PARTS = 2**15
# Random numbers are odd multiples of one part in so many. So the least is well beyond what roots leave open, their
# products with odd numbers up to 255 are exact, and rarer chances are none.
CHANCE_PARTS = 2**13
# An odd number by which places spread over a block, and what remains of the bits of a random number beside theirs.
PLACES, REST_BITS = 79, 6
# The bits of 1.0 in float32, and where those of 1 / CHANCE_PARTS stand behind it.
ONE_BITS, CHANCE_BITS = 127 << 23, (1 << 23) // CHANCE_PARTS


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    return tensor.shape[0] if tensor.ndim else 1, math.prod(tensor.shape[1:])


def can_be_coded(param: Tensor) -> bool:
    """Whether averages of this parameter can be held in codes: not those of float64, complex or short rows."""
    is_single = param.is_floating_point() and param.dtype != torch.float64
    return is_single and param.ndim > 1 and matrix_shape(param)[1] >= LEAST_COLUMNS


def scales_shape(param: Tensor) -> torch.Size:
    """For each row of a parameter the number of its blocks, 0 where it cannot be coded."""
    rows, columns = matrix_shape(param)
    blocks = -(-columns // BLOCK) if can_be_coded(param) else 0
    return torch.Size((rows, blocks))


def decode(codes: Tensor, scale: Tensor, scratch: Scratch | None = None) -> Tensor:
    """The averages of blocks, the last dimension a block's, in float32.

    Args:
        codes: of :func:`encode_`.
        scale: one for each block.
        scratch: for temporaries and, in its place 3, the averages; None to allocate.
    """
    held = None if scratch is None else scratch.like(codes, 3, torch.float32)
    levels = codes.float() if held is None else held.copy_(codes)
    magnitude = torch.abs(levels, out=None if scratch is None else scratch.like(levels))
    return levels.mul_(magnitude).mul_(scale * (1 / LEVELS))


def encode_(
    average: Tensor, codes: Tensor, scale: Tensor, noise: Tensor | None, scratch: Scratch | None = None
) -> None:
    """Store float32 averages of blocks, the last dimension a block's, as codes and scales (Note [Cheap operations]).

    Args:
        average: the averages.
        codes: int8, of the same shape.
        scale: one for each block.
        noise: 12 random bits for each block, the lowest of an int32 (Note [Codes by chance]); None to take the nearer
            level, for what is encoded once and not step by step.
        scratch: for temporaries, in its places 0 to 2; None to allocate.
    """
    held = [None if scratch is None else scratch.like(average, place) for place in range(3)]
    squares = torch.abs(average, out=held[0])
    largest = squares.amax(-1, keepdim=True).nan_to_num_(math.inf, math.inf)
    scale.copy_(largest)
    # Tensor by tensor: a number by a tensor would be computed as a product with the reciprocal, and round twice.
    most = torch.full_like(largest, LEVELS)
    squares.mul_(most / torch.threshold(largest, LEAST_SCALE, math.inf))  # by 0 where the scale cannot be used
    # What follows is exact: all numbers have few digits. So close to a level that roots are rounded to it, no chance
    # raises that one, and every chance the one below: either will do as the start.
    levels = _roots(squares, held[1]).floor_()
    above = squares.addcmul_(levels, levels, value=-1)
    # Whether (2 * levels + 1) * chance is less, as 1 and 0; NaN is not more.
    if noise is None:
        above.sub_(levels).gt_(0.5)
    else:
        chances = _chances(noise, average.shape[-1], held[2])
        above.addcmul_(levels, chances, value=-2).gt_(chances)
    codes.copy_(levels.add_(above).copysign_(average))


def in_blocks(matrix: Tensor) -> Tensor:
    """A tensor seen as a matrix, its rows cut into blocks, the last of each filled up with zeros."""
    rows, columns = matrix_shape(matrix)
    padded: Tensor = functional.pad(matrix.reshape(rows, columns), (0, -columns % BLOCK))
    blocks: Tensor = padded.unflatten(1, (-1, BLOCK))
    return blocks


def decode_matrix(codes: Tensor, scale: Tensor) -> Tensor:
    """The averages of a whole matrix, in float32."""
    columns = matrix_shape(codes)[1]
    return decode(in_blocks(codes), scale.unsqueeze(-1)).flatten(1)[:, :columns].reshape(codes.shape)


def encode_matrix_(blocks: Tensor, codes: Tensor, scale: Tensor, noise: Tensor | None) -> None:
    """Store the averages of a whole matrix, as :func:`in_blocks` gives them, as codes and scales."""
    coded, scales = torch.empty_like(blocks, dtype=torch.int8), scale.unsqueeze(-1)
    encode_(blocks, coded, scales, noise)
    codes.copy_(coded.flatten(1)[:, : matrix_shape(codes)[1]].reshape(codes.shape))


def _roots(squares: Tensor, out: Tensor | None) -> Tensor:
    """Square roots, and zeros for NaN."""
    if torch.compiler.is_compiling():
        return torch.where(squares == squares, squares.sqrt(), 0.0)  # noqa: PLR0124 - NaN differs from itself
    # Not by sqrt: MKL's takes five times as long for zeros, which embeddings are full of.
    return torch.rsqrt(squares, out=out).mul_(squares).nan_to_num_(0.0)


def _chances(noise: Tensor, width: int, out: Tensor | None) -> Tensor:
    """Random odd multiples of 1 / CHANCE_PARTS below 1 for the elements of blocks, from the numbers of the blocks."""
    # Inductor would make the range in its innermost loop, number by number.
    is_held = noise.is_cpu and (torch.compiler.is_compiling() or has_data(noise))
    places = PLACE_BITS if is_held else _place_bits(noise.device)
    drawn = noise.bitwise_and(CHANCE_PARTS // 2 - 1).mul_(2 * CHANCE_BITS)
    bits = torch.bitwise_xor(drawn, places[:width], out=None if out is None else out.view(torch.int32))
    return bits.view(torch.float32).sub_(1)


def _place_bits(device: torch.device) -> Tensor:
    """For each place of a block the bits by which its random number differs from its block's, and those of all.

    As bits of float32 numbers from 1 to 2: no conversion is needed.
    """
    places = torch.arange(BLOCK, dtype=torch.int32, device=device).mul_(PLACES).bitwise_and_(BLOCK - 1)
    return places.mul_(2**REST_BITS).bitwise_or_(1).mul_(CHANCE_BITS).bitwise_or_(ONE_BITS)


with without_modes(), torch.inference_mode(False):  # whatever this is imported in
    PLACE_BITS = _place_bits(torch.device("cpu"))
