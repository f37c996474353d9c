"""The arithmetic of the trunk's update on one piece of a weight. See ``signum.py`` for the rule.

Note [Same operations on every path]. A difference in the last bit of m can flip a sign and so move a weight by 2 lr. So
the paths run the same operations in the same order, and each operation is a single correctly rounded one:
m + (1 - mu)(g - m) is written out, not lerp_, because a fused multiply-add rounds once where two operations round
twice, and kernels differ in using it. Low precision: see Note [Low-precision arithmetic]; the sign is that of m before
it is rounded to be stored, which in float16 may leave nothing of a small average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.rule import Group
from stac_optimizer.rule.common import LEAST_MASK_MEAN
from stac_optimizer.tensors import codes, rounding
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.precision import arithmetic_lr, downcast, upcast
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.pieces import Lists, Tensors, is_recorded

__all__ = [
    "LEAST_MASK_MEAN",
    "Coefficients",
    "SignUpdate",
    "accumulate",
    "masked_lr",
    "move",
    "next_mask",
    "update",
    "wider",
]


class Coefficients(NamedTuple):
    """What an update multiplies by: floats, or tensors of no dimension.

    Args:
        lr: the learning rate.
        decay_factor: 1 - lr * weight_decay; None without decay.
        change_factor: 1 - momentum.
        grad_scale: what gradients are divided by, or None.
    """

    lr: float | Tensor
    decay_factor: float | Tensor | None
    change_factor: float | Tensor
    grad_scale: Tensor | None


class SignUpdate(NamedTuple):
    """The update of some parameters of one group.

    Args:
        params: the parameters as the optimizer holds them, DTensors and complex ones whole.
        lists: their local, real parts, and those of their gradients and averages.
        group: their group.
        grad_scale: what a GradScaler left the gradients multiplied by.
        noise_seeds: for each parameter a number, where weights or averages are rounded by chance.
        found_inf: not 0 where a GradScaler found NaN or infinity; given to kernels that can skip the step themselves.
    """

    params: list[Tensor]
    lists: Lists
    group: Group
    grad_scale: Tensor | None
    noise_seeds: Tensor | None
    found_inf: Tensor | None

    def only(self, chosen: Sequence[int]) -> SignUpdate:
        """The same for the parameters at these positions."""
        if len(chosen) == len(self.params):
            return self
        seeds = None if self.noise_seeds is None else torch.stack([self.noise_seeds[index] for index in chosen])
        return self.using([self.params[index] for index in chosen], self.lists.only(chosen), seeds)

    def using(self, params: list[Tensor], lists: Lists, noise_seeds: Tensor | None) -> SignUpdate:
        """The same on other tensors; torch.compile of torch 2.6 knows no ``_replace``."""
        return SignUpdate(params, lists, self.group, self.grad_scale, noise_seeds, self.found_inf)

    def coefficients(self, device: torch.device) -> Coefficients:
        """What the group says to multiply by. A tensor lr stays one: a captured step then sees its changes."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            # What lies on the host is read there: to bring it to the device would wait for that.
            is_readable = lr.is_cpu and device.type != "cpu" and not (lr.requires_grad or torch.compiler.is_compiling())
            lr = lr.item() if is_readable else arithmetic_lr(lr).to(device)
        decay_factor = 1 - lr * self.group["weight_decay"] if self.group["weight_decay"] else None
        scale = None if self.grad_scale is None else self.grad_scale.to(device)
        return Coefficients(lr, decay_factor, 1 - self.group["momentum"], scale)


def _prepared(grad: Tensor, coefficients: Coefficients, *, maximize: bool) -> Tensor:
    """The gradient to descend along, in arithmetic precision: what a scale saved would underflow in less."""
    grad = upcast(grad)
    if coefficients.grad_scale is not None:
        grad = grad / coefficients.grad_scale
    return -grad if maximize else grad


def _average(
    grad: Tensor, tensors: Tensors, coefficients: Coefficients, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor | None]:
    """The average in arithmetic precision and the change due to it; without momentum the gradient and None."""
    if not tensors.state:
        return grad, None
    (held,) = tensors.state
    if tensors.scale is not None:
        average = codes.decode(held, tensors.scale, scratch)
        grad = grad.to(average.dtype)
    else:
        average = held.to(wider(held, grad))
    change = torch.sub(grad, average, out=None if scratch is None else scratch.like(average))
    return average, change.mul_(coefficients.change_factor)


def wider(average: Tensor, grad: Tensor) -> torch.dtype:
    """What an average is computed in: as the gradient, or as a checkpoint brought it."""
    return torch.promote_types(average.dtype, grad.dtype)


def _sign(tensor: Tensor, scratch: Scratch | None, place: int = 0) -> Tensor:
    # A constant for derivatives: what is not recorded may be changed in place.
    return torch.sign(tensor.detach(), out=None if scratch is None else scratch.like(tensor, place))


def _mask(signs: Tensor, grad: Tensor, scratch: Scratch | None) -> Tensor:
    """[m * g > 0] as 1 and 0, from the signs of m, for the product may underflow.

    In coefficients, not booleans, whose products and comparisons are several times slower on the CPU.
    """
    return _sign(grad, scratch, 1).mul_(signs).clamp_min_(0)


def next_mask(
    tensors: Tensors, coefficients: Coefficients, *, maximize: bool, scratch: Scratch | None = None
) -> Tensor:
    """The mask that :func:`update` will find. Writes nothing."""
    grad = _prepared(tensors.grad, coefficients, maximize=maximize)
    average, change = _average(grad, tensors, coefficients, scratch)
    return _mask(_sign(average if change is None else change.add_(average), scratch), grad, scratch)


def update(
    tensors: Tensors,
    coefficients: Coefficients,
    *,
    maximize: bool,
    mean: Tensor | None,
    noise: Tensor | None,
    rounds: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update one piece.

    Args:
        tensors: weight and gradient; with momentum the average.
        coefficients: what to multiply by.
        maximize: whether to ascend.
        mean: of the mask; None for a step without one.
        noise: a random int32 for each weight, or for each block of codes where weights are rounded to the nearest;
            None where averages are, too.
        rounds: whether weights are rounded by chance.
        scratch: for temporaries; None to allocate.
    """
    param = tensors.param
    grad, average = accumulate(tensors, coefficients, maximize=maximize, noise=noise, scratch=scratch)
    noise = noise if rounds else None
    direction = _sign(average, scratch)
    mask = None if mean is None else _mask(direction, grad, scratch)
    direction.add_(average, alpha=0)  # Note [Non-finite averages]
    lr = coefficients.lr
    if mask is not None and mean is not None:
        direction.mul_(mask)
        lr = _as_number(masked_lr(lr, mean))
    move(param, direction, lr, coefficients.decay_factor, noise=noise)


def masked_lr(lr: float | Tensor, mean: Tensor) -> Tensor:
    """How far a step goes where its mask lets it pass, from the mask's mean, or those of several."""
    return torch.ones_like(mean).div_(mean).mul_(lr.to(mean.dtype) if isinstance(lr, Tensor) else lr)


def _as_number(lr: Tensor) -> float | Tensor:
    """As a number where that can be read without waiting."""
    is_readable = not lr.ndim and lr.is_cpu and has_data(lr) and not is_recorded()
    return lr.item() if is_readable else lr


def accumulate(
    tensors: Tensors, coefficients: Coefficients, *, maximize: bool, noise: Tensor | None, scratch: Scratch | None
) -> tuple[Tensor, Tensor]:
    """Take a gradient into the average; arguments as for :func:`update`.

    Returns:
        The gradient to descend along, and the average before it is rounded to be stored.
    """
    grad = _prepared(tensors.grad, coefficients, maximize=maximize)
    average, change = _average(grad, tensors, coefficients, scratch)
    if change is not None:
        average.add_(change)
        _store(average, tensors, noise, scratch)
    return grad, average


def move(
    param: Tensor,
    direction: Tensor,
    lr: float | Tensor,
    decay_factor: float | Tensor | None,
    *,
    noise: Tensor | None,
) -> None:
    """Decay weights and move them against a direction, which is used up.

    Args:
        param: the weights.
        direction: of 1, 0 and -1, so that its product with lr is exact; or that product, with an lr of 1.
        lr: what it is multiplied by.
        decay_factor: what weights are multiplied by first, or None.
        noise: a random int32 for each weight, to round by; None to round to nearest.
    """
    weight = upcast(param)
    if decay_factor is not None:
        # A tensor in the weights' dtype: of two without dimensions the wider one's is computed in.
        weight.mul_(decay_factor.to(weight.dtype) if isinstance(decay_factor, Tensor) else decay_factor)
    if not isinstance(lr, Tensor):
        weight.sub_(direction, alpha=lr)  # a pass less, and the same bits
    else:
        weight.sub_(direction.to(torch.promote_types(direction.dtype, weight.dtype)).mul_(lr))
    if noise is None:
        downcast(weight, param)
    else:
        rounding.round_into(weight, param, noise)


def _store(average: Tensor, tensors: Tensors, noise: Tensor | None, scratch: Scratch | None) -> None:
    """Round an average by chance where there is noise, by bits of it that weights leave over."""
    (held,) = tensors.state
    if tensors.scale is not None:
        codes.encode_(average, held, tensors.scale, None if noise is None else noise[..., :1], scratch)
    elif noise is not None and held.dtype == torch.bfloat16:
        rounding.round_into(average.float(), held, noise << 16)
    else:
        downcast(average, held)
