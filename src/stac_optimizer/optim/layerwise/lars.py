"""LARS: momentum of gradients that each layer scales to the norm of its weights.

Reference: Large Batch Training of Convolutional Networks (You et al.), https://arxiv.org/abs/1708.03888.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optim.layerwise.trust import trust_ratios
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.moments import known_counts
from stac_optimizer.validation import boolean, clipping_range, non_negative, unit_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LARS", "LARSRule"]

BUFFER = StateTensor(key="momentum_buffer")


class LARSRule(Rule):
    r"""Algorithm 1 of the paper, in this order; but lr multiplies the buffer, as in ``torch.optim.SGD``.

    .. math::
        \lambda &= \eta \, \frac{\phi(\lVert p \rVert)}{\lVert g \rVert + \beta \lVert p \rVert},
            \quad \text{but 1 of vectors, and where } \lVert p \rVert = 0 \text{ or } \lVert g \rVert = 0 \\
        x &= \lambda \, (g + \beta p) \\
        b &\leftarrow \mu b + (1 - \text{dampening}) \, x, \quad b_1 = x \\
        p &\leftarrow p - \text{lr} \cdot b, \quad \text{with nesterov } p \leftarrow p - \text{lr} \, (x + \mu b)

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\gamma_t, \beta`    ``lr``, ``weight_decay``
    :math:`\eta`               ``trust_coefficient``
    :math:`m`                  ``momentum``, :math:`\mu`
    :math:`v`                  state ``momentum_buffer``, as the parameter, times lr
    :math:`\lambda^l`          the local rate :math:`\lambda`
    ========================== ==========================================================================

    :math:`\phi` clips to ``scale_clip``. Without momentum there is no buffer, and the step is x.
    """

    name = "lars"
    needs = "tensor"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "momentum": Hyperparameter(default=0.0, check=unit_fraction),
        "dampening": Hyperparameter(default=0.0, check=unit_fraction),
        "nesterov": Hyperparameter(default=False, check=boolean),
        "scale_clip": Hyperparameter(default=None, check=clipping_range),
        "trust_coefficient": Hyperparameter(default=1.0, check=non_negative),
    }
    excluded = (("nesterov", "dampening"),)
    state_keys = ("step", "momentum_buffer")
    switched_keys = frozenset({"momentum_buffer"})

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return (COUNTER, BUFFER) if group["momentum"] else (COUNTER,)

    def measured(self, params: TensorList, grads: TensorList, state: StateLists, group: Group) -> Sequence[TensorList]:
        return params, grads

    def settled(
        self, measured: Sequence[TensorList], state: StateLists, group: Group, wholes: Wholes
    ) -> Sequence[TensorList]:
        """By what gradient and decay of each parameter are multiplied, and that times what of it enters the buffer."""
        weight_norms, grad_norms = map(torch.stack, measured)
        lengths = grad_norms + group["weight_decay"] * weight_norms * (grad_norms != 0)
        ratios = trust_ratios(weight_norms, lengths, group["scale_clip"], group["trust_coefficient"]).unbind()
        rates = [torch.ones_like(r) if len(shape) < 2 else r for r, shape in zip(ratios, wholes.shapes, strict=True)]
        shares = _shares(state["step"], group["dampening"])
        return rates, [share * rate for share, rate in zip(shares, rates, strict=True)]

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        # x is never made: memory for it would cost as much as the rest.
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        rates, entering = wholes.settled
        if momentum:
            buffers = state["momentum_buffer"]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_addcmul_(buffers, grads, entering)
            if decay:
                torch._foreach_addcmul_(buffers, params, entering, decay)
        if not momentum or group["nesterov"]:
            if decay:
                torch._foreach_mul_(params, [1 - lr * decay * rate for rate in rates])
            torch._foreach_addcmul_(params, grads, [lr * rate for rate in rates], -1)
        if momentum:
            lr = lr * momentum if group["nesterov"] else lr
            if isinstance(lr, Tensor):
                torch._foreach_addcmul_(params, buffers, [lr] * len(params), -1)
            else:
                torch._foreach_add_(params, buffers, alpha=-lr)


def _shares(steps: TensorList, dampening: float) -> list[Any]:
    """How much of a step enters the buffer: of a parameter's first one all, as in ``torch.optim.SGD``."""
    if not dampening:
        return [1.0] * len(steps)
    counts = known_counts(steps)
    if counts is None:
        return [torch.where(step == 1, 1.0, 1 - dampening) for step in steps]
    return [1.0 if count == 1 else 1 - dampening for count in counts]


class LARS(RuleOptimizer):
    r"""SGD with momentum whose gradients are scaled, for each parameter, to the norm of its weights.

    .. math::
        x = \text{trust\_coefficient} \,
            \frac{\operatorname{clip}(\lVert p \rVert)}{\lVert g \rVert + \text{weight\_decay} \, \lVert p \rVert} \,
            (g + \text{weight\_decay} \cdot p), \quad
        b \leftarrow \mu b + (1 - \text{dampening}) \, x, \quad
        p \leftarrow p - \text{lr} \cdot b

    Parameters of fewer than two dimensions, such as biases and the scales of norms, and those whose weights or
    gradients are all 0, take the gradient as it is: :math:`x = g + \text{weight\_decay} \cdot p`. In a parameter's
    first step b is x; a momentum that is switched on later begins at 0. holocron's class of this name also scales
    vectors, scales the buffer instead of what enters it, has no ``trust_coefficient``, does nothing with its
    ``scale_clip``, and writes to the gradients.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: in [0, inf); a float or a one-element tensor. With ``trust_coefficient`` 1 and no momentum, by what share of
            its norm a step moves a parameter; what moves a vector is lr times its gradient.
        momentum: :math:`\mu` in [0, 1); 0: no buffer. The paper has 0.9.
        dampening: how much less than all of a step enters the buffer after the first one, in [0, 1).
        weight_decay: added to the gradient, in [0, inf), and part of the norm that it is divided by.
        nesterov: step by :math:`x + \mu b`; not with ``dampening``, and without momentum the same.
        scale_clip: the least and the most norm of weights that a gradient is scaled to, or None for any.
        trust_coefficient: :math:`\eta` in [0, inf). The paper has 0.001, with an lr a thousand times as large, which
            vectors then step by.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32) and ``momentum_buffer`` (as the weight; absent at momentum 0).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key, ``nesterov`` with ``dampening``.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, -4.0]]))
        >>> optimizer = LARS([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([[0.0, -0.5]])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.flatten().tolist()]
        [3.0, -3.5]

    References:
        Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888.
    """

    rule = LARSRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        scale_clip: tuple[float, float] | None = None,
        trust_coefficient: float = 1.0,
        **flags: Unpack[Flags],
    ) -> None:
        values: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        values |= {"nesterov": nesterov, "scale_clip": scale_clip, "trust_coefficient": trust_coefficient}
        super().__init__(params, {**values, **flags})
