"""Lion: the sign of an interpolation between gradient average and gradient, with decoupled weight decay.

Reference: Symbolic Discovery of Optimization Algorithms (Chen et al.), https://arxiv.org/abs/2302.06675.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import (
    COUNTER,
    Flags,
    Group,
    Hyperparameter,
    Rule,
    StateLists,
    StateTensor,
    TensorList,
    Wholes,
)
from stac_optimizer.rule.common import (
    decay_,
    joined,
    least_change,
    mask_,
    signs,
    warning_of_lost_steps,
    warning_of_stuck_averages,
)
from stac_optimizer.validation import boolean, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion", "LionRule"]

STATE = (COUNTER, StateTensor(key="exp_avg"))


class LionRule(Rule):
    r"""Algorithm 2 of the paper, in this order.

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        c &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{sign}(c) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\eta_t, \lambda`    ``lr``, ``weight_decay``
    :math:`m`                  state ``exp_avg``, as the parameter
    ========================== ==========================================================================

    With ``cautious`` sign(c) becomes sign(c) · [c · g > 0] / max(mean of the mask, 1e-3).
    """

    name = "lion"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.99), check=pair_of_fractions),
        "cautious": Hyperparameter(default=False, check=boolean),
    }
    state_keys = ("step", "exp_avg")

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def needs_whole(self, group: Group) -> bool:
        return bool(group["cautious"])

    def warning(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        decay = group["betas"][1]
        changes = [least_change(param.dtype, group) for param in params]
        stuck = warning_of_stuck_averages(names, [str(param.dtype) for param in params], changes, "betas[1]", decay)
        return joined(warning_of_lost_steps(names, params, group), stuck)

    def walks_on(self, group: Group) -> bool:
        return not group["cautious"]

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (beta1, beta2), averages = group["betas"], state["exp_avg"]
        decay_(params, group)
        interpolated = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(interpolated, torch._foreach_mul(grads, 1 - beta1))
        directions = signs(interpolated)
        if group["cautious"]:
            mask_(directions, grads, wholes)
        torch._foreach_mul_(directions, group["lr"])
        torch._foreach_sub_(params, directions)
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, torch._foreach_mul(grads, 1 - beta2))


class Lion(RuleOptimizer):
    r"""Evolved sign momentum: one state tensor a weight, every step exactly lr long.

    .. math::
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay})
            - \text{lr} \cdot \operatorname{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: how far a step moves each weight, in [0, inf); a float or a one-element tensor. The authors advise a third
            to a tenth of AdamW's, with three to ten times its decay.
        betas: :math:`\beta_1` of the step and :math:`\beta_2` of the average, each in [0, 1).
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        cautious: move a weight only where the step agrees with the sign of the present gradient, and divide by the
            share of such weights in the tensor, floored at 1e-3 (https://arxiv.org/abs/2411.16085).
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32) and ``exp_avg`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import Lion
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
        >>> optimizer = Lion([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.1, 0.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.75, -0.75, 0.5]

    References:
        Symbolic Discovery of Optimization Algorithms, https://arxiv.org/abs/2302.06675.
    """

    rule = LionRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "cautious": cautious, **flags}
        )
