"""What a rule declares of its state: for each tensor its key, shape, dtype, first value and device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import zeros_by_row
from stac_optimizer.rule.hyperparameters import Group

__all__ = ["COUNTER", "StateTensor", "count_step_"]


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """Declares one state tensor of a parameter: of its shape and layout, dtype and device, unless told otherwise.

    Args:
        key: its key in ``optimizer.state[parameter]``, torch's own where the meaning is torch's.
        shape: None for the parameter's. Of two dimensions and as many rows as the parameter, it is sharded as that is.
        dtype: None for the parameter's.
        fill: the first value of every element.
        on_host: on the CPU, unless a kernel must read it there (capturable or fused).
    """

    key: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    fill: float = 0.0
    on_host: bool = False

    def create(self, param: Tensor, group: Group) -> Tensor:
        """The first value, to which steps may write in every context: never what inference mode makes."""
        dtype = self.dtype_of(param)
        with torch.inference_mode(False), torch.no_grad():
            if self.shape is None:
                result = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            elif len(self.shape) == 2:
                result = zeros_by_row(param, *self.shape, dtype=dtype)
            elif not self.shape and self.device_of(param, group).type == "cpu":  # so that fake tensors can read it
                return torch.tensor(self.fill, dtype=dtype, device="cpu")
            else:
                result = torch.zeros(self.shape, dtype=dtype, device=self.device_of(param, group))
            return result.fill_(self.fill) if self.fill else result

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype once created."""
        return param.dtype if self.dtype is None else self.dtype

    def device_of(self, param: Tensor, group: Group) -> torch.device:
        """Where the tensor belongs."""
        is_there = not self.on_host or group["capturable"] or group["fused"]
        return param.device if is_there else torch.device("cpu")

    def shape_of(self, param: Tensor) -> torch.Size:
        """The shape once created."""
        return param.shape if self.shape is None else torch.Size(self.shape)

    def nbytes(self, param: Tensor) -> int:
        """Bytes once created."""
        return math.prod(self.shape_of(param)) * self.dtype_of(param).itemsize


COUNTER = StateTensor(key="step", shape=(), dtype=torch.float32, on_host=True)
"""How many steps a parameter has taken. Every rule has it, and counts by :func:`count_step_` or is counted for."""


# Half a unit in the last place of float32, and a little more, so that a sum is not rounded back.
BEYOND_HALF_ULP = 2.0**-24 * (1 + 2.0**-20)


def count_step_(steps: list[Tensor], found_inf: Tensor | None = None, *, never_stops: bool = False) -> None:
    """Add one to each counter, unless a GradScaler found infinity.

    On the CPU a tensor addend is four times faster: a scalar is wrapped anew for each.

    Args:
        steps: the counters.
        found_inf: not 0 where a GradScaler found infinity.
        never_stops: whether to go on from 2^24, where float32 holds no odd numbers and adding one changes nothing, to
            the next number there is: for noise that is told from that of other steps by the counter.
    """
    if never_stops and steps[0].dtype == torch.float32:
        addends = torch._foreach_mul(steps, BEYOND_HALF_ULP)
        torch._foreach_clamp_min_(addends, 1.0)
        if found_inf is not None:
            counts = 1 - found_inf
            torch._foreach_mul_(addends, [counts.to(step.device) for step in steps])
        torch._foreach_add_(steps, addends)
        return
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        torch._foreach_add_(steps, torch.tensor(1.0, dtype=torch.float32, device="cpu"), alpha=1)
    else:
        torch._foreach_add_(steps, 1)
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf.to(step.device) for step in steps])
