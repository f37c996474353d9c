"""What tests of groups share: groups as a user gives them, and values by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Signum
from stac_optimizer.rule import COMMON_HYPERPARAMETERS, Hyperparameter

__all__ = ["KEYS", "NAMES", "RULES", "argument_id", "by_role", "group_of"]

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
STRUCTURE = {"params", "param_names", "stac_role", "name", "rule", "layer_names", "layer_types"}
RULES: Mapping[str, Mapping[str, Hyperparameter]] = {
    "trunk": {**COMMON_HYPERPARAMETERS, **Signum.rule.hyperparameters},
    "cap": {**COMMON_HYPERPARAMETERS, **AdamW.rule.hyperparameters},
}
# Of each role's groups; schedulers that cycle momentum look for betas in all.
KEYS = {role: {*STRUCTURE, "betas", *known} for role, known in RULES.items()}


def group_of(role: str | None, *layers: str, **rest: Any) -> dict[str, Any]:
    """A group dict with the parameters of fresh linear layers; no role where that is None."""
    params = [(f"{layer}.{name}", param) for layer in layers for name, param in nn.Linear(2, 2).named_parameters()]
    return {"params": params, **({} if role is None else {"stac_role": role}), **rest}


def by_role(optimizer: STAC, key: str) -> dict[str, Any]:
    """A group key's value for each role whose groups have it."""
    return {group["stac_role"]: group[key] for group in optimizer.param_groups if key in group}


def argument_id(arguments: Any) -> str:
    """How a test's id shows arguments."""
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) if isinstance(arguments, dict) else ""
