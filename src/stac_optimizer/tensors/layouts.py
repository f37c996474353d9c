"""Layouts of tensors in memory, real views of complex ones, and lists by device and dtype. Knows no rule."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["has_layout_of", "in_layout_of", "indices_by_device_and_dtype", "is_dense", "overlap", "real_views"]


def indices_by_device_and_dtype(tensorlists: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Group positions whose tensors, list for list, share device and dtype: what one foreach call can take."""
    if all(map(_are_of_one_kind, tensorlists)):
        return [list(range(len(tensorlists[0])))]
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, tensors in enumerate(zip(*tensorlists, strict=True)):
        key = tuple((tensor.device, tensor.dtype) for tensor in tensors)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _are_of_one_kind(tensors: Sequence[Tensor]) -> bool:
    if len({tensor.dtype for tensor in tensors}) != 1:
        return False
    return all(tensor.is_cpu for tensor in tensors) or len({tensor.device for tensor in tensors}) == 1


def real_views(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as views of real numbers, the others as they are."""
    if not any(map(Tensor.is_complex, tensors)):
        return tensors
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def has_layout_of(tensor: Tensor, other: Tensor) -> bool:
    """Whether both fill their memory without gaps, element for element in the same order."""
    if tensor.shape != other.shape:
        return False
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    return tensor.stride() == other.stride() and is_dense(other)


def in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or a copy, in the layout of a dense parameter."""
    return grad if has_layout_of(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def overlap(tensors: Sequence[Tensor]) -> set[int]:
    """The positions of those that may share memory with others."""
    starts = sorted(map(Tensor.data_ptr, tensors))
    are_plain = all(map(Tensor.is_contiguous, tensors))
    if are_plain and starts:  # most are far enough apart for the largest of them
        most = max(map(Tensor.numel, tensors)) * max([dtype.itemsize for dtype in {tensor.dtype for tensor in tensors}])
        if all(gap >= most for gap in map(operator.sub, starts[1:], starts)):
            return set()
    spans = sorted([(tensor.data_ptr(), _extent(tensor), index) for index, tensor in enumerate(tensors)])
    found: set[int] = set()
    end, last = 0, -1  # the farthest that one of them reaches
    for begin, extent, index in spans:
        if extent and begin < end:
            found |= {last, index}
        if begin + extent > end:
            end, last = begin + extent, index
    return found


def _extent(tensor: Tensor) -> int:
    """Bytes from the first of a tensor's elements to the end of its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
