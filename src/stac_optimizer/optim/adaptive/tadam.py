"""TAdam: Adam whose average of gradients trusts each of them the less, the farther it lies out.

Reference: TAdam (Ilboudo, Kobayashi, Sugimoto), https://arxiv.org/abs/2003.00179.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.moments import (
    assign_,
    average_squares_,
    bias_corrections,
    denominators,
    descend_,
    largest,
)
from stac_optimizer.tensors.device_tables import integers
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.validation import boolean, non_negative, pair_of_fractions, real

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TAdam", "TAdamRule"]

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_sq"))
LARGEST = StateTensor(key="max_exp_avg_sq")
WEIGHT = "exp_avg_weight"


def _betas(name: str, value: Any) -> tuple[float, float]:
    beta1, beta2 = pair_of_fractions(name, value)
    if beta1 <= 0.5:
        raise ValueError(
            f"{name}[0] must be a number in (0.5, 1), got {beta1!r}; with less an average would forget more than it has"
        )
    return beta1, beta2


def _degrees(name: str, value: Any) -> float | None:
    allowed = "a number above 0, infinity among them, or None for the number of elements"
    if value is None:
        return None
    number = real(name, value, allowed)
    if not number > 0:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number


class TAdamRule(Rule):
    r"""Algorithm 1 of the paper, in this order, for each parameter of d elements.

    .. math::
        g &\leftarrow g + \text{weight\_decay} \cdot p \\
        w &= (\nu + d) \Big/ \Big(\nu + \sum \frac{(g - m)^2}{v + \epsilon}\Big) \\
        m &\leftarrow \frac{W}{W + w} m + \frac{w}{W + w} g \\
        W &\leftarrow \frac{2 \beta_1 - 1}{\beta_1} W + w, \quad W_0 = \frac{\beta_1}{1 - \beta_1} \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \text{lr} \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\nu`                ``dof``
    :math:`m_t, v_t`           state ``exp_avg``, ``exp_avg_sq``, as the parameter
    :math:`W_t`                state ``exp_avg_weight``, one number
    ========================== ==========================================================================

    With ``amsgrad`` the largest v so far, ``max_exp_avg_sq``, takes its place in the step.
    """

    name = "tadam"
    needs = "tensor"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=_betas),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "amsgrad": Hyperparameter(default=False, check=boolean),
        "dof": Hyperparameter(default=None, check=_degrees),
    }
    state_keys = ("step", "exp_avg", "exp_avg_sq", WEIGHT, "max_exp_avg_sq")
    switched_keys = frozenset({"max_exp_avg_sq"})
    numbers = (WEIGHT,)

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        beta1 = group["betas"][0]
        dtype = arithmetic_dtype(param.dtype).to_real()
        weight = StateTensor(key=WEIGHT, shape=(), dtype=dtype, fill=beta1 / (1 - beta1))
        return (*STATE, weight, LARGEST) if group["amsgrad"] else (*STATE, weight)

    def measured(self, params: TensorList, grads: TensorList, state: StateLists, group: Group) -> Sequence[TensorList]:
        deviations = list(torch._foreach_sub(_decayed(params, grads, group), state["exp_avg"]))
        scales = list(torch._foreach_add(state["exp_avg_sq"], group["eps"]))
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(deviations, scales)
        return (deviations,)

    def settled(
        self, measured: Sequence[TensorList], state: StateLists, group: Group, wholes: Wholes
    ) -> Sequence[TensorList]:
        """What is kept of each average, and the share of the gradient in it."""
        beta1, dof = group["betas"][0], group["dof"]
        weights = torch.stack(state[WEIGHT])
        dims = integers([max(numel, 1) for numel in wholes.numels], weights.device).to(weights.dtype)
        if dof == math.inf:  # where nothing is too far out, not even what overflows
            trusts = torch.ones_like(weights)
        else:
            degrees = dims if dof is None else dof
            trusts = (1 + dims / degrees) / (1 + torch.stack(measured[0]).square() / degrees)
        shares = trusts / (weights + trusts)
        assign_(state[WEIGHT], (weights * ((2 * beta1 - 1) / beta1) + trusts).unbind())
        return list((1 - shares).unbind()), list(shares.unbind())

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (beta1, beta2), steps = group["betas"], state["step"]
        averages, squares = state["exp_avg"], state["exp_avg_sq"]
        keeps, shares = wholes.settled
        grads = _decayed(params, grads, group)
        torch._foreach_mul_(averages, keeps)
        torch._foreach_add_(averages, torch._foreach_mul(grads, shares))
        average_squares_(squares, grads, beta2)
        squares = largest(state.get("max_exp_avg_sq"), squares)
        directions = denominators(squares, bias_corrections(steps, beta2), group["eps"])
        directions = list(torch._foreach_div(averages, directions))
        descend_(params, directions, group["lr"], bias_corrections(steps, beta1))


def _decayed(params: TensorList, grads: TensorList, group: Group) -> TensorList:
    """The gradients with that of the decay."""
    if not group["weight_decay"]:
        return grads
    return list(torch._foreach_add(grads, torch._foreach_mul(params, group["weight_decay"])))


class TAdam(RuleOptimizer):
    r"""Adam that outlying gradients, as of noisy labels or broken samples, do not throw off.

    .. math::
        w = \frac{\nu + d}{\nu + \sum (g - m)^2 / (v + \epsilon)}, \quad
        m \leftarrow \frac{W m + w g}{W + w}, \quad
        W \leftarrow \frac{2 \beta_1 - 1}{\beta_1} W + w, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \text{lr} \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with :math:`W_0 = \beta_1 / (1 - \beta_1)`; d is the number of elements of the parameter, over which the sum goes.
    holocron's class of this name does the same; its docstring gives another v.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, in [0, inf); a float or a one-element tensor. First steps are
            shorter: while v is small, every gradient lies far out.
        betas: :math:`\beta_1` of the average where gradients are trusted as much as ever, in (0.5, 1), and
            :math:`\beta_2` of squares, in [0, 1).
        eps: :math:`\epsilon`, in [0, inf). With 0 a single gradient of exactly 0 makes the whole parameter NaN.
        weight_decay: times the weight added to the gradient (L2), in [0, inf).
        amsgrad: divide by the largest v so far (https://openreview.net/forum?id=ryQu7f-RZ).
        dof: :math:`\nu`, in (0, inf]: the less, the less an outlying gradient counts; infinity: Adam. None: d.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the weight), ``exp_avg_weight`` (W, 0-dim,
    float32 at least), with ``amsgrad`` also ``max_exp_avg_sq``.

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import TAdam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = TAdam([weight], lr=0.25, dof=float("inf"))  # Adam
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.75, -0.75]

    References:
        TAdam: A Robust Stochastic Gradient Optimizer, https://arxiv.org/abs/2003.00179.
    """

    rule = TAdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        dof: float | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "dof": dof}
        super().__init__(params, {**values, **flags})
