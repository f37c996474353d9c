"""What tests of votes on real ranks share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from stac_optimizer import STAC, MajorityVote

__all__ = ["seed_of", "voting"]


def voting(model: nn.Module, **arguments: Any) -> STAC:
    """An optimizer that votes."""
    return STAC(model, **{"lr": 1e-2, "weight_decay": 0.1, "vote": MajorityVote(), **arguments})


def seed_of(step: int, part: int = 0) -> int:
    """Of a batch, or of gradients, of this rank's own."""
    return 1000 * step + 10 * part + dist.get_rank()
