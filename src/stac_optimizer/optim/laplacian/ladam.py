"""LAdam: Adam whose second moments each weight shares with its neighbours, by a Laplacian.

Reference: the package ladam 0.2.0, https://github.com/gpartin/ladam.
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
    at,
    coupled,
    denominators,
    diffused_squares,
    in_blocks,
)
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, StateLists, StateTensor, TensorList
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.moments import Factors, average_, average_squares_, bias_corrections, descend_
from stac_optimizer.validation import non_negative, one_of, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAdam", "LAdamRule", "WaveAdam"]

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_sq"))


def _mode(name: str, value: Any) -> str:
    chosen: str = one_of(name, value, ("variance_lap", "update_lap", "weight_lap"))
    return chosen


class LAdamRule(DiffusingRule):
    r"""Adam with one quantity more that diffuses, in this order.

    .. math::
        g &\leftarrow g + \lambda p \quad \text{(decoupled: } p \leftarrow p (1 - \text{lr} \, \lambda)) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \hat v &= v / (1 - \beta_2^t), \quad
            \hat v \leftarrow \max(0, \hat v + c_2 \Delta \hat v) \quad \text{(variance\_lap)} \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}, \quad
            u \leftarrow u + c_2 \Delta u \quad \text{(update\_lap)} \\
        p &\leftarrow p - \text{lr} \, u, \quad p \leftarrow p + c_2 \Delta p \quad \text{(weight\_lap)}

    ========================== ==========================================================================
    package                    here
    ========================== ==========================================================================
    :math:`c^2, \nabla^2`      ``c2``; :math:`\Delta`, see ``stencil.py``
    :math:`\beta_1, \beta_2`   ``betas``
    ``m, v``                   state ``exp_avg``, ``exp_avg_sq``, as the parameter
    ========================== ==========================================================================
    """

    name = "ladam"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "mode": Hyperparameter(default="variance_lap", check=_mode),
        **COMMON,
    }
    state_keys = ("step", "exp_avg", "exp_avg_sq")

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def move(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, diffused: Diffused) -> None:
        (beta1, beta2), mode = group["betas"], group["mode"] if group["c2"] else None
        averages, squares = state["exp_avg"], state["exp_avg_sq"]
        corrections = bias_corrections(state["step"], beta1), bias_corrections(state["step"], beta2)
        for _, some in in_blocks(params, grads, averages, squares):
            given = coupled(some.params, some.grads, group)
            average_(some.states[0], given, beta1)
            average_squares_(some.states[1], given, beta2)
            if group["decoupled_weight_decay"]:
                decay_(some.params, group)
        if mode == "update_lap":
            directions = list(torch._foreach_div(averages, corrections[0]))
            for places, some in in_blocks(directions, squares):
                torch._foreach_div_(some.params, _denominators(some.grads, at(places, corrections[1]), group))
            for _, some in in_blocks(params, diffused(directions)):
                descend_(some.params, some.grads, group["lr"])
            return
        if mode == "variance_lap":
            squares = diffused_squares(squares, group, diffused)
        for places, some in in_blocks(params, averages, squares):
            first, second = (at(places, each) for each in corrections)
            directions = list(torch._foreach_div(some.grads, _denominators(some.states[0], second, group)))
            descend_(some.params, directions, group["lr"], first)
        if mode == "weight_lap":
            for param, weights in zip(params, diffused(params), strict=True):
                if weights is not param:
                    param.copy_(weights)


def _denominators(squares: TensorList, corrections: Factors, group: Group) -> TensorList:
    return denominators(list(torch._foreach_div(squares, corrections)), group["eps"])


class LAdam(RuleOptimizer):
    r"""Adam whose second moments each weight shares with its neighbours: for weights that are samples of something.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \text{lr} \, \frac{m / (1 - \beta_1^t)}
            {\sqrt{\max(0, v + c_2 \Delta v) / (1 - \beta_2^t)} + \epsilon}

    :math:`\Delta` is the discrete Laplacian, what a value's neighbours have more than it has. A tensor of more than two
    dimensions is a field of its first dimension by the rest, a vector a line; edges are joined, so that the first row
    is beside the last. Fields of fewer than 3 rows or columns, lines of fewer than 4 elements and single numbers have
    none. Real and imaginary parts are fields of their own.

    Whole tensors are needed: shards of DTensors are gathered, one owner computes. Where a framework flattens parameters
    (ZeRO, DeepSpeed) every parameter is a part of one long line to this class, which it cannot know: neighbours are
    then those in memory alone, also across the borders of parameters. Give ``c2=0`` there.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, as AdamW's, in [0, inf); a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: added to the gradient, times the weight, in [0, inf).
        c2: how much of the Laplacian is added, in [0, inf); 0 is Adam. Values keep their sign below 0.3 (9point) or
            0.25 (5point). See :func:`suggest_c2`.
        mode: what diffuses. ``"variance_lap"``: the second moments. ``"update_lap"``: the steps, before lr.
            ``"weight_lap"``: the weights, after each step and whatever lr is: at lr 0 they move too, but not in the
            step of zero gradients by which torch.distributed.checkpoint makes state.
        stencil: ``"9point"``: sides weigh 2/3, corners 1/6; ``"5point"``: sides alone, 1.
        min_spatial_size: of how many elements a tensor must be to have a Laplacian, 0 or more.
        decoupled_weight_decay: decay as AdamW does, multiplied by lr, and not through the gradient.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import LAdam
        >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = LAdam([weight], lr=0.1, c2=0.1)
        >>> weight.grad = torch.eye(4)
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight[0].tolist()]
        [-0.1195, 0.0, 0.0, 0.0]

    References:
        The package ladam 0.2.0, https://github.com/gpartin/ladam, whose steps these are to rounding, but for two. There
        second moments are floored at eps where they diffuse, so that gradients below 1e-4 step too little, those of
        1e-6 a hundred times; here at 0. There a tensor's first step decides whether c2 is 0 for it; here each does.
        From 0.3 on its decay is decoupled.
    """

    rule = LAdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        c2: float = 1e-4,
        mode: str = "variance_lap",
        stencil: str = "9point",
        min_spatial_size: int = 16,
        *,
        decoupled_weight_decay: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "c2": c2,
            "mode": mode,
            "stencil": stencil,
            "min_spatial_size": min_spatial_size,
            "decoupled_weight_decay": decoupled_weight_decay,
            **flags,
        }
        super().__init__(params, values)


WaveAdam = LAdam
"""The package's former name of it."""
