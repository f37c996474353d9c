"""The arithmetic of the trunk's update on one piece of a weight. See :mod:`.sign_momentum` for the rule.

Note [Same operations on every path]. A difference in the last bit of m can flip a sign and so move a weight by 2 lr. So
the paths run the same operations in the same order, and each operation is a single correctly rounded one:
m + (1 - mu)(g - m) is written out, not lerp_, because a fused multiply-add rounds once where two operations round
twice, and kernels differ in using it. Low precision: see Note [Low-precision arithmetic]; the sign is that of m before
it is rounded to be stored, which in float16 may leave nothing of a small average.

Note [Non-finite averages]. torch.sign(nan) is 0, which would freeze a weight for ever without a word. sign(m) + 0 * m
is sign(m) for every finite m, and NaN for NaN and infinity, so the weight shows what happened, as AdamW's would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer import _codes, _rounding, _tensors
from stac_optimizer._units import Scratch
from stac_optimizer.rules._rule import Group

__all__ = [
    "LEAST_AGREEMENT",
    "Numbers",
    "Work",
    "accumulate",
    "move",
    "next_mask",
    "update",
    "wider",
]

# Liang et al. divide the masked step by the mean of the mask, floored by this.
LEAST_AGREEMENT = 1e-3


class Numbers(NamedTuple):
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


class Work(NamedTuple):
    """The update of some parameters of one group.

    Args:
        wholes: the parameters.
        tensorlists: their local, real parts; their gradients'; with momentum their averages', as codes also the scales.
        group: their group.
        grad_scale: what a GradScaler left the gradients multiplied by.
        salt: for stochastic rounding, a number for each parameter.
        found_inf: not 0 where a GradScaler found NaN or infinity; given to kernels that can skip the step themselves.
    """

    wholes: list[Tensor]
    tensorlists: list[list[Tensor]]
    group: Group
    grad_scale: Tensor | None
    salt: Tensor | None
    found_inf: Tensor | None

    def only(self, chosen: Sequence[int]) -> Work:
        """The same for the parameters at these positions."""
        if len(chosen) == len(self.wholes):
            return self
        tensorlists = [[tensors[index] for index in chosen] for tensors in self.tensorlists]
        salt = None if self.salt is None else torch.stack([self.salt[index] for index in chosen])
        return self.using([self.wholes[index] for index in chosen], tensorlists, salt)

    def using(self, wholes: list[Tensor], tensorlists: list[list[Tensor]], salt: Tensor | None) -> Work:
        """The same on other tensors; torch.compile of torch 2.6 knows no ``_replace``."""
        return Work(wholes, tensorlists, self.group, self.grad_scale, salt, self.found_inf)

    def numbers(self, device: torch.device) -> Numbers:
        """The group's numbers. A tensor lr stays one: a captured step then sees its changes."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            # What lies on the host is read there: to bring it to the device would wait for that.
            is_readable = lr.is_cpu and device.type != "cpu" and not (lr.requires_grad or torch.compiler.is_compiling())
            lr = lr.item() if is_readable else lr.reshape(()).to(device)
        decay_factor = 1 - lr * self.group["weight_decay"] if self.group["weight_decay"] else None
        scale = None if self.grad_scale is None else self.grad_scale.to(device)
        return Numbers(lr, decay_factor, 1 - self.group["trunk_momentum"], scale)


def _prepared(grad: Tensor, numbers: Numbers, *, maximize: bool) -> Tensor:
    """The gradient to descend along, in arithmetic precision: what a scale saved would underflow in less."""
    grad = _tensors.upcast(grad)
    if numbers.grad_scale is not None:
        grad = grad / numbers.grad_scale
    return -grad if maximize else grad


def _average(
    grad: Tensor, exp_avg: Sequence[Tensor], numbers: Numbers, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor | None]:
    """The average in arithmetic precision and the change due to it; without momentum the gradient and None."""
    if not exp_avg:
        return grad, None
    held = exp_avg[0]
    if held.dtype == torch.int8:
        average = _codes.decode(*exp_avg)
        grad = grad.to(average.dtype)
    else:
        average = held.to(wider(held, grad))
    change = torch.sub(grad, average, out=None if scratch is None else scratch.like(average))
    return average, change.mul_(numbers.change_factor)


def wider(average: Tensor, grad: Tensor) -> torch.dtype:
    """What an average is computed in: as the gradient, or as a checkpoint brought it."""
    return torch.promote_types(average.dtype, grad.dtype)


def _sign(tensor: Tensor, scratch: Scratch | None, place: int = 0) -> Tensor:
    # A constant for derivatives: what is not recorded may be changed in place.
    return torch.sign(tensor.detach(), out=None if scratch is None else scratch.like(tensor, place))


def _mask(signs: Tensor, grad: Tensor, scratch: Scratch | None) -> Tensor:
    """[m * g > 0] as 1 and 0, from the signs of m, for the product may underflow.

    In numbers, not booleans, whose products and comparisons are several times slower on the CPU.
    """
    return _sign(grad, scratch, 1).mul_(signs).clamp_min_(0)


def next_mask(
    grad: Tensor, exp_avg: Sequence[Tensor], numbers: Numbers, *, maximize: bool, scratch: Scratch | None = None
) -> Tensor:
    """The mask that :func:`update` will find. Writes nothing."""
    grad = _prepared(grad, numbers, maximize=maximize)
    average, change = _average(grad, exp_avg, numbers, scratch)
    return _mask(_sign(average if change is None else change.add_(average), scratch), grad, scratch)


def update(
    tensors: Sequence[Tensor],
    numbers: Numbers,
    *,
    maximize: bool,
    mean: Tensor | None,
    noise: Tensor | None,
    scratch: Scratch | None = None,
) -> None:
    """Update one piece.

    Args:
        tensors: weight, gradient; with momentum the average, as codes also the scales.
        numbers: what to multiply by.
        maximize: whether to ascend.
        mean: of the mask; None for a step without one.
        noise: 16 random bits for each weight, to round by; None to round to nearest.
        scratch: for temporaries; None to allocate.
    """
    param, grad, *exp_avg = tensors
    grad, average = accumulate(grad, exp_avg, numbers, maximize=maximize, scratch=scratch)
    if mean is None and torch.compiler.is_compiling() and isinstance(numbers.lr, Tensor):
        # In one loop comparisons are cheap. The same bits as below: the product of lr with 1, 0 and -1 is exact.
        signed = torch.where(average > 0, numbers.lr, torch.where(average < 0, -numbers.lr, 0.0))
        move(param, signed.add_(average, alpha=0), 1.0, numbers.decay_factor, is_unit=True, noise=noise)
        return
    direction = _sign(average, scratch)
    factor = None if mean is None else _mask(direction, grad, scratch).div_(mean)
    direction.add_(average, alpha=0)  # Note [Non-finite averages]
    if factor is not None:
        direction.mul_(factor)
    move(param, direction, numbers.lr, numbers.decay_factor, is_unit=mean is None, noise=noise)


def accumulate(
    grad: Tensor, exp_avg: Sequence[Tensor], numbers: Numbers, *, maximize: bool, scratch: Scratch | None
) -> tuple[Tensor, Tensor]:
    """Take a gradient into the average.

    Returns:
        The gradient to descend along, and the average before it is rounded to be stored.
    """
    grad = _prepared(grad, numbers, maximize=maximize)
    average, change = _average(grad, exp_avg, numbers, scratch)
    if change is not None:
        average.add_(change)
        _store(average, exp_avg)
    return grad, average


def move(
    param: Tensor,
    direction: Tensor,
    lr: float | Tensor,
    decay_factor: float | Tensor | None,
    *,
    is_unit: bool,
    noise: Tensor | None,
) -> None:
    """Decay weights and move them against a direction, which is used up.

    Args:
        param: the weights.
        direction: in arithmetic precision.
        lr: what it is multiplied by.
        decay_factor: what weights are multiplied by first, or None.
        is_unit: whether the product of lr and direction is exact, as with 1, 0 and -1.
        noise: 16 random bits for each weight, to round by; None to round to nearest.
    """
    weight = _tensors.upcast(param)
    if decay_factor is not None:
        weight.mul_(decay_factor)
    if is_unit and not isinstance(lr, Tensor):
        weight.sub_(direction, alpha=lr)  # a pass less, and the same bits
    else:
        weight.sub_(direction.mul_(lr))
    if noise is None:
        _tensors.downcast(weight, param)
    else:
        _rounding.round_into(weight, param, noise)


def _store(average: Tensor, exp_avg: Sequence[Tensor]) -> None:
    if exp_avg[0].dtype == torch.int8:
        _codes.encode_(average, *exp_avg)
    else:
        _tensors.downcast(average, exp_avg[0])
