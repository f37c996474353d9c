"""The update rules, by the name that groups and checkpoints hold."""

from __future__ import annotations

from stac_optimizer.rules._rule import COMMON_HYPERPARAMETERS, Group, Hyperparameter, Rule, StateTensor, StepInputs
from stac_optimizer.rules.adamw import AdamW
from stac_optimizer.rules.sign_momentum import SignMomentum

__all__ = ["RULES", "Group", "Hyperparameter", "Rule", "StateTensor", "StepInputs", "hyperparameters"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (SignMomentum(), AdamW())}


def hyperparameters() -> dict[str, Hyperparameter]:
    """Those of all rules: the keys of every group, whichever rule it runs."""
    merged = dict(COMMON_HYPERPARAMETERS)
    for rule in RULES.values():
        merged.update(rule.hyperparameters)
    return merged
