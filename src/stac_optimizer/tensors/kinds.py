"""Kinds of tensors: plain ones, those of classes with operations of their own, and those without data.

Note [Tensors without data]. Fake tensors, of a dry run that finds out how much memory a training needs, and those on
the device "meta" know shape and dtype alone. They take every operation of torch, packing and lists among them, so that
a dry run does what the real one does; but there is nothing to read a number from, and no memory for a kernel to walk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from stac_optimizer.tensors.torch_private import FakeTensor, has_dispatch_modes

__all__ = ["PLAIN_TYPES", "can_walk", "has_data", "has_own_operations", "is_fake"]

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_fake(tensor: Tensor | None) -> bool:
    """Whether the tensor is one of a ``FakeTensorMode``."""
    return isinstance(tensor, FakeTensor)


def has_data(tensor: Tensor) -> bool:
    """Whether a number may be read (Note [Tensors without data])."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def can_walk(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels that torch knows nothing of may walk the memory of these, and nobody watches operations.

    What watches, such as a counter of operations or a dry run, sees those of torch alone.
    """
    if has_dispatch_modes():
        return False
    tensors = list(tensors)  # looked at by their types, for there may be thousands
    are_fake = any(issubclass(kind, FakeTensor) for kind in set(map(type, tensors)))
    return not (are_fake or any(tensor.is_meta for tensor in tensors))


def has_own_operations(tensor: Tensor) -> bool:
    """Whether the tensor's class says what each operation does, as those of quantized weights do, and DTensor."""
    return type(tensor) not in PLAIN_TYPES and _has_own_operations(type(tensor))


@functools.cache
def _has_own_operations(kind: type[Tensor]) -> bool:
    is_plain = kind.__torch_dispatch__ == Tensor.__torch_dispatch__
    return not (is_plain or issubclass(kind, FakeTensor))
