"""Memory for temporaries that one piece after the other uses again."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import has_own_operations

__all__ = ["Scratch"]


class Scratch:
    """Memory for temporaries of one piece after the other, two at a time.

    On the CPU memory fresh from the system costs a page fault for every 4 KiB, several times what the arithmetic takes.
    """

    def __init__(self) -> None:
        self._held = [torch.empty(0, device="cpu")] * 2

    def like(self, tensor: Tensor, place: int = 0) -> Tensor | None:
        """A tensor of this shape, dtype, device and layout, of any values; None of classes that may not write to one.

        Args:
            tensor: whose like it is.
            place: 0 or 1; the next call for the same place takes its memory.
        """
        if has_own_operations(tensor):
            return None
        if type(tensor) is not Tensor or not tensor.is_contiguous():
            return torch.empty_like(tensor)
        held, numel = self._held[place], tensor.numel()
        if held.numel() < numel or held.dtype != tensor.dtype or held.device != tensor.device:
            self._held[place] = held = torch.empty(numel, dtype=tensor.dtype, device=tensor.device)
        return held[:numel].view(tensor.shape)
