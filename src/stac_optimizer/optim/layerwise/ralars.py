"""RaLars: RAdam's step, scaled for each parameter to the norm of its weights.

References: On the Variance of the Adaptive Learning Rate and Beyond (Liu et al.), https://arxiv.org/abs/1908.03265;
Large Batch Training of Convolutional Networks (You et al.), https://arxiv.org/abs/1708.03888.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optim.layerwise.trust import AdamByTrustRule, adam_steps
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import Flags, Group, Hyperparameter, StateLists, TensorList
from stac_optimizer.rule.moments import Factors, bias_corrections, known_counts
from stac_optimizer.tensors.precision import widest_dtype
from stac_optimizer.validation import boolean, clipping_range, non_negative, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RaLars", "RaLarsRule"]

# The variance of 1 / √v is known, and not infinite, from here on.
LEAST_LENGTH = 5.0


class RaLarsRule(AdamByTrustRule):
    r"""Algorithm 2 of Liu et al., its step scaled as by You et al., in this order.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= 2 / (1 - \beta_2) - 1, \quad
            \rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t), \quad
            r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        \hat m &= m / (1 - \beta_1^t), \quad \hat v = v / (1 - \beta_2^t) \\
        u &= r_t \, \hat m / (\sqrt{\hat v} + \epsilon) + \lambda p
            \quad \text{where } \rho_t > 5, \text{ else } \hat m + \lambda p \\
        p &\leftarrow p - \text{lr} \, \frac{\phi(\lVert p \rVert)}{\lVert u \rVert} \, u

    ========================== ==========================================================================
    papers                     here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\alpha_t, \lambda`  ``lr``, ``weight_decay``
    :math:`\phi`               clips to ``scale_clip``
    :math:`m_t, v_t`           state ``exp_avg``, ``exp_avg_sq``, as the parameter
    ========================== ==========================================================================

    With ``force_adaptive_momentum`` u is :math:`\hat m / (\sqrt{\hat v} + \epsilon) + \lambda p` in the other case.
    """

    name = "ralars"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "force_adaptive_momentum": Hyperparameter(default=False, check=boolean),
        "scale_clip": Hyperparameter(default=(0.0, 10.0), check=clipping_range),
    }

    def directions(self, state: StateLists, group: Group) -> TensorList:
        averages, squares, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
        rates = rectifications(steps, group)
        if isinstance(rates[0], Tensor):
            pairs = zip(adam_steps(averages, squares, steps, group), _plain_steps(averages, steps, group), strict=True)
            return [torch.where(rate > 0, a * rate, plain) for (a, plain), rate in zip(pairs, rates, strict=True)]
        adaptive, plain = ([place for place, rate in enumerate(rates) if (rate > 0) == kind] for kind in (True, False))
        found: dict[int, Tensor] = {}
        if adaptive:
            made = adam_steps(_only(averages, adaptive), _only(squares, adaptive), _only(steps, adaptive), group)
            torch._foreach_mul_(made, [rates[place] for place in adaptive])
            found.update(zip(adaptive, made, strict=True))
        if plain:
            found.update(zip(plain, _plain_steps(_only(averages, plain), _only(steps, plain), group), strict=True))
        return [found[place] for place in range(len(rates))]


def rectifications(steps: TensorList, group: Group) -> Factors:
    """The r of each parameter, by which Adam's step is multiplied; 0 where it must not be taken."""
    beta2 = group["betas"][1]
    least, longest = float(group["force_adaptive_momentum"]), 2 / (1 - beta2) - 1
    if longest <= LEAST_LENGTH:
        return [least] * len(steps)
    counts = known_counts(steps)
    if counts is None:  # lengths are differences of much larger numbers
        steps = [step.to(widest_dtype(step.device)) for step in steps]
    told: list[Any] = list(counts or steps)
    corrections: list[Any] = list(bias_corrections(steps, beta2))
    rates: list[Any] = []
    for count, correction in zip(told, corrections, strict=True):
        length = longest - 2 * count * (1 - correction) / correction
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        if isinstance(square, Tensor):
            rates.append(torch.where(length > LEAST_LENGTH, square.clamp(min=0).sqrt(), least))
        else:
            rates.append(math.sqrt(square) if length > LEAST_LENGTH else least)
    return rates


def _plain_steps(averages: TensorList, steps: TensorList, group: Group) -> TensorList:
    return list(torch._foreach_div(averages, bias_corrections(steps, group["betas"][0])))


def _only(tensors: TensorList, places: Sequence[int]) -> TensorList:
    return [tensors[place] for place in places]


class RaLars(RuleOptimizer):
    r"""Adam whose step is rectified while its average of squares is young, scaled to the norm of the weights.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        u = r_t \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
            + \text{weight\_decay} \cdot p, \quad
        p \leftarrow p - \text{lr} \, \frac{\operatorname{clip}(\lVert p \rVert)}{\lVert u \rVert} \, u

    Here r grows from 0 to 1, as RAdam has it. While it is not known (:math:`\rho_t \le 5`, with the default betas in
    the first five steps) the average :math:`m / (1 - \beta_1^t)` takes the place of its product. As u is scaled to the
    norm of the weights, r does not change the length of a step but the share of the decay in it. Where either norm is
    0, the ratio is 1. The bound 5 is that of the authors' code and of torch; the paper's algorithm and holocron's class
    of this name have 4, a step earlier, with r near 0.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: by what share of its norm a step moves a parameter, in [0, inf); a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1). Up to a :math:`\beta_2` of 2/3 no step is rectified.
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: added to the step before its norm is taken, in [0, inf).
        force_adaptive_momentum: take Adam's step while r is not known.
        scale_clip: the least and the most norm of weights that a step is scaled to, or None for any.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import RaLars
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = RaLars([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.0, -0.5])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [3.0, -3.5]

    References:
        On the Variance of the Adaptive Learning Rate and Beyond, https://arxiv.org/abs/1908.03265.
        Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888.
    """

    rule = RaLarsRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        force_adaptive_momentum: bool = False,
        scale_clip: tuple[float, float] | None = (0.0, 10.0),
        **flags: Unpack[Flags],
    ) -> None:
        values: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        values |= {"force_adaptive_momentum": force_adaptive_momentum, "scale_clip": scale_clip}
        super().__init__(params, {**values, **flags})
