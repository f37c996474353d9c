"""The trunk's rule: the sign of a gradient average, with decoupled weight decay. All its paths stand side by side.

References: signSGD with Majority Vote (Bernstein et al.), https://arxiv.org/abs/1810.05291; Momentum Ensures
Convergence of SIGNSGD under Weaker Assumptions (Sun et al., ICML 2023); the mask: Cautious Optimizers (Liang et al.),
https://arxiv.org/abs/2411.16085.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from stac_optimizer import _tensors
from stac_optimizer._validation import boolean, unit_fraction
from stac_optimizer.rules._rule import Group, Hyperparameter, Rule, StateTensor, StepInputs

__all__ = ["SignMomentum"]

# Liang et al. divide the masked step by the mean of the mask, floored by this.
LEAST_AGREEMENT = 1e-3


class SignMomentum(Rule):
    r"""Moves each weight by exactly lr against the sign of a gradient average.

    For parameter :math:`p`, gradient :math:`g` (negated under ``maximize``), average :math:`m` with :math:`m_0 = 0`, in
    this order:

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow m + (1 - \mu)(g - m) \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{sign}(m)

    ============================ =========================================================
    paper                        here
    ============================ =========================================================
    :math:`\mu`                  ``trunk_momentum``; 0 takes :math:`m = g` and keeps no state
    :math:`m`                    state ``exp_avg``, as the parameter
    mask :math:`[m \cdot g > 0]` with ``trunk_cautious``: sign(m) becomes sign(m) · mask / max(mean(mask), 1e-3)
    ============================ =========================================================

    State: ``step`` (0-dim float32, a count that no arithmetic reads) and ``exp_avg``.
    """

    name = "sign_momentum"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "trunk_momentum": Hyperparameter(default=0.9, check=unit_fraction),
        "trunk_cautious": Hyperparameter(default=False, check=boolean),
    }

    state_keys = frozenset({"step", "exp_avg"})

    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        """The counter, and with momentum the average."""
        step = StateTensor(key="step", counter=True)
        return (step, StateTensor(key="exp_avg")) if group["trunk_momentum"] else (step,)

    def advice(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        """Warn of low-precision weights that the lr cannot move."""
        lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
        stuck = [name for name, param in zip(names, params, strict=True) if _is_step_lost(param, lr)]
        if not stuck:
            return None
        return (
            f"an lr of {lr:g} is less than half the spacing between neighbouring values for most weights of "
            f"{', '.join(map(repr, stuck))}, so their steps round to nothing. Keep float32 weights (and compute under "
            "torch.autocast) or raise trunk_lr"
        )

    def update(self, inputs: StepInputs) -> None:
        """Count the step and run the kernel of the path that the flags ask for."""
        params, group = inputs.params, inputs.group
        steps, *averages = inputs.states
        _tensors.count_step_(steps)
        grads = _tensors.unscaled(_tensors.local_views(inputs.grads, params), inputs.grad_scale)
        local = (_tensors.local_views(params), grads, *map(_tensors.local_views, averages))
        kernel = _multi_tensor_sign_momentum if self.path(params, group) == "foreach" else _single_tensor_sign_momentum
        kernel(params, [_tensors.real_views(tensors) for tensors in local], group)


def _is_step_lost(param: Tensor, lr: float) -> bool:
    if param.dtype not in _tensors.LOW_PRECISION or param.is_meta or not param.numel() or not lr:
        return False
    param = _tensors.local_views([param.detach()])[0]
    weights = param.float()
    stays = ((weights - lr).to(param.dtype) == param) & ((weights + lr).to(param.dtype) == param)
    return bool(stays.float().mean() > 0.5)


# Note [Same operations on every path]
# A difference in the last bit of m can flip a sign and so move a weight by 2 lr. So the paths run the same operations
# in the same order, and each operation is a single correctly rounded one: m + (1 - mu)(g - m) is written out, not
# lerp_, because a fused multiply-add rounds once where two operations round twice, and kernels differ in using it.
# Low precision: see Note [Low-precision arithmetic]; the sign is that of m before it is rounded to be stored, which in
# float16 may leave nothing of a small average.
#
# Note [Non-finite averages]
# torch.sign(nan) is 0, which would freeze a weight for ever without a word. sign(m) + 0 * m is sign(m) for every finite
# m, and NaN for NaN and infinity, so the weight shows what happened, as AdamW's would.


def _coefficients(group: Group, device: torch.device) -> tuple[float | Tensor, float | Tensor | None]:
    """The lr, and the factor that decays weights or None. A tensor lr stays one: a captured step then sees changes."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(device)
    return lr, 1 - lr * group["weight_decay"] if group["weight_decay"] else None


def _mask(average: Tensor, grad: Tensor, group: Group) -> Tensor:
    """[m * g > 0] as 1 and 0, by the signs, for the product may underflow. ``grad`` is as it came, not negated.

    In numbers, not booleans, whose products and comparisons are several times slower on the CPU.
    """
    product = torch.sign(average).mul_(torch.sign(grad))
    return (product.neg_() if group["maximize"] else product).clamp_min_(0)


def _mean_of_mask(agreeing: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean over a whole parameter, floored. A count over a number: exact however that is cut or sharded."""
    numel = whole.numel() * (2 if whole.is_complex() else 1)
    return (_tensors.sum_over_shards(agreeing, whole).to(dtype) / numel).clamp_(min=LEAST_AGREEMENT)


def _single_tensor_sign_momentum(wholes: list[Tensor], tensorlists: Sequence[list[Tensor]], group: Group) -> None:
    cautious = group["trunk_cautious"]
    # A mean over shards is taken parameter by parameter.
    pack = not (cautious and any(_tensors.is_sharded(whole) for whole in wholes))
    for unit in _tensors.units(wholes, tensorlists, pack=pack):
        mean = _mean_of_unit(unit, group) if cautious else None
        for piece in unit.pieces:
            _update_piece(piece, mean, group)


def _mean_of_unit(unit: _tensors.Unit, group: Group) -> Tensor:
    """The mean of a parameter's mask, or one for each element of a pack.

    It comes before the first weight, so averages are computed here and again in the update: that costs less than
    keeping them.
    """
    masks = (_next_mask(grad, exp_avg, group) for _, grad, *exp_avg in unit.pieces)
    dtype = _tensors.arithmetic_dtype(unit.pieces[0][0].dtype)
    if unit.whole is not None:
        return _mean_of_mask(torch.stack([mask.count_nonzero() for mask in masks]).sum(), unit.whole, dtype)
    agreeing = torch.stack([part.count_nonzero() for mask in masks for part in mask.split(list(unit.sizes))])
    sizes = torch.tensor(unit.sizes)
    means = (agreeing.to(dtype) / sizes).clamp_(min=LEAST_AGREEMENT)
    return means.repeat_interleave(sizes, output_size=sum(unit.sizes))


def _next_mask(grad: Tensor, exp_avg: Sequence[Tensor], group: Group) -> Tensor:
    """The mask that the update will find."""
    average, change = _average(grad, exp_avg, group)
    return _mask(average if change is None else average + change, grad, group)


def _average(grad: Tensor, exp_avg: Sequence[Tensor], group: Group) -> tuple[Tensor, Tensor | None]:
    """The average in arithmetic precision and the change due to it; without momentum the gradient and None."""
    grad = _tensors.upcast(-grad if group["maximize"] else grad)
    if not exp_avg:
        return grad, None
    average = _tensors.upcast(exp_avg[0])
    return average, (grad - average).mul_(1 - group["trunk_momentum"])


def _update_piece(piece: Sequence[Tensor], mean: Tensor | None, group: Group) -> None:
    """Update a piece (weight, gradient, average), without momentum (weight, gradient); masked if there is a mean."""
    param, grad, *exp_avg = piece
    lr, decay_factor = _coefficients(group, param.device)
    average, change = _average(grad, exp_avg, group)
    if change is not None:
        average.add_(change)
        _tensors.downcast(average, exp_avg[0])
    weight = _tensors.upcast(param)
    if decay_factor is not None:
        weight.mul_(decay_factor)
    direction = torch.sign(average).add_(average, alpha=0)  # Note [Non-finite averages]
    if mean is not None:
        direction.mul_(_mask(average, grad, group)).div_(mean)
    if mean is None and not isinstance(lr, Tensor):
        weight.sub_(direction, alpha=lr)  # a pass less, and the same bits: a product with 1, 0 or -1 is exact
    else:
        weight.sub_(direction.mul_(lr))
    _tensors.downcast(weight, param)


def _multi_tensor_sign_momentum(wholes: list[Tensor], tensorlists: Sequence[list[Tensor]], group: Group) -> None:
    for indices in _tensors.indices_by_device_and_dtype(tensorlists):
        params, grads, *exp_avgs = [[tensors[index] for index in indices] for tensors in tensorlists]
        lr, decay_factor = _coefficients(group, params[0].device)
        averages = _multi_tensor_average(grads, exp_avgs, group)
        weights = _tensors.foreach_upcast(params)
        if decay_factor is not None:
            _tensors.foreach_mul_(weights, decay_factor)
        directions = list(_tensors.foreach_sign(averages))
        _tensors.foreach_add_(directions, averages, alpha=0)  # Note [Non-finite averages]
        if group["trunk_cautious"]:
            for index, direction, average, grad in zip(indices, directions, averages, grads, strict=True):
                mask = _mask(average, grad, group)
                direction.mul_(mask).div_(_mean_of_mask(mask.count_nonzero(), wholes[index], direction.dtype))
        _tensors.foreach_mul_(directions, lr)
        _tensors.foreach_sub_(weights, directions)
        _tensors.foreach_downcast(weights, params)


def _multi_tensor_average(grads: list[Tensor], exp_avgs: Sequence[list[Tensor]], group: Group) -> list[Tensor]:
    """Update and return the averages, in arithmetic precision, of lists of one device and dtype."""
    grads = _tensors.foreach_upcast(list(_tensors.foreach_neg(grads)) if group["maximize"] else grads)
    if not exp_avgs:
        return grads
    averages = _tensors.foreach_upcast(exp_avgs[0])
    differences = _tensors.foreach_sub(grads, averages)
    _tensors.foreach_mul_(differences, 1 - group["trunk_momentum"])
    _tensors.foreach_add_(averages, differences)
    _tensors.foreach_downcast(averages, exp_avgs[0])
    return averages
