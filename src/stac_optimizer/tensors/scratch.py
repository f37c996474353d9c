"""Memory for temporaries that one piece after the other uses again."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import has_own_operations

__all__ = ["Scratch"]


class Scratch:
    """Memory for temporaries of one piece after the other, in numbered places.

    On the CPU memory fresh from the system costs a page fault for every 4 KiB, several times what the arithmetic takes.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}

    def like(self, tensor: Tensor, place: int = 0, dtype: torch.dtype | None = None) -> Tensor | None:
        """A tensor of this shape, device and layout, of any values; None of classes that may not write to one.

        Args:
            tensor: whose like it is.
            place: the next call for the same place takes its memory.
            dtype: by default the tensor's.
        """
        dtype = dtype or tensor.dtype
        if has_own_operations(tensor):
            return None
        if type(tensor) is not Tensor or not tensor.is_contiguous():
            return torch.empty_like(tensor, dtype=dtype)
        given = self._given.get(place)
        if given is not None and given.shape == tensor.shape and given.dtype == dtype and given.device == tensor.device:
            return given
        held, numel = self._held.get(place), tensor.numel()
        if held is None or held.numel() < numel or held.dtype != dtype or held.device != tensor.device:
            self._held[place] = held = torch.empty(numel, dtype=dtype, device=tensor.device)
        self._given[place] = given = held[:numel].view(tensor.shape)
        return given
