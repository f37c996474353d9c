"""Float64 references, written from the published equations with NumPy and never from the package's kernels.

Each takes one parameter's values and state before a step and returns those after it. Complex numbers are two reals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Array]


class Result(NamedTuple):
    """What a step leaves.

    Args:
        p: the parameter.
        state: its state.
        signed: what moves the weight by its sign, so that the reference binds only where it is farther from 0 than its
            rounding; None where all of it binds.
    """

    p: Array
    state: State
    signed: Array | None = None


def _sign(values: Array) -> Array:
    return np.where(values > 0, 1.0, np.where(values < 0, -1.0, 0.0))


def _cautious(direction: Array, g: Array) -> Array:
    """What agrees with the gradient, divided by the share of it in the whole tensor (arXiv 2411.16085)."""
    mask = (direction * g > 0).astype(np.float64)
    result: Array = direction * mask / max(mask.mean(), 1e-3)
    return result


def signum(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """The trunk: decay, average, sign."""
    g = -g if h["maximize"] else g
    mu = h["momentum"]
    p = p * (1 - h["lr"] * h["weight_decay"])
    m = mu * state.get("exp_avg", np.zeros_like(g)) + (1 - mu) * g
    direction = _cautious(_sign(m), g) if h["cautious"] and p.size else _sign(m)
    # Without momentum it is the sign of the gradient itself, which nothing rounds.
    return Result(p - h["lr"] * direction, {"exp_avg": m} if mu else {}, m if mu else None)


def lion(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Algorithm 2 of arXiv 2302.06675: the step goes by c, and not by the average that is kept."""
    g = -g if h["maximize"] else g
    beta1, beta2 = h["betas"]
    m = state.get("exp_avg", np.zeros_like(g))
    c = beta1 * m + (1 - beta1) * g
    direction = _cautious(_sign(c), g) if h["cautious"] and p.size else _sign(c)
    p = p * (1 - h["lr"] * h["weight_decay"])
    return Result(p - h["lr"] * direction, {"exp_avg": beta2 * m + (1 - beta2) * g}, c)


def adamw(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
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
    return Result(p - h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"]), new_state)


def msign(d: Array, h: Mapping[str, Any]) -> Array:
    """U p(S) V of d = U S V, where the polynomial takes every singular value, of d by its norm, near 1."""
    norm = np.sqrt((d**2).sum())
    if not norm:
        return np.zeros_like(d)
    u, s, vh = np.linalg.svd(d / norm, full_matrices=False)
    a, b, c = h["ns_coefficients"]
    for _ in range(h["ns_steps"]):
        s = a * s + b * s**3 + c * s**5
    result: Array = (u * s) @ vh
    return result


def muon(p: Array, g: Array, state: State, h: Mapping[str, Any]) -> Result:
    """Decay, average, the sign of the matrix of the average as it would be after g again; RMS as arXiv 2502.16982."""
    g = -g if h["maximize"] else g
    mu = h["momentum"]
    m = mu * state.get("exp_avg", np.zeros_like(g)) + (1 - mu) * g
    d = mu * m + (1 - mu) * g if h["nesterov"] and mu else m
    batch, (rows, *rest) = d.shape[: h["batch_dims"]], d.shape[h["batch_dims"] :]
    rows, columns = rows // h["row_blocks"], int(np.prod(rest))
    matrices = d.reshape(int(np.prod(batch)) * h["row_blocks"], rows, columns)
    ratio = {
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "original": max(1.0, rows / max(columns, 1)) ** 0.5,
        "spectral": (rows / max(columns, 1)) ** 0.5,
    }[h["adjust_lr"]]
    whole = ratio * np.stack([msign(matrix, h) for matrix in matrices]).reshape(d.shape)
    step = _cautious(whole, g) if h["cautious"] and p.size else whole
    p = p * (1 - h["lr"] * h["weight_decay"])
    return Result(p - h["lr"] * step, {"exp_avg": m} if mu else {}, whole if h["cautious"] else None)


def block_scales(m: Array, block: int = 128) -> Array:
    """For each row the largest magnitudes of its blocks, the last one maybe shorter."""
    scales: Array = np.maximum.reduceat(np.abs(m), np.arange(0, m.shape[1], block), axis=1)
    return scales


def over_columns(scales: Array, columns: int, block: int = 128) -> Array:
    """The scale of each element."""
    return np.repeat(scales, block, axis=1)[:, :columns]


def exact_levels(m: Array, scales: Array) -> Array:
    """127 sqrt(|m| / s), which codes round; 0 where all of a block is."""
    s = over_columns(scales, m.shape[1])
    return 127 * np.sqrt(np.divide(np.abs(m), s, out=np.zeros_like(m), where=s > 0))


def rounded_levels(exact: Array, chances: Array | float) -> Array:
    """The level below or above: above where the square lies further between theirs than a chance in (0, 1) does."""
    below = np.floor(exact)
    levels: Array = below + ((exact**2 - below**2) / (2 * below + 1) > chances)
    return levels


def decoded(codes: Array, scales: Array) -> Array:
    """Averages of the codes of a matrix: s c |c| / 127^2."""
    return over_columns(scales, codes.shape[1]) * codes * np.abs(codes) / 127**2
