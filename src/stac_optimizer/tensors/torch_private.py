"""The one home of torch's private names, each with the reason why it is used.

``torch._foreach_*`` stand where they are used, in rules above all: one call, and on CUDA a few launches, for a whole
list of tensors. Every optimizer of torch.optim is built from them, and they have no public names.

- ``_default_to_fused_or_foreach``: torch's own answer to "is foreach safe and faster for these tensors?", which rests
  on lists of devices and tensor types that grow with its releases.
- ``_get_capturable_supported_devices``, ``_get_fused_kernels_supported_devices``: the device lists that torch's AdamW
  asserts in the middle of its update; here they are asked before anything has changed.
- ``DistributedDataParallel._join_config``: whether ranks may end before others, in the context of its ``join``.
- ``Optimizer._opt_called``: by which schedulers warn of their step before the optimizer's first. An optimizer that goes
  on from another's run has stepped, and its schedule is brought there before its own first step.
- ``FakeTensor``: tensors without data, of a dry run. torch has no public name for them.
- ``torch._C._get_dispatch_mode``, ``_len_torch_dispatch_stack``, ``_len_torch_function_stack``: whether a dry run, or
  any other mode, is active. The public ways to ask cost several microseconds, in every step.
- ``torch._C._is_any_autocast_enabled``, ``_DisableAutocast``: autocast of all devices at once; publicly it is asked for
  one after the other.
- ``_disable_current_modes``: no modes, for what is made once and outlives them.
- ``torch.cpu._is_avx512_bf16_supported``, ``_is_amx_tile_supported``: whether the CPU multiplies bfloat16 by
  instructions of its own; without them it is slower than float32. Publicly only the set of vector instructions is told.
- ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``: where in a whole tensor a shard begins.
  Only torch knows how each placement cuts, strided ones of FSDP2 beside tensor parallelism among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _default_to_fused_or_foreach, _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "FakeTensor",
    "capturable_devices",
    "fused_devices",
    "has_dispatch_modes",
    "has_fast_bfloat16",
    "has_function_modes",
    "is_any_autocast_enabled",
    "is_dry_run",
    "is_foreach_faster",
    "is_joining",
    "local_shape_and_offsets",
    "without_autocast",
    "without_modes",
]

capturable_devices = _get_capturable_supported_devices
fused_devices = _get_fused_kernels_supported_devices
has_function_modes = torch._C._len_torch_function_stack
has_dispatch_modes = torch._C._len_torch_dispatch_stack
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
without_autocast = torch._C._DisableAutocast
without_modes = _disable_current_modes


def is_dry_run() -> bool:
    """Whether a ``FakeTensorMode`` is active."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _has_cpu_fast_bfloat16() -> bool:
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)


CPU_HAS_FAST_BFLOAT16 = _has_cpu_fast_bfloat16()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32: twice on CPUs with instructions for them."""
    if device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones take it apart
    return CPU_HAS_FAST_BFLOAT16 if device.type == "cpu" else device.type in ("cuda", "xpu")


def is_foreach_faster(tensors: Sequence[Tensor], *, differentiable: bool) -> bool:
    """Whether torch would take its foreach path for these parameters by default."""
    _, foreach = _default_to_fused_or_foreach(list(tensors), differentiable, use_fused=False)
    return foreach


def is_joining(ddp: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether this is within the context of its ``join``."""
    return bool(ddp._join_config.enable)


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers be stepped before the optimizer is."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def local_shape_and_offsets(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of what this rank holds of a DTensor, and for each dimension the index at which that begins."""
    # Imported late: it costs time that few need to spend.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return shape, offsets
