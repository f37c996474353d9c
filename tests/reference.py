"""Float64 references, written from the published equations with NumPy and never from the package's kernels.

Each takes one parameter's values and state before a step and returns those after it. Complex numbers are two reals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Array]


def sign_momentum(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> tuple[Array, State]:
    """The trunk: decay, average, sign; with the cautious mask its mean over the whole tensor (arXiv 2411.16085)."""
    g = -g if h["maximize"] else g
    mu = h["trunk_momentum"]
    p = p * (1 - h["lr"] * h["weight_decay"])
    m = mu * state.get("exp_avg", np.zeros_like(g)) + (1 - mu) * g
    direction = np.where(m > 0, 1.0, np.where(m < 0, -1.0, 0.0))
    if h["trunk_cautious"] and p.size:
        mask = (m * g > 0).astype(np.float64)
        direction = direction * mask / max(mask.mean(), 1e-3)
    return p - h["lr"] * direction, {"exp_avg": m} if mu else {}


def adamw(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> tuple[Array, State]:
    """The cap: Algorithm 2 of arXiv 1711.05101, with AMSGrad's maximum where asked."""
    g = -g if h["maximize"] else g
    beta1, beta2 = h["betas"]
    t = state["step"] + 1
    m = beta1 * state.get("exp_avg", np.zeros_like(g)) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", np.zeros_like(g)) + (1 - beta2) * g**2
    new_state = {"exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        new_state["max_exp_avg_sq"] = v = np.maximum(state.get("max_exp_avg_sq", np.zeros_like(v)), v)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    p = p * (1 - h["lr"] * h["weight_decay"])
    return p - h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"]), new_state
