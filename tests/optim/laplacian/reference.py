"""Float64 references of rules with a Laplacian, written from the package's description, with the floor at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reference import Array, Result, State

__all__ = ["ladagrad", "ladam", "lrmsprop", "with_laplacian"]

STENCILS = {
    "9point": np.array([[1.0, 4.0, 1.0], [4.0, -20.0, 4.0], [1.0, 4.0, 1.0]]) / 6,
    "5point": np.array([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]),
}


def laplacian(x: Array, stencil: str) -> Array:
    """Of x as a line, or as a field of (first, rest), edges joined; 0 where there are too few neighbours."""
    if x.ndim < 2:
        return np.roll(x, 1) - 2 * x + np.roll(x, -1) if x.size >= 4 else np.zeros_like(x)
    field = x.reshape(x.shape[0], int(np.prod(x.shape[1:])))
    if min(field.shape) < 3:
        return np.zeros_like(x)
    padded = np.pad(field, 1, mode="wrap")
    rows, columns = field.shape
    weights = STENCILS[stencil]
    result = sum(weights[i, j] * padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3))
    return np.asarray(result).reshape(x.shape)


def with_laplacian(x: Array, h: Mapping[str, Any]) -> Array:
    """What of x is left, and what its neighbours add."""
    return x + h["c2"] * laplacian(x, h["stencil"]) if x.size >= h["min_spatial_size"] else x


def _decayed(p: Array, g: Array, h: Mapping[str, Any]) -> tuple[Array, Array]:
    """The weights, and the gradient, after decay."""
    g = -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        return p * (1 - h["lr"] * h["weight_decay"]), g
    return p, g + h["weight_decay"] * p


def ladam(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Adam with the Laplacian of the second moments, of the step or of the weights."""
    p, g = _decayed(p, g, h)
    (beta1, beta2), t, mode = h["betas"], state["step"] + 1, h["mode"]
    m = beta1 * state.get("exp_avg", np.zeros_like(g)) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", np.zeros_like(g)) + (1 - beta2) * g**2
    # 1 - beta^t, with as many digits as float64 has.
    m_hat, v_hat = m / -np.expm1(t * np.log(beta1)), v / -np.expm1(t * np.log(beta2))
    if mode == "variance_lap":
        v_hat = np.maximum(with_laplacian(v_hat, h), 0)
    step = m_hat / (np.sqrt(v_hat) + h["eps"])
    p = p - h["lr"] * (with_laplacian(step, h) if mode == "update_lap" else step)
    return Result(with_laplacian(p, h) if mode == "weight_lap" else p, {"exp_avg": m, "exp_avg_sq": v})


def ladagrad(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """AdaGrad with the Laplacian of the sums."""
    p, g = _decayed(p, g, h)
    s = state.get("sum", np.zeros_like(g)) + g**2
    lr = h["lr"] / (1 + state["step"] * h["lr_decay"])
    return Result(p - lr * g / (np.sqrt(np.maximum(with_laplacian(s, h), 0)) + h["eps"]), {"sum": s})


def lrmsprop(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """RMSProp with the Laplacian of the averages."""
    p, g = _decayed(p, g, h)
    v = h["alpha"] * state.get("square_avg", np.zeros_like(g)) + (1 - h["alpha"]) * g**2
    step = g / (np.sqrt(np.maximum(with_laplacian(v, h), 0)) + h["eps"])
    if not h["momentum"]:
        return Result(p - h["lr"] * step, {"square_avg": v})
    b = h["momentum"] * state.get("momentum_buffer", np.zeros_like(g)) + step
    return Result(p - h["lr"] * b, {"square_avg": v, "momentum_buffer": b})
