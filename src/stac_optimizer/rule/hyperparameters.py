"""Group keys that rules read: what one is, and those that all rules have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from stac_optimizer.validation import Checker, boolean, count, learning_rate, non_negative, optional_boolean

__all__ = ["COMMON_HYPERPARAMETERS", "EXCLUDED_FLAGS", "Flags", "Group", "Hyperparameter"]

Group = Mapping[str, Any]
"""One parameter group: hyper-parameters by name, plain Python values, lr possibly a tensor."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """A group key that a rule reads.

    Args:
        default: its value where nobody gives one.
        check: returns a given value as plain Python, or raises.
    """

    default: Any
    check: Checker


class Flags(TypedDict, total=False):
    """What every optimizer of this package takes besides the hyper-parameters of its rule.

    ``maximize``: ascend instead of descend. ``error_if_nonfinite``: a NaN or infinite gradient raises before anything
    changes. ``foreach``: update lists of tensors at once; None where torch would. ``fused``: one pass over memory,
    where the rule has such a path. ``capturable``: counters on the device, for CUDA graphs. ``differentiable``: record
    the step for autograd. ``stochastic_rounding``, ``rounding_seed``: round bfloat16 weights by chance, right in the
    mean; the seed is the same on every rank. :class:`stac_optimizer.STAC` describes each at length.
    """

    maximize: bool
    error_if_nonfinite: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    stochastic_rounding: bool
    rounding_seed: int


COMMON_HYPERPARAMETERS: Mapping[str, Hyperparameter] = {
    "lr": Hyperparameter(default=1e-3, check=learning_rate),
    "weight_decay": Hyperparameter(default=0.0, check=non_negative),
    "maximize": Hyperparameter(default=False, check=boolean),
    "error_if_nonfinite": Hyperparameter(default=False, check=boolean),
    "foreach": Hyperparameter(default=None, check=optional_boolean),
    "fused": Hyperparameter(default=None, check=optional_boolean),
    "capturable": Hyperparameter(default=False, check=boolean),
    "differentiable": Hyperparameter(default=False, check=boolean),
    "stochastic_rounding": Hyperparameter(default=False, check=boolean),
    "rounding_seed": Hyperparameter(default=0, check=count),
}
"""Group keys that every rule has."""

# A rounded step is flat in lr and weight, so there is nothing to differentiate.
EXCLUDED_FLAGS = (
    ("fused", "foreach"),
    ("fused", "differentiable"),
    ("foreach", "differentiable"),
    ("stochastic_rounding", "differentiable"),
)
