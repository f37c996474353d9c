"""Numbers that a kernel for many tensors looks up on the device, brought there without waiting for it.

Note [Tables on the device]
A copy from the host waits for the device, and a CUDA graph would replay it from host memory that is gone. So integers
are added to zeros: they travel as arguments of a launch, which a graph keeps.

Tables are remembered, for addresses rarely change: each for one stream, as memory is handed on in the order of a
stream. Not while a graph is captured: it would go on reading a table that was remembered here, forgotten and its memory
used again. What is built during the capture belongs to the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from stac_optimizer.tensors.torch_private import is_dry_run

__all__ = ["integers", "numbers", "owners"]

# Tables remembered of each kind, six to a group of tensors of one device and dtype: for more groups than models have.
REMEMBERED = 128


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """These integers as int64, not to be written to."""
    stream = None if torch.compiler.is_compiling() else _stream(device)
    return _integers(tuple(values), device) if stream is None else _remembered_integers(tuple(values), device, stream)


def owners(chunks: Sequence[int], device: torch.device) -> Tensor:
    """For each chunk the index of its tensor, from the chunks of each tensor; not to be written to."""
    stream = _stream(device)
    return _owners(tuple(chunks), device) if stream is None else _remembered_owners(tuple(chunks), device, stream)


def numbers(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers, 0-dim tensors among them, in a dtype. Made anew each time, as a tensor's value is not known."""
    result = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in zip(result.unbind(), values, strict=True):
        place.fill_(value)
    return result


def _stream(device: torch.device) -> int | None:
    """The current stream, for what holds on that one alone; None while it is captured, and where there is none.

    A dry run has none, and its tables hold nothing.
    """
    if device.type != "cuda" or is_dry_run() or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def _integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table


def _owners(chunks: tuple[int, ...], device: torch.device) -> Tensor:
    # Told its size, it does not ask the device for it.
    return torch.repeat_interleave(_integers(chunks, device), output_size=sum(chunks))


@lru_cache(REMEMBERED)
def _remembered_integers(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _integers(values, device)


@lru_cache(REMEMBERED)
def _remembered_owners(chunks: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _owners(chunks, device)
