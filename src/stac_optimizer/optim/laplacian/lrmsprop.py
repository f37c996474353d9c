"""LRMSProp: RMSProp whose averages of squared gradients each weight shares with its neighbours, by a Laplacian.

References: the package ladam 0.2.0, https://github.com/gpartin/ladam; Hinton, Neural Networks for Machine Learning,
lecture 6e, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optim.laplacian.diffusion import (
    COMMON,
    Diffused,
    DiffusingRule,
    coupled,
    denominators,
    diffused_squares,
    in_blocks,
)
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, StateLists, StateTensor, TensorList
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.moments import average_squares_, descend_
from stac_optimizer.validation import non_negative, unit_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LRMSProp", "LRMSPropRule"]

STATE = (COUNTER, StateTensor(key="square_avg"))
STATE_WITH_MOMENTUM = (*STATE, StateTensor(key="momentum_buffer"))


class LRMSPropRule(DiffusingRule):
    r"""RMSProp with one quantity more that diffuses, in this order.

    .. math::
        g &\leftarrow g + \lambda p \quad \text{(decoupled: } p \leftarrow p (1 - \text{lr} \, \lambda)) \\
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        u &= \frac{g}{\sqrt{\max(0, v + c_2 \Delta v)} + \epsilon} \\
        b &\leftarrow \mu b + u, \quad p \leftarrow p - \text{lr} \, b

    ========================== ==========================================================================
    package                    here
    ========================== ==========================================================================
    :math:`c^2, \nabla^2`      ``c2``; :math:`\Delta`, see ``stencil.py``
    ``alpha, momentum``        :math:`\alpha, \mu`; with momentum 0, :math:`u` is taken for :math:`b`
    ``square_avg``             state ``square_avg``, as the parameter
    ``momentum_buffer``        state ``momentum_buffer``, as the parameter; absent with momentum 0
    ========================== ==========================================================================
    """

    name = "lrmsprop"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "alpha": Hyperparameter(default=0.99, check=unit_fraction),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "momentum": Hyperparameter(default=0.0, check=non_negative),
        **COMMON,
    }
    state_keys = ("step", "square_avg", "momentum_buffer")
    switched_keys = frozenset({"momentum_buffer"})

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE_WITH_MOMENTUM if group["momentum"] else STATE

    def move(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, diffused: Diffused) -> None:
        for _, some in in_blocks(params, grads, state["square_avg"]):
            average_squares_(some.states[0], coupled(some.params, some.grads, group), group["alpha"])
        squares = diffused_squares(state["square_avg"], group, diffused)
        buffers = [state["momentum_buffer"]] if group["momentum"] else []
        for _, some in in_blocks(params, grads, squares, *buffers):
            given = coupled(some.params, some.grads, group)
            directions = list(torch._foreach_div(given, denominators(some.states[0], group["eps"])))
            if group["momentum"]:
                torch._foreach_mul_(some.states[1], group["momentum"])
                torch._foreach_add_(some.states[1], directions)
                directions = list(torch._foreach_mul(some.states[1], 1.0))
            if group["decoupled_weight_decay"]:
                decay_(some.params, group)
            descend_(some.params, directions, group["lr"])


class LRMSProp(RuleOptimizer):
    r"""RMSProp whose averages of squared gradients each weight shares with its neighbours.

    .. math::
        v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
        b \leftarrow \mu b + \frac{g}{\sqrt{\max(0, v + c_2 \Delta v)} + \epsilon}, \quad
        p \leftarrow p - \text{lr} \, b

    What :math:`\Delta` is, and what of shards and of flattened parameters, see :class:`LAdam`.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, in [0, inf); a float or a one-element tensor. With ``momentum``
            :math:`1 / (1 - \mu)` times as far; the first step :math:`1 / \sqrt{1 - \alpha}` times.
        alpha: :math:`\alpha`, in [0, 1).
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: added to the gradient, times the weight, in [0, inf).
        momentum: :math:`\mu`, in [0, inf); 0 keeps no state for it.
        c2: how much of the Laplacian is added, in [0, inf); 0 is RMSProp.
        stencil: ``"9point"``: sides weigh 2/3, corners 1/6; ``"5point"``: sides alone, 1.
        min_spatial_size: of how many elements a tensor must be to have a Laplacian, 0 or more.
        decoupled_weight_decay: decay as AdamW does, multiplied by lr, and not through the gradient.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``square_avg`` (as the weight), ``momentum_buffer`` (as the weight; absent at
    momentum 0).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import LRMSProp
        >>> weight = torch.nn.Parameter(torch.zeros(16))
        >>> optimizer = LRMSProp([weight], lr=0.01, alpha=0.75, c2=0.1)
        >>> weight.grad = torch.ones(16)
        >>> optimizer.step()
        >>> round(weight[0].item(), 4)
        -0.02

    References:
        The package ladam 0.2.0, https://github.com/gpartin/ladam, whose steps these are to rounding. There a tensor's
        first step decides whether c2 is 0 for it; here each does.
    """

    rule = LRMSPropRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        c2: float = 1e-4,
        stencil: str = "9point",
        min_spatial_size: int = 16,
        *,
        decoupled_weight_decay: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "c2": c2,
            "stencil": stencil,
            "min_spatial_size": min_spatial_size,
            "decoupled_weight_decay": decoupled_weight_decay,
            **flags,
        }
        super().__init__(params, values)
