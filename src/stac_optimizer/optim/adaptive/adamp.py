"""AdamP: Adam that does not lengthen weights whose length has no effect, as those before a normalization.

Reference: AdamP (Heo et al.), https://arxiv.org/abs/2006.08217.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.common import decay_
from stac_optimizer.rule.execution.preparation import Measuring, step_prepared
from stac_optimizer.rule.inputs import StepInputs
from stac_optimizer.rule.moments import (
    add_scaled_,
    average_,
    average_squares_,
    bias_corrections,
    denominators,
    descend_,
)
from stac_optimizer.tensors.device_tables import integers
from stac_optimizer.validation import boolean, non_negative, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdamP", "AdamPRule"]

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_sq"))


class AdamPRule(Rule):
    r"""Algorithm 1 of the paper, for parameters of two or more dimensions in two views, in this order.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        u &\leftarrow u - \hat p \, (\hat p \cdot u), \quad \hat p = p / (\lVert p \rVert + \epsilon), \quad
        \rho = \text{wd\_ratio}, \quad
        \text{ where } \max |\cos(p, g)| < \text{delta} / \sqrt{\dim p} \text{, else } \rho = 1 \\
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay} \cdot \rho) - \text{lr} \cdot u

    The third line is tried with p, g and u cut into the rows of the first dimension (channels), the largest cosine
    among them counting, and where it does not apply with the whole of them (the layer).

    ========================== ==========================================================================
    paper                      here
    ========================== ==========================================================================
    :math:`\beta_1, \beta_2`   ``betas``
    :math:`\eta, \delta`       ``lr``, ``delta``
    :math:`m_t, v_t`           state ``exp_avg``, ``exp_avg_sq``, as the parameter
    ========================== ==========================================================================

    With ``nesterov`` :math:`\beta_1 m + (1 - \beta_1) g` takes the place of m in u.
    """

    name = "adamp"
    needs = "tensor"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "delta": Hyperparameter(default=0.1, check=non_negative),
        "wd_ratio": Hyperparameter(default=0.1, check=non_negative),
        "nesterov": Hyperparameter(default=False, check=boolean),
    }
    state_keys = ("step", "exp_avg", "exp_avg_sq")
    counts_at_once = False

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def step(self, inputs: StepInputs) -> None:
        vectors = [index for index, param in enumerate(inputs.params) if param.ndim < 2]
        others = [index for index, param in enumerate(inputs.params) if param.ndim >= 2]
        if vectors:
            step_prepared(inputs.only(vectors), self.update_vectors)
        if others:
            measuring = Measuring(self.measured, self.settled, by_rows=True)
            step_prepared(inputs.only(others), self.update, measuring=measuring)

    def update_vectors(
        self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes
    ) -> None:
        """Of vectors there is no view that a length could have no effect in, as of scales and biases."""
        _average(grads, state, group)
        directions = _directions(grads, state, group)
        decay_(params, group)
        descend_(params, directions, group["lr"])

    def measured(self, params: TensorList, grads: TensorList, state: StateLists, group: Group) -> Sequence[TensorList]:
        """Products of weight, gradient and step, to be summed up over rows."""
        _average(grads, state, group)
        pairs = (params, grads), (grads, grads), (params, params), (params, _directions(grads, state, group))
        return [list(torch._foreach_mul(*pair)) for pair in pairs]

    def settled(
        self, measured: Sequence[TensorList], state: StateLists, group: Group, wholes: Wholes
    ) -> Sequence[TensorList]:
        """How much of each row of weights to take from the step, and the share of the decay."""
        eps, rows = group["eps"], torch.stack([torch.cat(sums) for sums in measured])
        heights = [len(sums) for sums in measured[0]]
        sizes = integers(wholes.numels, rows.device)
        widths = integers(
            [n // max(shape[0], 1) for n, shape in zip(wholes.numels, wholes.shapes, strict=True)], rows.device
        )
        lengths = integers(heights, rows.device)

        def by_row(values: Tensor) -> Tensor:
            return values.repeat_interleave(lengths, output_size=rows.shape[1])

        oblique = _cosines(rows, eps) >= by_row(_bounds(group, widths, rows.dtype))
        # In one collective the sums over the layer, and how many channels are not orthogonal to their gradients.
        kinds = torch.cat([rows, oblique.to(rows.dtype).unsqueeze(0)])
        layers = torch.segment_reduce(kinds.t().contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)
        layers = torch.stack(wholes.sums_over_rows(list(layers.unbind()))).t()
        are_rows, is_layer = layers[4] == 0, _cosines(layers, eps) < _bounds(group, sizes, rows.dtype)
        of_layer = torch.where(is_layer, _along(layers, eps), 0.0)
        parts = torch.where(by_row(are_rows), _along(rows, eps), by_row(of_layer))
        ratios = 1 - (are_rows | is_layer).to(rows.dtype) * (1 - group["wd_ratio"])
        return parts.split(heights), ratios.unbind()

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        parts, ratios = wholes.settled
        directions = _directions(grads, state, group)
        torch._foreach_sub_(directions, torch._foreach_mul(params, parts))
        if group["weight_decay"]:
            decay = group["lr"] * group["weight_decay"]
            torch._foreach_mul_(params, [1 - decay * ratio for ratio in ratios])
        descend_(params, directions, group["lr"])


def _average(grads: TensorList, state: StateLists, group: Group) -> None:
    beta1, beta2 = group["betas"]
    average_(state["exp_avg"], grads, beta1)
    average_squares_(state["exp_avg_sq"], grads, beta2)


def _directions(grads: TensorList, state: StateLists, group: Group) -> TensorList:
    """Adam's step of lr 1."""
    (beta1, beta2), averages = group["betas"], state["exp_avg"]
    if group["nesterov"]:
        averages = list(torch._foreach_mul(averages, beta1))
        add_scaled_(averages, grads, 1 - beta1)
    directions = list(torch._foreach_div(averages, bias_corrections(state["step"], beta1)))
    squares = state["exp_avg_sq"]
    torch._foreach_div_(directions, denominators(squares, bias_corrections(state["step"], beta2), group["eps"]))
    return directions


def _bounds(group: Group, numels: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cosine must be less than, of so many elements."""
    roots = numels.clamp(min=1).to(dtype).sqrt()
    return torch.full_like(roots, group["delta"]) / roots


def _cosines(sums: Tensor, eps: float) -> Tensor:
    """|p · g| / (‖p‖ ‖g‖), norms at least ε, of p · g, g · g and p · p."""
    return sums[0].abs() / (sums[1].sqrt().clamp(min=eps) * sums[2].sqrt().clamp(min=eps))


def _along(sums: Tensor, eps: float) -> Tensor:
    """By which p is in u, p · u / (‖p‖ + ε)²; 0 of no p, whose norm has no derivative."""
    is_none = sums[2] == 0
    norms = torch.where(is_none, 1.0, sums[2]).sqrt()
    return torch.where(is_none, 0.0, sums[3] / (norms + eps).square())


class AdamP(RuleOptimizer):
    r"""Adam without the part of a step along the weights, where their length has no effect.

    Weights before a normalization only turn; what momentum adds to their length makes later steps turn them less. Where
    weights and gradient are orthogonal, which tells such weights, that part is taken away, and decay is weaker.

    .. math::
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}, \quad
        u \leftarrow u - \hat p \, (\hat p \cdot u), \; \rho = \text{wd\_ratio}
            \text{ where } \max |\cos(p, g)| < \text{delta} / \sqrt{\dim p}, \quad
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay} \cdot \rho) - \text{lr} \cdot u

    It is tried for all channels together, the rows of the first dimension, then for the parameter as a whole; not for
    vectors. holocron's class of this name has no view of channels, takes the cosine with its sign and not its
    magnitude, adds the decay to the gradient, and projects vectors too. The authors' package is this one.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, in [0, inf); a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in [0, inf); also the least norm in a cosine.
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        delta: how small a cosine must be, in [0, inf); 0: Adam with decoupled decay.
        wd_ratio: what multiplies the decay of weights whose length has no effect, in [0, inf).
        nesterov: look ahead by one more gradient.
        **flags: see :class:`stac_optimizer.rule.Flags`.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the weight).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import AdamP
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = AdamP([weight], lr=0.25)
        >>> weight.grad = torch.tensor([[0.001, 1.0]])  # nearly orthogonal
        >>> optimizer.step()
        >>> [[round(value, 4) for value in row] for row in weight.tolist()]
        [[1.0, -0.25]]

    References:
        AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights,
        https://arxiv.org/abs/2006.08217.
    """

    rule = AdamPRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**values, "delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov, **flags})
