"""Trust ratios: how long a step may be beside the weights that it changes; and what rules that go by them share.

Norms are sums, whose last bits hang on how parameters are cut; so paths of these rules agree to rounding and not by
bits, and a product and its sum may be one operation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.rule import COUNTER, Group, Rule, StateLists, StateTensor, TensorList, Wholes
from stac_optimizer.rule.moments import bias_corrections

__all__ = ["AdamByTrustRule", "adam_steps", "trust_ratios"]

# Of the norm of the weights. Shorter steps count as none: their ratio is infinite in float32.
LEAST_SHARE = 2.0**-126

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_sq"))


def trust_ratios(
    weight_norms: Tensor, step_norms: Tensor, clip: tuple[float, float] | None, coefficient: float = 1.0
) -> Tensor:
    """Coefficient · φ(‖p‖) / ‖step‖ of each parameter, φ clipping; NaN where a norm is, 1 where one is as good as 0.

    No quotient by 0, not even an unused one: its derivative would be NaN.
    """
    clipped = coefficient * (weight_norms if clip is None else weight_norms.clamp(*clip))
    has_none = (weight_norms == 0) | (step_norms <= clipped * LEAST_SHARE)
    return torch.where(has_none, 1.0, clipped / torch.where(has_none, 1.0, step_norms))


def adam_steps(averages: TensorList, squares: TensorList, steps: TensorList, group: Group) -> TensorList:
    """Adam's step of lr 1: (m / (1 − β₁^t)) / (√(v / (1 − β₂^t)) + ε), corrections of √v moved to ε and m."""
    beta1, beta2 = group["betas"]
    corrections: list[Any] = list(bias_corrections(steps, beta1))
    roots: list[Any] = [correction**0.5 for correction in bias_corrections(steps, beta2)]
    ratios = [root / correction for root, correction in zip(roots, corrections, strict=True)]
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
    directions = list(torch._foreach_div(averages, denominators))
    torch._foreach_mul_(directions, ratios)
    return directions


class AdamByTrustRule(Rule):
    """Averages as Adam's, and a step made of them that is scaled to the norm of the weights."""

    needs = "tensor"
    state_keys = ("step", "exp_avg", "exp_avg_sq")

    @abstractmethod
    def directions(self, state: StateLists, group: Group) -> TensorList:
        """The step of lr 1, before decay and before it is scaled, in tensors of its own."""

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return STATE

    def measured(self, params: TensorList, grads: TensorList, state: StateLists, group: Group) -> Sequence[TensorList]:
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(state["exp_avg"], grads, 1 - beta1)
        torch._foreach_mul_(state["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(state["exp_avg_sq"], grads, grads, 1 - beta2)
        return params, self._decayed(params, state, group)

    def settled(
        self, measured: Sequence[TensorList], state: StateLists, group: Group, wholes: Wholes
    ) -> Sequence[TensorList]:
        """By what each parameter's step is multiplied, lr included."""
        weight_norms, step_norms = map(torch.stack, measured)
        return (list((group["lr"] * trust_ratios(weight_norms, step_norms, group["scale_clip"])).unbind()),)

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        (rates,) = wholes.settled
        torch._foreach_addcmul_(params, self._decayed(params, state, group), rates, -1)

    def _decayed(self, params: TensorList, state: StateLists, group: Group) -> TensorList:
        directions = self.directions(state, group)
        if group["weight_decay"]:
            torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        return directions
