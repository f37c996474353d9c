"""The one home of torch's private names, each with the reason why it is used.

``torch._foreach_*`` stand where they are used, in rules above all: one call, and on CUDA a few launches, for a whole
list of tensors. Every optimizer of torch.optim is built from them, and they have no public names.

- ``_default_to_fused_or_foreach``: torch's own answer to "is foreach safe and faster for these tensors?", which rests
  on lists of devices and tensor types that grow with its releases.
- ``_get_capturable_supported_devices``, ``_get_fused_kernels_supported_devices``: the device lists that torch's AdamW
  asserts in the middle of its update; here they are asked before anything has changed.
- ``DistributedDataParallel._join_config``: whether ranks may end before others, in the context of its ``join``.
- ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``: where in a whole tensor a shard begins.
  Only torch knows how each placement cuts, strided ones of FSDP2 beside tensor parallelism among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach, _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

__all__ = [
    "capturable_devices",
    "fused_devices",
    "is_foreach_faster",
    "is_joining",
    "local_shape_and_offsets",
]

capturable_devices = _get_capturable_supported_devices
fused_devices = _get_fused_kernels_supported_devices


def is_foreach_faster(tensors: Sequence[Tensor], *, differentiable: bool) -> bool:
    """Whether torch would take its foreach path for these parameters by default."""
    _, foreach = _default_to_fused_or_foreach(list(tensors), differentiable, use_fused=False)
    return foreach


def is_joining(ddp: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether this is within the context of its ``join``."""
    return bool(ddp._join_config.enable)


def local_shape_and_offsets(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of what this rank holds of a DTensor, and for each dimension the index at which that begins."""
    # Imported late: it costs time that few need to spend.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return shape, offsets
