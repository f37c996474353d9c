"""Float64 references of the relatives of Adam, written from their papers' equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reference import Array, Result, State

__all__ = ["adabelief", "adamp", "adan", "ademamix", "tadam"]


def _state(state: State, key: str, like: Array) -> Array:
    return state.get(key, np.zeros_like(like))


def _corrected(beta: float, t: Array | float) -> Array | float:
    """1 - beta^t, by which an average is divided; written so that it holds as many digits as float64 has."""
    return -np.expm1(t * np.log(beta)) if beta else 1.0


def adabelief(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 2 of arXiv 2010.07468, after decoupled decay; AMSGrad's maximum of s where asked."""
    g = -g if h["maximize"] else g
    (beta1, beta2), t = h["betas"], state["step"] + 1
    m = beta1 * _state(state, "exp_avg", g) + (1 - beta1) * g
    s = beta2 * _state(state, "exp_avg_var", g) + (1 - beta2) * (g - m) ** 2 + h["eps"]
    new_state = {"exp_avg": m, "exp_avg_var": s}
    if h["amsgrad"]:
        new_state["max_exp_avg_var"] = s = np.maximum(_state(state, "max_exp_avg_var", g), s)
    step = m / _corrected(beta1, t) / (np.sqrt(s / _corrected(beta2, t)) + h["eps"])
    return Result(p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * step, new_state)


def adan(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 1 of arXiv 2208.06677, betas as their complements, averages with their bias corrected."""
    g = -g if h["maximize"] else g
    (beta1, beta2, beta3), t = h["betas"], state["step"] + 1
    d = g - state["previous_grad"] if t > 1 else np.zeros_like(g)
    m = beta1 * _state(state, "exp_avg", g) + (1 - beta1) * g
    v = beta2 * _state(state, "exp_avg_diff", g) + (1 - beta2) * d
    n = beta3 * _state(state, "exp_avg_sq", g) + (1 - beta3) * (g + beta2 * d) ** 2
    step = m / _corrected(beta1, t) + beta2 * v / _corrected(beta2, t)
    step = step / (np.sqrt(n / _corrected(beta3, t)) + h["eps"])
    new_state = {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "previous_grad": g}
    return Result((p - h["lr"] * step) / (1 + h["lr"] * h["weight_decay"]), new_state)


def ademamix(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 1 of arXiv 2409.03137, with the warm-ups of its section 3."""
    g = -g if h["maximize"] else g
    (beta1, beta2, beta3), t, alpha = h["betas"], state["step"] + 1, h["alpha"]
    if h["t_alpha_beta3"] is not None:
        alpha = min(t * alpha / h["t_alpha_beta3"], alpha)
        end, done = np.log(beta3), min(t / h["t_alpha_beta3"], 1.0)
        start = np.log(beta1) if beta1 else -np.inf
        beta3 = min(np.exp(end / ((1 - done) * end / start + done)), beta3)
    m1 = beta1 * _state(state, "exp_avg", g) + (1 - beta1) * g
    m2 = beta3 * _state(state, "exp_avg_slow", g) + (1 - beta3) * g
    v = beta2 * _state(state, "exp_avg_sq", g) + (1 - beta2) * g**2
    step = (m1 / _corrected(beta1, t) + alpha * m2) / (np.sqrt(v / _corrected(beta2, t)) + h["eps"])
    new_state = {"exp_avg_slow": m2, "exp_avg_sq": v} | ({"exp_avg": m1} if beta1 else {})
    return Result(p - h["lr"] * (step + h["weight_decay"] * p), new_state)


def tadam(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 1 of arXiv 2003.00179; decay as of its authors' code, by the gradient."""
    g = (-g if h["maximize"] else g) + h["weight_decay"] * p
    (beta1, beta2), t = h["betas"], state["step"] + 1
    m, v = _state(state, "exp_avg", g), _state(state, "exp_avg_sq", g)
    weight = state.get("exp_avg_weight", np.array(beta1 / (1 - beta1)))
    dof, d = h["dof"] or max(g.size, 1), max(g.size, 1)
    w = (dof + d) / (dof + ((g - m) ** 2 / (v + h["eps"])).sum())
    m = weight / (weight + w) * m + w / (weight + w) * g
    v = beta2 * v + (1 - beta2) * g**2
    new_state = {"exp_avg": m, "exp_avg_sq": v, "exp_avg_weight": weight * (2 * beta1 - 1) / beta1 + w}
    if h["amsgrad"]:
        new_state["max_exp_avg_sq"] = v = np.maximum(_state(state, "max_exp_avg_sq", g), v)
    return Result(p - h["lr"] * m / _corrected(beta1, t) / (np.sqrt(v / _corrected(beta2, t)) + h["eps"]), new_state)


def adamp(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 1 of arXiv 2006.08217, first by channels, then by layer, as section 3.3 has it."""
    g = -g if h["maximize"] else g
    (beta1, beta2), t, eps = h["betas"], state["step"] + 1, h["eps"]
    m = beta1 * _state(state, "exp_avg", g) + (1 - beta1) * g
    v = beta2 * _state(state, "exp_avg_sq", g) + (1 - beta2) * g**2
    new_state = {"exp_avg": m, "exp_avg_sq": v}
    ahead = beta1 * m + (1 - beta1) * g if h["nesterov"] else m
    u, ratio = ahead / _corrected(beta1, t) / (np.sqrt(v / _corrected(beta2, t)) + eps), 1.0
    if p.ndim > 1 and p.size:
        for rows in (p.shape[0], 1):
            weights, gradients, steps = (array.reshape(rows, -1) for array in (p, g, u))
            lengths = np.linalg.norm(weights, axis=1, keepdims=True)
            of_gradients = np.linalg.norm(gradients, axis=1, keepdims=True)
            products = np.abs((weights * gradients).sum(1, keepdims=True))
            cosines = products / (np.maximum(lengths, eps) * np.maximum(of_gradients, eps))
            if cosines.max() < h["delta"] / np.sqrt(weights.shape[1]):
                units = weights / (lengths + eps)
                u, ratio = (steps - units * (units * steps).sum(1, keepdims=True)).reshape(p.shape), h["wd_ratio"]
                break
    return Result(p * (1 - h["lr"] * h["weight_decay"] * ratio) - h["lr"] * u, new_state)
