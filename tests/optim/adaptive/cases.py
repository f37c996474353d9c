"""Rows of the table of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stac_optimizer.optim import AdaBelief, AdamP, Adan, AdEMAMix, TAdam
from stac_optimizer.optimizer import RuleOptimizer
from tests.optim.adaptive import reference
from tests.reference import Result
from tests.rule_case import DTYPES, PATHS, RuleCase

__all__ = ["ADAPTIVE"]


def _case(
    name: str, kind: type[RuleOptimizer], reference: Callable[..., Result], *, of_wholes: bool = False, **arguments: Any
) -> RuleCase:
    """A row.

    Args:
        name: of it.
        kind: the class.
        reference: its float64 reference.
        of_wholes: whether it sums up over whole parameters, by other parts on each path. What the equations do with
            those of two or more dimensions then is for real numbers alone, which the reference cannot tell from others.
        arguments: of the class.
    """
    return RuleCase(
        name=name,
        kind=kind,
        arguments={"lr": 0.01, "weight_decay": 0.1, **arguments},
        reference=reference,
        paths={"single": PATHS["single"], "foreach": PATHS["foreach"]},
        agrees_by_bits=not of_wholes,
        slack=4.0,  # a rounding for each of about ten operations
        dtypes=tuple(dtype for dtype in DTYPES if not (kind is AdamP and dtype.is_complex)),
        decays_alone=kind not in (TAdam, AdamP),  # by the gradient; less where gradient and weights are orthogonal
    )


ADAPTIVE = (
    _case("adabelief-default", AdaBelief, reference.adabelief),
    _case("adabelief-amsgrad", AdaBelief, reference.adabelief, amsgrad=True, maximize=True, betas=(0.5, 0.9), eps=1e-6),
    _case("adan-default", Adan, reference.adan),
    _case("adan-maximize", Adan, reference.adan, maximize=True, betas=(0.9, 0.5, 0.75), eps=1e-6, weight_decay=0.0),
    _case("ademamix-default", AdEMAMix, reference.ademamix),
    _case(
        "ademamix-warm-up",
        AdEMAMix,
        reference.ademamix,
        maximize=True,
        alpha=2.0,
        betas=(0.8, 0.9, 0.99),
        t_alpha_beta3=5,
    ),
    _case("ademamix-no-momentum", AdEMAMix, reference.ademamix, betas=(0.0, 0.9, 0.99), t_alpha_beta3=5, eps=1e-6),
    # Under the default eps first steps are too short to be seen.
    _case("tadam-default", TAdam, reference.tadam, of_wholes=True, eps=0.1),
    _case(
        "tadam-amsgrad",
        TAdam,
        reference.tadam,
        of_wholes=True,
        amsgrad=True,
        maximize=True,
        betas=(0.75, 0.9),
        dof=2.5,
        eps=1e-2,
    ),
    _case("adamp-default", AdamP, reference.adamp, of_wholes=True),
    _case(
        "adamp-projected",
        AdamP,
        reference.adamp,
        of_wholes=True,
        maximize=True,
        betas=(0.5, 0.9),
        delta=1.5,
        wd_ratio=0.5,
        nesterov=True,
    ),
)
