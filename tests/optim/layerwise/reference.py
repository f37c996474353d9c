"""Float64 references of rules that go by trust ratios, written from the papers' equations with NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from tests.reference import Array, Result, State

__all__ = ["lamb", "lars", "ralars", "rectification"]


def _norm(values: Array) -> float:
    return float(np.sqrt((values**2).sum()))


def _clipped(norm: float, clip: tuple[float, float] | None) -> float:
    return norm if clip is None else min(max(norm, clip[0]), clip[1])


def lars(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 1 of arXiv 1708.03888; the local rate enters the buffer, the global one multiplies it."""
    g = -g if h["maximize"] else g
    rate = 1.0
    if p.ndim > 1 and _norm(p) and _norm(g):
        rate = h["trust_coefficient"] * _clipped(_norm(p), h["scale_clip"])
        rate /= _norm(g) + h["weight_decay"] * _norm(p)
    x = rate * (g + h["weight_decay"] * p)
    if not h["momentum"]:
        return Result(p - h["lr"] * x, {})
    is_first = state["step"] == 0
    buffer = x if is_first else h["momentum"] * state["momentum_buffer"] + (1 - h["dampening"]) * x
    return Result(p - h["lr"] * (x + h["momentum"] * buffer if h["nesterov"] else buffer), {"momentum_buffer": buffer})


def _averages(g: Array, state: State, h: Mapping[str, Any]) -> tuple[Array, Array, Array, Array]:
    """Adam's averages, and the same without their bias."""
    g = -g if h["maximize"] else g
    (beta1, beta2), t = h["betas"], state["step"] + 1
    m = beta1 * state.get("exp_avg", np.zeros_like(g)) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", np.zeros_like(g)) + (1 - beta2) * g**2
    return m, v, m / (1 - beta1**t), v / (1 - beta2**t)


def _scaled(p: Array, u: Array, h: Mapping[str, Any]) -> Array:
    u = u + h["weight_decay"] * p
    ratio = _clipped(_norm(p), h["scale_clip"]) / _norm(u) if _norm(p) and _norm(u) else 1.0
    result: Array = p - h["lr"] * ratio * u
    return result


def lamb(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 2 of arXiv 1904.00962."""
    m, v, m_hat, v_hat = _averages(g, state, h)
    return Result(_scaled(p, m_hat / (np.sqrt(v_hat) + h["eps"]), h), {"exp_avg": m, "exp_avg_sq": v})


def rectification(t: int, beta2: float) -> float | None:
    """The r of arXiv 1908.03265, where the length of its average is above 5; by exact fractions, for lengths cancel."""
    beta = Fraction(beta2)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * t * beta**t / (1 - beta**t)
    if length <= 5:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def ralars(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 2 of arXiv 1908.03265, its step scaled as LAMB's."""
    m, v, m_hat, v_hat = _averages(g, state, h)
    r = rectification(int(state["step"]) + 1, h["betas"][1])
    if r is None and not h["force_adaptive_momentum"]:
        u = m_hat
    else:
        u = (1.0 if r is None else r) * m_hat / (np.sqrt(v_hat) + h["eps"])
    return Result(_scaled(p, u, h), {"exp_avg": m, "exp_avg_sq": v})
