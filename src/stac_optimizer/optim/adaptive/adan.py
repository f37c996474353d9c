"""Adan: Nesterov's momentum by averages of gradients and of their differences, adaptive as Adam.

Reference: Adan (Xie et al.), https://arxiv.org/abs/2208.06677.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.moments import (
    add_scaled_,
    assign_,
    average_,
    average_squares_,
    bias_corrections,
    denominators,
    descend_,
    known_counts,
)
from stac_optimizer.validation import non_negative, triple_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adan", "AdanRule"]

STATE = (
    COUNTER,
    StateTensor(key="exp_avg"),
    StateTensor(key="exp_avg_diff"),
    StateTensor(key="exp_avg_sq"),
    StateTensor(key="previous_grad"),
)


class AdanRule(Rule):
    r"""Algorithm 1 of the paper with the authors' corrections of bias, in this order.

    .. math::
        d &= g - g_{\text{previous}}, \text{ in the first step } 0 \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) d \\
        n &\leftarrow \beta_3 n + (1 - \beta_3) (g + \beta_2 d)^2 \\
        u &= \frac{m / (1 - \beta_1^t) + \beta_2 v / (1 - \beta_2^t)}{\sqrt{n / (1 - \beta_3^t)} + \epsilon} \\
        p &\leftarrow (p - \text{lr} \cdot u) / (1 + \text{lr} \cdot \text{weight\_decay})

    =================================== =================================================================
    paper                               here
    =================================== =================================================================
    :math:`1 - \beta_1`, ...            ``betas``, complements as in the authors' code
    :math:`\eta, \lambda, \varepsilon`  ``lr``, ``weight_decay``, ``eps``
    :math:`m_k, v_k, n_k`               state ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, as the parameter
    :math:`g_{k-1}`                     state ``previous_grad``, as the parameter
    =================================== =================================================================
    """

    name = "adan"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.98, 0.92, 0.99), check=triple_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
    }
    state_keys = ("step", "exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (beta1, beta2, beta3), lr, steps = group["betas"], group["lr"], state["step"]
        averages, differences, squares = state["exp_avg"], state["exp_avg_diff"], state["exp_avg_sq"]
        changes = _changes(grads, state["previous_grad"], steps)
        average_(averages, grads, beta1)
        average_(differences, changes, beta2)
        torch._foreach_mul_(changes, beta2)
        torch._foreach_add_(changes, grads)
        average_squares_(squares, changes, beta3)
        directions = list(torch._foreach_div(averages, bias_corrections(steps, beta1)))
        add_scaled_(directions, differences, [beta2 / c for c in bias_corrections(steps, beta2)])
        torch._foreach_div_(directions, denominators(squares, bias_corrections(steps, beta3), group["eps"]))
        descend_(params, directions, lr)
        if group["weight_decay"]:
            torch._foreach_div_(params, 1 + lr * group["weight_decay"])
        assign_(state["previous_grad"], grads)


def _changes(grads: TensorList, previous: TensorList, steps: Sequence[Tensor]) -> TensorList:
    """From each previous gradient to the present one; 0 in the first step, which has none."""
    changes = list(torch._foreach_sub(grads, previous))
    counts = known_counts(steps)
    if counts is None:
        torch._foreach_mul_(changes, [(step > 1).to(grads[0].dtype) for step in steps])
    elif min(counts) <= 1:
        torch._foreach_mul_(changes, [float(count > 1) for count in counts])
    return changes


class Adan(RuleOptimizer):
    r"""Looks ahead by the change of the gradient, so that large learning rates and batches stay stable.

    .. math::
        d = g - g_{\text{previous}}, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) d, \quad
        n \leftarrow \beta_3 n + (1 - \beta_3) (g + \beta_2 d)^2, \quad
        p \leftarrow \frac{1}{1 + \text{lr} \cdot \text{weight\_decay}} \Big( p
            - \text{lr} \frac{m / (1 - \beta_1^t) + \beta_2 v / (1 - \beta_2^t)}
              {\sqrt{n / (1 - \beta_3^t)} + \epsilon} \Big)

    holocron's class of this name takes the difference from 0 and not from the previous gradient, and decays twice.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, in [0, inf); a float or a one-element tensor. The authors take
            five to ten times AdamW's.
        betas: :math:`\beta_1` of gradients, :math:`\beta_2` of differences, :math:`\beta_3` of squares, each in
            [0, 1). The paper writes their complements.
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: proximal: after the step weights are divided by 1 + lr · weight_decay, in [0, inf). The authors
            advise 0.02.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq`` and ``previous_grad`` (as the
    weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import Adan
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = Adan([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.75, -0.75]

    References:
        Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, https://arxiv.org/abs/2208.06677.
    """

    rule = AdanRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **flags})
