"""How tests of rules compare runs: by bits, however a step goes about its work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer.optimizer import RuleOptimizer
from tests import reference
from tests.rule_cases import random_gradients, step_with
from tests.support import assert_same_bits, set_units

__all__ = ["STEPS", "UNITS", "Held", "as_array", "assert_equal_under_units", "assert_traced_equals_eager"]

STEPS = 7

# Blocks that cut even the test tensors, with a rest; packs of several tensors, with a rest; both; over threads.
UNITS: Mapping[str, Mapping[str, Any]] = {
    "whole": {},
    "cut": {"block": 7},
    "packed": {"pack": 1000},
    "cut-and-packed": {"block": 10, "pack": 10},
    "shared": {"block": 7, "pack": 4, "shared": True},
}

Held = tuple[Mapping[str, nn.Parameter], RuleOptimizer]


def as_array(tensor: Tensor) -> reference.Array:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    array: reference.Array = real.to(torch.float64).numpy().copy()
    return array


def run(optimizer: RuleOptimizer, params: Mapping[str, Tensor], steps: int = STEPS) -> Iterator[None]:
    """Steps with a parameter that lacks its gradient once, one frozen in mid-run, zeros, and an lr that moves."""
    for seed in range(steps):
        gradients = random_gradients(params, seed, skip={"layer.vector"} if seed == 2 else ())
        if seed >= 4:
            gradients["layer.transposed"] = None
        if seed == 5:
            gradients = {name: None if grad is None else torch.zeros_like(grad) for name, grad in gradients.items()}
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + seed)
        step_with(optimizer, params, gradients)
        yield


def assert_equal_under_units(
    expected: Held, others: Sequence[tuple[str, Mapping[str, Any], Held]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That optimizers, each under units of its own, step as the first one under the default ones of :func:`set_units`.

    Args:
        expected: parameters and their optimizer.
        others: what to call them, their units, and they.
        monkeypatch: sets the units.
    """
    params, optimizer = expected
    first, *rest = (run(held, own) for own, held in (expected, *(held for _, _, held in others)))
    for _ in range(STEPS):
        set_units(monkeypatch)
        next(first)
        for steps, (what, units, (own, other)) in zip(rest, others, strict=True):
            set_units(monkeypatch, **units)
            next(steps)
            for name, param in params.items():
                assert_same_bits(own[name], param, f"{what} {name}")
                assert_same_bits(other.state[own[name]], optimizer.state[param], f"{what} {name}")


def assert_traced_equals_eager(eager: Held, traced: Held, *, by_bits: bool = True) -> None:
    """That a step traced into a graph and functionalized gives the bits of an eager one, twice.

    Args:
        eager: parameters and their optimizer.
        traced: others, equal to them.
        by_bits: False where tracing may take operations apart, as older torch does with interpolations.
    """
    torch._dynamo.reset()
    step = torch.compile(traced[1].step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        gradients = random_gradients(eager[0], seed)
        step_with(eager[1], eager[0], gradients)
        for name, param in traced[0].items():
            param.grad = gradients[name]
        step()
    for name, param in eager[0].items():
        expected, actual = ((p, o.state[p]) for p, o in ((param, eager[1]), (traced[0][name], traced[1])))
        if by_bits:
            assert_same_bits(actual, expected, name)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
