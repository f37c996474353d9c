"""LAMB: Adam's step, scaled for each parameter to the norm of its weights.

Reference: Large Batch Optimization for Deep Learning (You et al.), https://arxiv.org/abs/1904.00962.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stac_optimizer.optim.layerwise.trust import AdamByTrustRule, adam_steps
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import Flags, Group, Hyperparameter, StateLists, TensorList
from stac_optimizer.validation import clipping_range, non_negative, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "LAMBRule"]


class LAMBRule(AdamByTrustRule):
    r"""Algorithm 2 of the paper, in this order.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p \\
        p &\leftarrow p - \text{lr} \, \frac{\phi(\lVert p \rVert)}{\lVert u \rVert} \, u

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\eta_t, \lambda`    ``lr``, ``weight_decay``
    :math:`\phi`               clips to ``scale_clip``
    :math:`m_t, v_t`           state ``exp_avg``, ``exp_avg_sq``, as the parameter
    :math:`r_t + \lambda x_t`  :math:`u`
    ========================== ==========================================================================
    """

    name = "lamb"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "scale_clip": Hyperparameter(default=(0.0, 10.0), check=clipping_range),
    }

    def directions(self, state: StateLists, group: Group) -> TensorList:
        return adam_steps(state["exp_avg"], state["exp_avg_sq"], state["step"], group)


class LAMB(RuleOptimizer):
    r"""Adam's step, scaled for each parameter to the norm of its weights; made for very large batches.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \text{weight\_decay} \cdot p, \quad
        p \leftarrow p - \text{lr} \, \frac{\operatorname{clip}(\lVert p \rVert)}{\lVert u \rVert} \, u

    Where either norm is 0 the ratio is 1. Vectors are scaled as matrices are, as the paper's algorithm says; the
    authors' code takes Adam's step without decay for biases and norms, as does
    ``STAC(model, trunk_optimizer=LAMB, cap=vectors())``. holocron's class of this name leaves out the corrections of
    the bias.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: by what share of its norm a step moves a parameter, in [0, inf); a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: added to the step before its norm is taken, in [0, inf).
        scale_clip: the least and the most norm of weights that a step is scaled to, or None for any.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import LAMB
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = LAMB([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -0.5])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [2.6464, -3.6464]

    References:
        Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, https://arxiv.org/abs/1904.00962.
    """

    rule = LAMBRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale_clip: tuple[float, float] | None = (0.0, 10.0),
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "scale_clip": scale_clip}
        super().__init__(params, {**values, **flags})
