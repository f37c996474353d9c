r"""The sign of matrices by Newton-Schulz iterations, on stacks of matrices of one shape.

Of :math:`M = U S V^\top` the sign is :math:`U V^\top`. Each iteration maps every singular value by the polynomial
:math:`a s + b s^3 + c s^5`, and needs products alone. With the usual coefficients five of them bring all that are not
tiny beside the largest to between 0.7 and 1.2, rather than to 1: nearer would take more products, and trains no better.

Reference: Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["signs_of_stack"]

# Matrices of one shape that are multiplied at once have about so many elements in all, for the sake of memory.
STACK_NUMEL = 4 * 1024 * 1024


def signs_of_stack(stack: Tensor, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype) -> Tensor:
    """The signs of matrices, in the dtype of the stack.

    Args:
        stack: (matrices, rows, columns), rows no more than columns.
        steps: how many iterations.
        coefficients: a, b and c.
        dtype: of the products.
    """
    if not stack.numel():
        return torch.zeros_like(stack)
    most = max(1, STACK_NUMEL // (stack.shape[1] * stack.shape[2]))
    return torch.cat([_signs(some, steps, coefficients, dtype) for some in stack.split(most)])


def _signs(stack: Tensor, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype) -> Tensor:
    a, b, c = coefficients
    x = _normalized(stack).to(dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.to(stack.dtype)


def _normalized(stack: Tensor) -> Tensor:
    """Matrices of Frobenius norm 1, so that no singular value is larger; zeros stay zeros.

    Divided by their largest element first, or the squares of tiny ones would underflow, and of huge ones overflow.
    """
    stack = _divided(stack, stack.abs().amax((-2, -1), keepdim=True))
    return _divided(stack, torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True))


def _divided(stack: Tensor, sizes: Tensor) -> Tensor:
    return stack / torch.where(sizes > 0, sizes, 1)
