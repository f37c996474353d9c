"""LAdaGrad: AdaGrad whose sums of squared gradients each weight shares with its neighbours, by a Laplacian.

References: the package ladam 0.2.0, https://github.com/gpartin/ladam; Adaptive Subgradient Methods (Duchi et al.),
https://jmlr.org/papers/v12/duchi11a.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optim.laplacian.diffusion import (
    COMMON,
    Diffused,
    DiffusingRule,
    at,
    coupled,
    denominators,
    diffused_squares,
    in_blocks,
)
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, StateLists, StateTensor, TensorList
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.moments import Factors, descend_, known_counts
from stac_optimizer.validation import non_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAdaGrad", "LAdaGradRule"]

STATE = (COUNTER, StateTensor(key="sum"))


class LAdaGradRule(DiffusingRule):
    r"""AdaGrad with one quantity more that diffuses, in this order.

    .. math::
        g &\leftarrow g + \lambda p \quad \text{(decoupled: } p \leftarrow p (1 - \text{lr} \, \lambda)) \\
        s &\leftarrow s + g^2 \\
        p &\leftarrow p - \frac{\text{lr}}{1 + (t - 1) \eta} \,
            \frac{g}{\sqrt{\max(0, s + c_2 \Delta s)} + \epsilon}

    ========================== ==========================================================================
    package                    here
    ========================== ==========================================================================
    :math:`c^2, \nabla^2`      ``c2``; :math:`\Delta`, see ``stencil.py``
    ``lr_decay``               :math:`\eta`
    ``sum``                    state ``sum``, as the parameter
    ========================== ==========================================================================
    """

    name = "ladagrad"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr_decay": Hyperparameter(default=0.0, check=non_negative),
        "eps": Hyperparameter(default=1e-10, check=non_negative),
        **COMMON,
    }
    state_keys = ("step", "sum")

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def move(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, diffused: Diffused) -> None:
        for _, some in in_blocks(params, grads, state["sum"]):
            given = coupled(some.params, some.grads, group)
            torch._foreach_add_(some.states[0], torch._foreach_mul(given, given))
        sums = diffused_squares(state["sum"], group, diffused)
        divisors = _divisors(state["step"], group["lr_decay"])
        for places, some in in_blocks(params, grads, sums):
            given = coupled(some.params, some.grads, group)
            directions = list(torch._foreach_div(given, denominators(some.states[0], group["eps"])))
            if group["decoupled_weight_decay"]:
                decay_(some.params, group)
            descend_(some.params, directions, group["lr"], at(places, divisors))


def _divisors(steps: Sequence[Tensor], lr_decay: float) -> Factors:
    """What lr is divided by: 1 in the first step, lr_decay more in each that follows."""
    counts = known_counts(steps)
    if counts is None:
        return [1 + (step - 1) * lr_decay for step in steps]
    return [1 + (count - 1) * lr_decay for count in counts]


class LAdaGrad(RuleOptimizer):
    r"""AdaGrad whose sums of squared gradients each weight shares with its neighbours.

    .. math::
        s \leftarrow s + g^2, \quad
        p \leftarrow p - \frac{\text{lr}}{1 + (t - 1) \, \text{lr\_decay}} \,
            \frac{g}{\sqrt{\max(0, s + c_2 \Delta s)} + \epsilon}

    What :math:`\Delta` is, and what of shards and of flattened parameters, see :class:`LAdam`.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far the first step moves each weight, in [0, inf); a float or a one-element tensor.
        lr_decay: by how much each step adds to what lr is divided by, in [0, inf).
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: added to the gradient, times the weight, in [0, inf).
        c2: how much of the Laplacian is added, in [0, inf); 0 is AdaGrad.
        stencil: ``"9point"``: sides weigh 2/3, corners 1/6; ``"5point"``: sides alone, 1.
        min_spatial_size: of how many elements a tensor must be to have a Laplacian, 0 or more.
        decoupled_weight_decay: decay as AdamW does, multiplied by lr, and not through the gradient.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32) and ``sum`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import LAdaGrad
        >>> weight = torch.nn.Parameter(torch.zeros(16))
        >>> optimizer = LAdaGrad([weight], lr=0.1, c2=0.1)
        >>> weight.grad = torch.ones(16)
        >>> optimizer.step()
        >>> round(weight[0].item(), 4)
        -0.1

    References:
        The package ladam 0.2.0, https://github.com/gpartin/ladam, whose steps these are to rounding. There a tensor's
        first step decides whether c2 is 0 for it; here each does.
    """

    rule = LAdaGradRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        c2: float = 1e-4,
        stencil: str = "9point",
        min_spatial_size: int = 16,
        *,
        decoupled_weight_decay: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "c2": c2,
            "stencil": stencil,
            "min_spatial_size": min_spatial_size,
            "decoupled_weight_decay": decoupled_weight_decay,
            **flags,
        }
        super().__init__(params, values)
