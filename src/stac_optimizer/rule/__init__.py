"""What a rule is: the mathematics of one update, with its hyper-parameters, its state, and what is done around it."""

from __future__ import annotations

from stac_optimizer.rule.contract import Rule
from stac_optimizer.rule.execution.wholes import Wholes
from stac_optimizer.rule.hyperparameters import COMMON_HYPERPARAMETERS, Flags, Group, Hyperparameter
from stac_optimizer.rule.inputs import StateLists, StepInputs, TensorList
from stac_optimizer.rule.state import COUNTER, StateTensor

__all__ = [
    "COMMON_HYPERPARAMETERS",
    "COUNTER",
    "Flags",
    "Group",
    "Hyperparameter",
    "Rule",
    "StateLists",
    "StateTensor",
    "StepInputs",
    "TensorList",
    "Wholes",
]
