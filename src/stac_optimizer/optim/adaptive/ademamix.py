"""AdEMAMix: Adam whose step also follows a second, much slower average of gradients.

Reference: The AdEMAMix Optimizer (Pagliardini et al.), https://arxiv.org/abs/2409.03137.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.moments import (
    Factors,
    add_scaled_,
    average_,
    average_squares_,
    bias_corrections,
    denominators,
    descend_,
    known_counts,
)
from stac_optimizer.validation import count, non_negative, triple_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdEMAMix", "AdEMAMixRule"]

FAST = StateTensor(key="exp_avg")  # which without beta1 is the gradient
STATE = (StateTensor(key="exp_avg_slow"), StateTensor(key="exp_avg_sq"))


def _optional_steps(name: str, value: Any) -> int | None:
    return None if value is None else count(name, value, least=1)


class AdEMAMixRule(Rule):
    r"""Algorithm 1 of the paper, in this order.

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g, \quad
        m_2 \leftarrow \beta_3 m_2 + (1 - \beta_3) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \text{lr} \frac{m_1 / (1 - \beta_1^t) + \alpha m_2}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    While :math:`t < T` of ``t_alpha_beta3``, with :math:`\tau = t / T` (equations 1 and 2 of the paper),

    .. math::
        \alpha_t = \tau \alpha, \quad
        \frac{1}{\ln \beta_{3,t}} = \frac{1 - \tau}{\ln \beta_1} + \frac{\tau}{\ln \beta_3}, \quad
        \beta_{3,t} \leq \beta_3

    ====================================== ==============================================================
    paper                                  here
    ====================================== ==============================================================
    :math:`\beta_1, \beta_2, \beta_3`      ``betas``
    :math:`\eta, \lambda, \alpha`          ``lr``, ``weight_decay``, ``alpha``
    :math:`T_\alpha, T_{\beta_3}`          ``t_alpha_beta3``, one for both
    :math:`m_1, m_2, \nu`                  state ``exp_avg``, ``exp_avg_slow``, ``exp_avg_sq``, as the parameter
    ====================================== ==============================================================
    """

    name = "ademamix"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999, 0.9999), check=triple_of_fractions),
        "alpha": Hyperparameter(default=5.0, check=non_negative),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "t_alpha_beta3": Hyperparameter(default=None, check=_optional_steps),
    }
    state_keys = ("step", "exp_avg", "exp_avg_slow", "exp_avg_sq")
    switched_keys = frozenset({"exp_avg"})

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return (COUNTER, FAST, *STATE) if group["betas"][0] else (COUNTER, *STATE)

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (beta1, beta2, _), steps = group["betas"], state["step"]
        averages, slow, squares = state.get("exp_avg", grads), state["exp_avg_slow"], state["exp_avg_sq"]
        decay_(params, group)
        if beta1:
            average_(averages, grads, beta1)
        average_squares_(squares, grads, beta2)
        keeps, takes, shares = _of_slow_averages(steps, group)
        torch._foreach_mul_(slow, keeps)
        add_scaled_(slow, grads, takes)
        directions = list(torch._foreach_div(averages, bias_corrections(steps, beta1)))
        add_scaled_(directions, slow, shares)
        torch._foreach_div_(directions, denominators(squares, bias_corrections(steps, beta2), group["eps"]))
        descend_(params, directions, group["lr"])


def _of_slow_averages(steps: Sequence[Tensor], group: Group) -> tuple[Factors, Factors, Factors]:
    """β₃, 1 − β₃ and the weight of the slow average in these steps; the second not by the first, which is near 1."""
    (beta1, _, beta3), alpha, warmup = group["betas"], group["alpha"], group["t_alpha_beta3"]
    alike = len(steps)
    if warmup is None:
        return [beta3] * alike, [1 - beta3] * alike, [alpha] * alike
    counts = known_counts(steps)
    taken = torch.stack(list(steps)) if counts is None else torch.tensor(counts, dtype=torch.float64, device="cpu")
    done = (taken / warmup).clamp(max=1.0)
    if beta3:
        logs = ((1 - done) * _inverse_log(beta1) + done * _inverse_log(beta3)).reciprocal().clamp(max=math.log(beta3))
        found = logs.exp(), -logs.expm1(), done * alpha
    else:
        found = torch.zeros_like(done), torch.ones_like(done), done * alpha
    keeps, takes, shares = (list(values.unbind()) if counts is None else values.tolist() for values in found)
    return keeps, takes, shares


def _inverse_log(beta: float) -> float:
    return 1 / math.log(beta) if beta else 0.0


class AdEMAMix(RuleOptimizer):
    r"""Follows the last few gradients, and beside them those of the last ten thousand steps.

    .. math::
        m_1 \leftarrow \beta_1 m_1 + (1 - \beta_1) g, \quad
        m_2 \leftarrow \beta_3 m_2 + (1 - \beta_3) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay})
            - \text{lr} \frac{m_1 / (1 - \beta_1^t) + \alpha m_2}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    holocron's class of this name adds the decay to the gradient, and has no warm-up.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step of the fast average alone moves each weight, in [0, inf), and up to 1 + alpha times
            that with the slow one; a float or a one-element tensor.
        betas: :math:`\beta_1` of the fast average, :math:`\beta_2` of squares, :math:`\beta_3` of the slow average,
            each in [0, 1). With :math:`\beta_1 = 0` the gradient takes the place of the fast average, which is then
            not held.
        alpha: :math:`\alpha`, how much the slow average counts, in [0, inf). The authors take 4 to 10.
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        t_alpha_beta3: over so many steps alpha rises from 0 and :math:`\beta_3` from :math:`\beta_1`, an integer in
            [1, inf); None: both are there from the start. The authors advise the length of the run, without which
            early steps may diverge.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_slow`` and ``exp_avg_sq`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import AdEMAMix
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = AdEMAMix([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> [round(value, 3) for value in weight.tolist()]
        [0.75, -0.75]

    References:
        The AdEMAMix Optimizer: Better, Faster, Older, https://arxiv.org/abs/2409.03137.
    """

    rule = AdEMAMixRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        t_alpha_beta3: int | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**values, "t_alpha_beta3": t_alpha_beta3, **flags})
