"""Rows of the table of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stac_optimizer.optim import LAdaGrad, LAdam, LRMSProp
from stac_optimizer.optimizer import RuleOptimizer
from tests.optim.laplacian import reference
from tests.reference import Result
from tests.rule_case import DTYPES, PATHS, RuleCase

__all__ = ["LAPLACIAN"]


def _case(
    name: str, kind: type[RuleOptimizer], of_class: Callable[..., Result], c2: float = 0.05, **arguments: Any
) -> RuleCase:
    """A row; with c2 large enough that without it the reference would not be met."""
    return RuleCase(
        name=name,
        kind=kind,
        arguments={"lr": 0.01, "weight_decay": 0.1, "c2": c2, **arguments},
        reference=of_class,
        paths={"single": PATHS["single"], "foreach": PATHS["foreach"]},
        slack=4.0,  # a rounding for each of about ten operations
        # Two reals for each complex number would be one field to the reference.
        dtypes=tuple(dtype for dtype in DTYPES if not dtype.is_complex),
    )


LAPLACIAN: tuple[RuleCase, ...] = (
    _case("ladam-default", LAdam, reference.ladam),
    _case(
        "ladam-update",
        LAdam,
        reference.ladam,
        mode="update_lap",
        stencil="5point",
        min_spatial_size=4,
        decoupled_weight_decay=True,
        maximize=True,
        betas=(0.5, 0.9),
        eps=1e-6,
    ),
    _case("ladam-weight", LAdam, reference.ladam, c2=0.01, mode="weight_lap", weight_decay=0.0),
    _case("ladagrad-default", LAdaGrad, reference.ladagrad, lr_decay=0.1),
    _case("lrmsprop-default", LRMSProp, reference.lrmsprop, alpha=0.75, stencil="5point"),
    _case("lrmsprop-momentum", LRMSProp, reference.lrmsprop, alpha=0.75, momentum=0.5, decoupled_weight_decay=True),
)
