"""Averages of gradients and of their squares, as Adam and its relatives keep them, on lists of tensors.

A product and its sum are two operations each: as one they may round once or twice, by the length of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import has_data

__all__ = [
    "Factors",
    "add_scaled_",
    "assign_",
    "average_",
    "average_squares_",
    "bias_corrections",
    "denominators",
    "descend_",
    "known_counts",
    "largest",
]

Factors: TypeAlias = list[float] | list[Tensor]
"""A number for each tensor of a list; tensors where the host cannot know the counters."""


def assign_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """In place t ← x, also where it is recorded, which the call for lists is not."""
    if torch.is_grad_enabled():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    else:
        torch._foreach_copy_(list(tensors), list(values))


def average_(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """In place m ← β · m + (1 − β) · x."""
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, torch._foreach_mul(values, 1 - beta))


def average_squares_(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """In place v ← β · v + (1 − β) · x²."""
    squares = torch._foreach_mul(values, values)
    torch._foreach_mul_(squares, 1 - beta)
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, squares)


def add_scaled_(tensors: list[Tensor], values: list[Tensor], factor: float | Tensor | Factors) -> None:
    """In place t ← t + factor · x."""
    torch._foreach_add_(tensors, torch._foreach_mul(values, factor))


def bias_corrections(steps: Sequence[Tensor], beta: float) -> Factors:
    """1 − β^t, by which an average that began at 0 is divided; without cancellation for β near 1."""
    if not beta:
        return [1.0] * len(steps)
    counts = known_counts(steps)
    if counts is None:
        return [-torch.expm1(step * math.log(beta)) for step in steps]
    return [-math.expm1(count * math.log(beta)) for count in counts]


def known_counts(steps: Sequence[Tensor]) -> list[float] | None:
    """The steps taken, the present one among them; None where reading them would wait, or there is nothing to read."""
    if torch.compiler.is_compiling() or not all(step.is_cpu and has_data(step) for step in steps):
        return None
    return [step.item() for step in steps]


def largest(seen: list[Tensor] | None, values: list[Tensor]) -> list[Tensor]:
    """AMSGrad's: the largest values seen so far, kept in place, these among them; where none are kept, these."""
    if seen is None:
        return values
    torch._foreach_maximum_(seen, values)
    return seen


def descend_(
    params: list[Tensor], directions: list[Tensor], lr: float | Tensor, corrections: Factors | None = None
) -> None:
    """In place p ← p − lr / correction · u; the directions are written to."""
    rates: Any = lr if corrections is None else [lr / correction for correction in corrections]
    torch._foreach_mul_(directions, rates)
    torch._foreach_sub_(params, directions)


def denominators(squares: list[Tensor], corrections: Factors, eps: float) -> list[Tensor]:
    """√(v / correction) + ε."""
    result = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(result, [correction**0.5 for correction in corrections])
    torch._foreach_add_(result, eps)
    return result
