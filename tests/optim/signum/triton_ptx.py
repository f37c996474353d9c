"""Prints, as JSON, what the trunk's Triton kernels compile to for an H100, which need not be there. Not a test.

Everything runs as it would there, but that a driver which only names the device stands in for its own, and that kernels
are compiled instead of launched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from stac_optimizer.optim.signum.fused import triton as host
from stac_optimizer.optim.signum.fused import triton_kernels

LOW = torch.bfloat16


class NamesDevice:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        """Its index."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", 90, 32)


class Compiling:
    """A kernel whose launches leave PTX behind."""

    def __init__(self, kernel: Any, ptx: dict[str, str], name: str, options: Mapping[str, Any]) -> None:
        self.kernel, self.ptx, self.name, self.options = kernel, ptx, name, options

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **{**kwargs, **self.options})
            self.ptx[f"{self.name}-{self.kernel.__name__}"] = compiled.asm["ptx"]

        return launch


def compile_step(
    ptx: dict[str, str],
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
    is_aligned: bool = True,
    is_cautious: bool = False,
    is_scaled: bool = False,
    is_stochastic: bool = False,
) -> None:
    """Add the kernels of one step."""
    for kernel in (triton_kernels.count_kernel, triton_kernels.update_kernel):
        setattr(host, kernel.__name__, Compiling(kernel, ptx, name, options or {}))

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        memory = torch.zeros(1024 + 64, dtype=dtype)
        first = -memory.data_ptr() % 64 // memory.element_size() + (0 if is_aligned else 1)
        return [memory[first : first + 1024]]

    one = torch.ones(1) if is_scaled else None
    host.fused_signum(
        tensors(dtype),
        tensors(dtype),
        tensors(state_dtype or dtype),
        [torch.zeros(8)] if state_dtype is torch.int8 else [],
        lr=0.01,
        decay_factor=0.999,
        change_factor=0.1,
        cautious_floor=1e-3 if is_cautious else None,
        maximize=is_scaled,
        grad_scale=one,
        found_inf=one,
        noise_seeds=torch.zeros(1, dtype=torch.int32) if is_stochastic or state_dtype is torch.int8 else None,
        rounds=is_stochastic,
    )


def main() -> dict[str, str]:
    """The PTX of each case, by its name and the kernel's."""
    triton.runtime.driver.set_active(NamesDevice())
    ptx: dict[str, str] = {}
    compile_step(ptx, "plain")
    compile_step(ptx, "fused", options={"enable_fp_fusion": True})
    compile_step(ptx, "unaligned", is_aligned=False)
    compile_step(ptx, "cautious", is_cautious=True)
    compile_step(ptx, "bfloat16", dtype=LOW)
    compile_step(ptx, "float64", dtype=torch.float64, is_cautious=True, is_scaled=True)
    compile_step(ptx, "int8", dtype=LOW, state_dtype=torch.int8, is_cautious=True, is_scaled=True)
    compile_step(ptx, "stochastic", dtype=LOW, state_dtype=torch.int8, is_scaled=True, is_stochastic=True)
    return ptx


if __name__ == "__main__":
    print(json.dumps(main()))
