"""The loop that trainers are compared with, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from stac_optimizer import STAC

__all__ = ["train"]

Batch = tuple[Tensor, Tensor]


def train(model: nn.Module, optimizer: STAC, schedule: LRScheduler, batches: Iterable[Any]) -> None:
    """Gradients of two batches each accumulated, and clipped to a norm of 1."""
    for number, (inputs, targets) in enumerate(batches):
        (nn.functional.cross_entropy(model(inputs), targets) / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
