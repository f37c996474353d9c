"""AdaBelief: Adam that divides by how far gradients lie from their average, and not by how large they are.

Reference: AdaBelief Optimizer (Zhuang et al.), https://arxiv.org/abs/2010.07468.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.moments import average_, average_squares_, bias_corrections, denominators, descend_, largest
from stac_optimizer.validation import boolean, non_negative, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaBelief", "AdaBeliefRule"]

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_var"))
LARGEST = StateTensor(key="max_exp_avg_var")


class AdaBeliefRule(Rule):
    r"""Algorithm 2 of the paper, after decoupled decay, in this order.

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        s &\leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2 + \epsilon \\
        p &\leftarrow p - \text{lr} \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\alpha, \epsilon`   ``lr``, ``eps``
    :math:`m_t, s_t`           state ``exp_avg``, ``exp_avg_var``, as the parameter
    ========================== ==========================================================================

    With ``amsgrad`` the largest s so far, ``max_exp_avg_var``, takes its place in the step.
    """

    name = "adabelief"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-16, check=non_negative),
        "amsgrad": Hyperparameter(default=False, check=boolean),
    }
    state_keys = ("step", "exp_avg", "exp_avg_var", "max_exp_avg_var")
    switched_keys = frozenset({"max_exp_avg_var"})

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return (*STATE, LARGEST) if group["amsgrad"] else STATE

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (beta1, beta2), eps, steps = group["betas"], group["eps"], state["step"]
        averages, variances = state["exp_avg"], state["exp_avg_var"]
        decay_(params, group)
        average_(averages, grads, beta1)
        average_squares_(variances, list(torch._foreach_sub(grads, averages)), beta2)
        torch._foreach_add_(variances, eps)
        variances = largest(state.get("max_exp_avg_var"), variances)
        directions = denominators(variances, bias_corrections(steps, beta2), eps)
        directions = list(torch._foreach_div(averages, directions))
        descend_(params, directions, group["lr"], bias_corrections(steps, beta1))


class AdaBelief(RuleOptimizer):
    r"""Long steps where gradients are as their average foretells, short ones where they are not.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        s \leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2 + \epsilon, \quad
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay})
            - \text{lr} \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    holocron's class of this name leaves :math:`\epsilon` out of s, and adds the decay to the gradient. The authors'
    package is this one with ``rectify=False``.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: how far a step moves a weight whose gradients scatter as widely as they are large, in [0, inf); a float or
            a one-element tensor. Where they agree, steps are longer.
        betas: :math:`\beta_1` of the average and :math:`\beta_2` of the variance, each in [0, 1). Not 0: with
            :math:`\beta_1 = 0` no gradient deviates from m, and a step is :math:`g / \sqrt{\epsilon}`.
        eps: :math:`\epsilon`, in [0, inf). As it adds up in s, it counts more than Adam's: the authors advise 1e-16,
            and 1e-8 where SGD does better than Adam.
        weight_decay: decoupled, multiplied by lr, in [0, inf), as in the authors' package.
        amsgrad: divide by the largest s so far (https://openreview.net/forum?id=ryQu7f-RZ).
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_var`` (as the weight), with ``amsgrad`` also
    ``max_exp_avg_var``.

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import AdaBelief
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = AdaBelief([weight], lr=0.09)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()  # after one gradient its distance from the average is 0.9 of it
        >>> [round(value, 4) for value in weight.tolist()]
        [0.9, -0.9]

    References:
        AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients, https://arxiv.org/abs/2010.07468.
    """

    rule = AdaBeliefRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**values, **flags})
