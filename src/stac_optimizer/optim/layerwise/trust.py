"""Trust ratios: how long a step may be beside the weights that it changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["trust_ratios"]


def trust_ratios(
    weight_norms: Sequence[Tensor], step_norms: Sequence[Tensor], clip: tuple[float, float] | None
) -> list[Tensor]:
    """φ(‖p‖) / ‖step‖ of each parameter, φ clipping; 1 where either norm is 0."""
    return [
        torch.where((weight > 0) & (step > 0), (weight if clip is None else weight.clamp(*clip)) / step, 1.0)
        for weight, step in zip(weight_norms, step_norms, strict=True)
    ]
