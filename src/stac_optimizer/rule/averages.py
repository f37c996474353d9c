"""How rules that keep one gradient average hold it: in the weight's dtype, another one, or 8-bit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded_by_row
from stac_optimizer.rule.common import least_change, warning_of_stuck_averages
from stac_optimizer.rule.hyperparameters import Group
from stac_optimizer.rule.state import COUNTER, StateTensor
from stac_optimizer.tensors import codes
from stac_optimizer.validation import named_dtype

__all__ = ["AVERAGE_KEYS", "can_lack_scale", "coded_problem", "state_dtype", "state_of_average", "warning_of_stuck"]

AVERAGE_KEYS = ("step", "exp_avg", "exp_avg_scale")
"""Every key that :func:`state_of_average` may declare."""

STATE_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}


def state_dtype(name: str, value: Any) -> str | None:
    """What averages are held in, by name; None for the weight's dtype."""
    return named_dtype(name, value, STATE_DTYPES)


def state_of_average(param: Tensor, group: Group) -> tuple[StateTensor, ...]:
    """The counter; with ``momentum`` the average in ``state_dtype``, in codes with its scales."""
    if not group["momentum"]:
        return (COUNTER,)
    dtype = None if param.is_complex() else STATE_DTYPES.get(group["state_dtype"])
    if dtype != torch.int8:
        return _averages(dtype, None)
    return _averages(dtype, codes.scales_shape(param)) if codes.can_be_coded(param) else _averages(None, None)


@lru_cache
def _averages(dtype: torch.dtype | None, scales: tuple[int, int] | None) -> tuple[StateTensor, ...]:
    average = StateTensor(key="exp_avg", dtype=dtype)
    if scales is None:
        return COUNTER, average
    return COUNTER, average, StateTensor(key="exp_avg_scale", shape=scales, dtype=torch.float32)


def can_lack_scale(key: str, state: Mapping[str, Tensor]) -> bool:
    """Averages that were saved as floating-point numbers stay such, where new ones would be in codes."""
    return key == "exp_avg_scale" and "exp_avg" in state and state["exp_avg"].dtype != torch.int8


def coded_problem(param: Tensor, group: Group) -> str | None:
    """Why the average of this parameter cannot be held in codes, where they are asked for, or None."""
    is_coded = group["state_dtype"] == "int8" and codes.can_be_coded(param)
    if is_coded and not is_sharded_by_row(param):
        return "is sharded within rows, and 8-bit state needs whole ones; use torch.bfloat16 as state dtype"
    return None


def warning_of_stuck(names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
    """Of averages that could never turn at this ``momentum``, and what to do; or None."""
    held = [state_of_average(param, group)[1].dtype_of(param) for param in params] if group["momentum"] else []
    kinds = ["8-bit codes" if dtype == torch.int8 else str(dtype) for dtype in held]
    changes = [1 / codes.CHANCE_PARTS if dtype == torch.int8 else least_change(dtype, group) for dtype in held]
    return warning_of_stuck_averages(names, kinds, changes, "momentum", group["momentum"])
