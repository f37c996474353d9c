"""How votes travel between ranks: packed into bits, or as sums of bytes. Knows no rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stac_optimizer.distributed import packed_signs

__all__ = ["Ballot", "PackedBallot", "SummedBallot"]

# As torch from 2.13 on calls it, and as before; builds without torch.distributed have neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Ballot(ABC):
    """The votes on some weights, at first one's own, once decided those of all ranks."""

    @abstractmethod
    def put(self, values: Tensor, start: int) -> None:
        """Vote by the signs of a flat tensor, from this place on, a multiple of the word's bits."""

    @abstractmethod
    def cast(self) -> None:
        """Begin to send one's votes."""

    @abstractmethod
    def decide(self) -> None:
        """Wait for the others' votes, and count."""

    @abstractmethod
    def direction(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        """1 where the majority voted up, -1 where down, else 0."""


class SummedBallot(Ballot):
    """Votes as bytes, added up by one all-reduce."""

    def __init__(self, numel: int, device: torch.device, group: Any) -> None:
        self._group = group
        self._sums = torch.empty(numel, dtype=torch.int8, device=device)

    def put(self, values: Tensor, start: int) -> None:
        self._sums[start : start + values.numel()] = torch.sign(values)

    def cast(self) -> None:
        self._work: Any = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def decide(self) -> None:
        self._work.wait()

    def direction(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        return self._sums[start : start + numel].sign().to(dtype)


class PackedBallot(Ballot):
    """Votes as planes of bits. Two ranks gather all votes; of more each decides on a slice, and tells the others.

    Args:
        numel: how many weights.
        device: where.
        group: the ranks.
        planes: 2 of ternary votes, 1 of binary ones.
    """

    def __init__(self, numel: int, device: torch.device, group: Any, *, planes: int) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._slices = self._size if self._size > 2 else 1
        words = -(-packed_signs.words_for(numel) // self._slices) * self._slices
        self._own = torch.zeros((planes, words), dtype=torch.int64, device=device)

    def put(self, values: Tensor, start: int) -> None:
        packed_signs.pack_(values, self._of(self._own, start, values.numel()))

    def cast(self) -> None:
        planes, words = self._own.shape
        self._votes = self._own.new_empty((self._size, planes, words // self._slices))
        if self._slices == 1:
            self._work: Any = _all_gather(self._votes.view(-1), self._own.view(-1), group=self._group, async_op=True)
        else:
            by_rank = self._own.view(planes, self._size, -1).transpose(0, 1).contiguous()
            votes = self._votes.view(-1)
            self._work = dist.all_to_all_single(votes, by_rank.view(-1), group=self._group, async_op=True)

    def decide(self) -> None:
        self._work.wait()
        decided = packed_signs.majority(self._votes)
        if self._slices > 1:
            slices = decided.new_empty((self._slices, *decided.shape))
            _all_gather(slices.view(-1), decided.view(-1), group=self._group)
            decided = slices.transpose(0, 1).contiguous().view(2, -1)
        self._decided = decided

    def direction(self, start: int, numel: int, dtype: torch.dtype) -> Tensor:
        return packed_signs.unpack(self._of(self._decided, start, numel), numel, dtype)

    @staticmethod
    def _of(planes: Tensor, start: int, numel: int) -> Tensor:
        first = start // packed_signs.WORD
        return planes[:, first : first + packed_signs.words_for(numel)]
