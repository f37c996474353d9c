r"""The sign of matrices by Newton-Schulz iterations, on stacks of matrices of one shape.

Of :math:`M = U S V^\top` the sign is :math:`U V^\top`. Each iteration maps every singular value by the polynomial
:math:`a s + b s^3 + c s^5`, and needs products alone. With the usual coefficients five of them bring all that are not
tiny beside the largest to between 0.7 and 1.2, rather than to 1: nearer would take more products, and trains no better.

Note [Iterations on the Gram matrix]
For a wide matrix X the products with X itself cost most. Since X becomes (a + b G + c G^2) X with G = X X^T, and so G
becomes (a + b G + c G^2)^2 G, several iterations can be done on G alone, and X multiplied once by the product Q of
their polynomials: the same in exact arithmetic. But an eigenvalue of G that is rounded to below 0 grows with each
iteration, twelvefold with the usual coefficients, and where singular values fall off steeply it blows up, in bfloat16
with the third. So after two, or three in more precision, X is multiplied, and G computed anew from it.

References: Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normalized", "signs_of_stack"]

# Matrices of one shape that are multiplied at once have about so many elements in all, for the sake of memory.
STACK_NUMEL = 4 * 1024 * 1024
# From so many columns a row on, iterations on the Gram matrix are fewer operations: 5 of them, for m rows and r m
# columns, take (8 r + 28) m^3, in bfloat16 (12 r + 22) m^3, in place of (20 r + 10) m^3.
LEAST_WIDTH = 2
# Iterations on one Gram matrix.
MOST_ON_GRAM, MOST_IN_BFLOAT16 = 3, 2

Coefficients = Sequence[float]


def signs_of_stack(stack: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    """The signs of matrices.

    Args:
        stack: (matrices, rows, columns), rows no more than columns; in the dtype of the products.
        steps: how many iterations.
        coefficients: a, b and c.
    """
    if not stack.numel():
        return stack
    most = max(1, STACK_NUMEL // (stack.shape[1] * stack.shape[2]))
    if stack.shape[0] <= most:
        return _signs(stack, steps, coefficients)
    return torch.cat([_signs(some, steps, coefficients) for some in stack.split(most)])


def _signs(stack: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    x = normalized(stack)
    if stack.shape[2] < LEAST_WIDTH * stack.shape[1]:
        return _on_matrices(x, steps, coefficients)
    most = MOST_IN_BFLOAT16 if x.dtype == torch.bfloat16 else MOST_ON_GRAM
    for done in range(0, steps, most):
        x = _on_gram(x, min(most, steps - done), coefficients)
    return x


def _on_matrices(x: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        x = torch.baddbmm(x, _polynomial(torch.bmm(x, x.mT), b, c), x, beta=a)
    return x


def _on_gram(x: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    """Note [Iterations on the Gram matrix]."""
    a, b, c = coefficients
    gram = torch.bmm(x, x.mT)
    product = None
    for step in range(steps):
        polynomial = _polynomial(gram, b, c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    return x if product is None else torch.bmm(product, x)


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """B G + c G^2. For c = 0 torch's product in bfloat16 forgets b on the CPU."""
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else gram * b


def normalized(stack: Tensor) -> Tensor:
    """Matrices of Frobenius norm 1, so that no singular value is larger; zeros stay zeros.

    Divided by their largest element first, or the squares of tiny ones would underflow, and of huge ones overflow.
    """
    stack = _divided(stack, stack.abs().amax((-2, -1), keepdim=True))
    wide = torch.promote_types(stack.dtype, torch.float32)
    return _divided(stack, torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=wide))


def _divided(stack: Tensor, sizes: Tensor) -> Tensor:
    return stack / torch.where(sizes > 0, sizes, 1).to(stack.dtype)
