"""Rows of the table of rules for those that go by trust ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stac_optimizer.optim import LAMB, LARS, RaLars
from stac_optimizer.optimizer import RuleOptimizer
from tests.optim.layerwise import reference
from tests.reference import Result
from tests.rule_case import DTYPES, PATHS, RuleCase

__all__ = ["LAYERWISE"]


def _case(
    name: str, kind: type[RuleOptimizer], of: Callable[..., Result], dtypes: tuple[torch.dtype, ...], **arguments: Any
) -> RuleCase:
    return RuleCase(
        name=name,
        kind=kind,
        arguments={"lr": 0.01, "weight_decay": 0.1, **arguments},
        reference=of,
        paths={path: PATHS[path] for path in ("single", "foreach")},
        agrees_by_bits=False,  # norms are sums; tests/optim/layerwise/test_layerwise.py says how near paths are
        slack=4.0,  # a rounding for each of about ten operations, and steps of several lr
        dtypes=dtypes,
        # Elsewhere decay is part of what is scaled; nesterov takes it twice.
        decays_alone=kind is LARS and "nesterov" not in arguments,
    )


# The reference sees complex vectors as matrices, which LARS treats otherwise.
REAL = tuple(dtype for dtype in DTYPES if not dtype.is_complex)
LAYERWISE = (
    _case("lars-default", LARS, reference.lars, REAL),
    _case(
        "lars-dampened", LARS, reference.lars, REAL, momentum=0.9, dampening=0.25, maximize=True, scale_clip=(0.5, 2.0)
    ),
    _case(
        "lars-nesterov",
        LARS,
        reference.lars,
        REAL,
        momentum=0.5,
        nesterov=True,
        weight_decay=0.0,
        trust_coefficient=0.5,
    ),
    _case("lamb-default", LAMB, reference.lamb, DTYPES),
    _case(
        "lamb-maximize",
        LAMB,
        reference.lamb,
        DTYPES,
        maximize=True,
        betas=(0.5, 0.9),
        eps=1e-6,
        scale_clip=None,
        weight_decay=0.0,
    ),
    _case("ralars-default", RaLars, reference.ralars, DTYPES, betas=(0.9, 0.95)),
    _case(
        "ralars-forced",
        RaLars,
        reference.ralars,
        DTYPES,
        force_adaptive_momentum=True,
        betas=(0.5, 0.9),
        eps=1e-6,
        scale_clip=(0.5, 2.0),
    ),
)
