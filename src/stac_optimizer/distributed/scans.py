"""What is looked for in tensors that may be cut over ranks, and that all ranks must find alike. Knows no rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import local_views, real_parts, sum_over_ranks
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.precision import arithmetic_dtype

__all__ = ["are_zero", "first_nonfinite"]


def first_nonfinite(grads: Sequence[Tensor | None], params: Sequence[Tensor], *, here: bool) -> int | None:
    """The position of the first gradient with NaN or infinity; None where there is none.

    Args:
        grads: gradients, None where absent.
        params: for each the parameter whose placement it is brought to: what is partial here may be infinite as a sum.
        here: whether to look at this rank's parts alone.
    """
    present = [(grad, param) for grad, param in zip(grads, params, strict=True) if grad is not None]
    local = real_parts([grad for grad, _ in present], [param for _, param in present])
    is_bad = not _are_finite(local)
    if not (is_bad if here else _on_any_rank([is_bad], params)[0]):
        return None
    parts = iter(local)
    flags = [grad is not None and not _are_finite([next(parts)]) for grad in grads]
    return (flags if here else list(_on_any_rank(flags, params))).index(True)


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    held = [tensor for tensor in tensors if tensor.numel() and has_data(tensor)]
    suspects = [tensor for tensor in held if not (tensor.is_cpu and _has_finite_sum(tensor))]
    # The largest magnitude tells, and unlike a sum it cannot overflow.
    return not suspects or bool(torch.nn.utils.get_total_norm(suspects, norm_type=math.inf).isfinite())


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether all elements are finite for certain. On the CPU a sum takes a tenth of the time of a maximum."""
    return math.isfinite(tensor.sum(dtype=arithmetic_dtype(tensor.dtype)).item())


def are_zero(tensors: Sequence[Tensor], *, here: bool) -> bool:
    """Whether all tensors hold nothing but zeros, in every shard of them, or in this rank's.

    Those without data do not.
    """
    flags: Sequence[bool] = [any(not has_data(tensor) or bool(tensor.any()) for tensor in local_views(list(tensors)))]
    return not (flags if here else _on_any_rank(flags, tensors))[0]


def _on_any_rank(flags: Sequence[bool], tensors: Sequence[Tensor]) -> Sequence[bool]:
    """Which flags are set on any rank that holds a shard of these tensors: ranks must not disagree on a step.

    Flags, for a maximum over ranks can lose a NaN.
    """
    meshes: dict[Any, Any] = {getattr(tensor, "device_mesh", None): tensor for tensor in tensors}
    for mesh, sharded in meshes.items():
        if mesh is not None:
            values = torch.tensor(flags, dtype=torch.float32, device=sharded.device)
            flags = [count > 0 for count in sum_over_ranks(values, sharded, is_summed=[True] * mesh.ndim).tolist()]
    return flags
