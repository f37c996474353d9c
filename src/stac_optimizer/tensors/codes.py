r"""Block-wise 8-bit codes of gradient averages. Knows no rule.

A tensor counts as a matrix, its first dimension the rows, and each row is cut into blocks of 128 elements, the last
one maybe shorter, so that a shard of whole rows has whole blocks. A block has one float32 scale, its largest magnitude,
and for each element :math:`m` the code

.. math::
    c = \operatorname{round}(127 \sqrt{|m| / s}) \operatorname{sign}(m), \qquad m \approx s \, c |c| / 127^2

Spacing the codes by the square root keeps elements a thousand times smaller than their block's largest apart from
zero, where evenly spaced codes lose them below one in 254. A block that holds NaN or infinity gets an infinite scale
and zero codes, which decode to NaN: the fault shows, in the whole block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "can_be_coded",
    "decode",
    "encode_",
    "has_whole_blocks",
    "matrix_shape",
    "scales_shape",
]

BLOCK = 128
# Rows shorter than this keep their dtype: the scale would cost as much as it saves, and such tensors (biases, norms,
# depthwise kernels) are a small share of a model.
LEAST_COLUMNS = 64
LEVELS = 127.0**2
# Below it the quotient of LEVELS and scale could overflow; averages that small become zero.
LEAST_SCALE = 1e-30


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    return tensor.shape[0] if tensor.ndim else 1, math.prod(tensor.shape[1:])


def can_be_coded(param: Tensor) -> bool:
    """Whether averages of this parameter can be held in codes: not those of float64, complex or short rows."""
    is_single = param.is_floating_point() and param.dtype != torch.float64
    return is_single and param.ndim > 1 and matrix_shape(param)[1] >= LEAST_COLUMNS


def has_whole_blocks(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of these is one whole block after another."""
    return matrix_shape(tensors[0])[1] % BLOCK == 0 and all(map(Tensor.is_contiguous, tensors))


def scales_shape(param: Tensor) -> torch.Size:
    """For each row of a parameter the number of its blocks, 0 where it cannot be coded."""
    rows, columns = matrix_shape(param)
    blocks = -(-columns // BLOCK) if can_be_coded(param) else 0
    return torch.Size((rows, blocks))


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The averages of blocks, the last dimension a block's, in float32."""
    levels = codes.float()
    return (levels * levels.abs()).mul_(scale * (1 / LEVELS))


def encode_(average: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Store float32 averages of blocks, the last dimension a block's, as codes and scales."""
    magnitude = average.abs()
    largest = magnitude.amax(-1, keepdim=True)
    largest = torch.where(largest < math.inf, largest, math.inf)  # NaN is not
    is_usable = (largest > LEAST_SCALE) & (largest < math.inf)
    # Tensor by tensor: a number by a tensor would be computed as a product with the reciprocal, and round twice.
    factor = torch.where(is_usable, torch.full_like(largest, LEVELS) / largest, 0.0)
    squares = magnitude.mul_(factor)
    squares = torch.where(squares < 2 * LEVELS, squares, 0.0)  # NaN is not
    # Square roots round differently on different paths. So the level is at first the right one or the one below it, and
    # then compared exactly, for squares of half levels have few digits.
    levels = squares.sqrt().add_(0.499).trunc_()
    levels.add_(squares >= (levels + 0.5).square_())
    codes.copy_(levels.copysign_(average))
    scale.copy_(largest)
