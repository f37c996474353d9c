"""The trunk's update on the CPU: all tensors of a group in one pass over memory, two where it is cautious.

It is bound by the bytes it moves, as on CUDA: each weight, gradient and average is read once, each result written once.
The functions of ``cpu_kernels.cpp``, compiled for three dtypes at the first step that has them, walk blocks of all
tensors from one number to another, and let other threads of Python run meanwhile; so threads share them out, and meet
once (Note [Few joins] in ``threads.py``). All but the dtypes is read anew in every step.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_optimizer.optim.signum.arithmetic import LEAST_MASK_MEAN, SignUpdate, masked_lr
from stac_optimizer.optim.signum.fused.building import load_library
from stac_optimizer.tensors import codes
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.threads import Shares, Task, run_all, shares
from stac_optimizer.validation import warn

__all__ = ["kernels_for", "step_on_cpu"]

TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "codes",
    None: "none",
}
# The most elements of a task: enough that to begin one costs nothing, and few enough that threads end together.
TASK_NUMEL = 2 * 1024 * 1024
CPU = torch.device("cpu")


class _Work(ctypes.Structure):
    """``Work`` of ``cpu_kernels.cpp``: numbers, and addresses of arrays that have a place for each tensor."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        ("first_blocks", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("averages", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("noise_seeds", ctypes.c_void_p),
        ("masked_lrs", ctypes.c_void_p),
        ("passing", ctypes.c_void_p),
        ("lr", ctypes.c_double),
        ("decay_factor", ctypes.c_double),
        ("change_factor", ctypes.c_double),
        ("grad_scale", ctypes.c_double),
        ("maximize", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
    )


Walk = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Work), ctypes.c_int64, ctypes.c_int64)


class CPUKernels(NamedTuple):
    """The functions for three dtypes: of a work, and of the numbers of its first block and of that after the last.

    Args:
        count_passing: counts for each tensor where its mask will let pass.
        update: updates.
    """

    count_passing: Callable[..., None]
    update: Callable[..., None]


def kernels_for(work: SignUpdate) -> CPUKernels | None:
    """The functions for parameters of one dtype; None, with one warning, where they cannot be compiled."""
    dtypes = [tensors[0].dtype for tensors in work.lists.flat()]
    return _kernels(*dtypes) if len(dtypes) > 2 else _kernels(*dtypes, None)


@functools.cache
def _kernels(param: torch.dtype, grad: torch.dtype, average: torch.dtype | None) -> CPUKernels | None:
    try:
        named = {"PARAM": TYPES[param], "GRAD": TYPES[grad], "AVERAGE": TYPES[average]}
        library = load_library(Path(__file__).with_name("cpu_kernels.cpp"), named)
        return CPUKernels(Walk(("count_passing", library)), Walk(("update", library)))
    except KeyError:  # of a dtype that torch's operations alone know
        return None
    except (OSError, ValueError, AttributeError) as error:
        _warn_of(error)
        return None


WARNED: list[Exception] = []


def _warn_of(error: Exception) -> None:
    """Once, for the next dtypes fail alike."""
    if not WARNED:
        warn(
            f"fused=True: Signum's kernel for the CPU could not be compiled and loaded ({error}); the default path "
            "runs instead, with the same results. It needs a C++ compiler, such as g++ or clang++, which CXX may name"
        )
    WARNED.append(error)


def step_on_cpu(work: SignUpdate, kernels: CPUKernels) -> None:
    """Update parameters of one dtype, whose tensors lie in memory alike and without gaps."""
    lists = work.lists
    numels = [param.numel() for param in lists.params]
    columns, blocks = numels, [-(-numel // codes.BLOCK) for numel in numels]
    if lists.scales is not None:
        columns = [codes.matrix_shape(param)[1] for param in lists.params]
        blocks = list(map(Tensor.numel, lists.scales))
    held = _Held()
    coefficients = work.coefficients(CPU)
    given = _Work(
        tensors=len(numels),
        first_blocks=held.integers(accumulate(blocks, initial=0)),
        columns=held.integers(columns),
        params=held.addresses(lists.params),
        grads=held.addresses(lists.grads),
        averages=held.addresses(lists.states[0] if lists.states else lists.grads),
        scales=None if lists.scales is None else held.addresses(lists.scales),
        noise_seeds=None if work.noise_seeds is None else held.data(work.noise_seeds),
        lr=_number(coefficients.lr),
        decay_factor=_number(coefficients.decay_factor, 1.0),
        change_factor=_number(coefficients.change_factor),
        grad_scale=_number(coefficients.grad_scale, 1.0),
        maximize=work.group["maximize"],
        rounds=work.group["stochastic_rounding"],
    )
    shared = shares(lists.flat(), least=TASK_NUMEL // 8, most=TASK_NUMEL)
    if work.group["cautious"]:
        passing = torch.zeros(len(numels), dtype=torch.int64, device=CPU)
        given.passing = held.data(passing)
        _run(kernels.count_passing, given, sum(blocks), shared)
        means = passing.to(arithmetic_dtype(lists.params[0].dtype))
        means.div_(torch.tensor(numels, device=CPU)).clamp_(min=LEAST_MASK_MEAN)
        given.masked_lrs = held.data(masked_lr(coefficients.lr, means))
    # Before the first is written to: what a step has changed, where it ends on its way, versions tell.
    torch.autograd.graph.increment_version([*lists.params, *lists.states[0]] if lists.states else lists.params)
    _run(kernels.update, given, sum(blocks), shared)


class _Held:
    """What lies at addresses that a work holds, for as long as it is used."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def integers(self, values: Any) -> int:
        """The address of integers, none of them negative."""
        table = array("Q", values)
        self._kept.append(table)
        return table.buffer_info()[0]

    def addresses(self, tensors: Sequence[Tensor]) -> int:
        """The address of the tensors' addresses."""
        return self.integers(map(Tensor.data_ptr, tensors))

    def data(self, tensor: Tensor) -> int:
        """The address of a tensor's elements, in their order."""
        tensor = tensor.to(CPU).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _number(value: float | Tensor | None, default: float = 0.0) -> float:
    return default if value is None else value.item() if isinstance(value, Tensor) else value


def _run(function: Callable[..., None], work: _Work, blocks: int, shared: Shares) -> None:
    """Let threads share out a walk over all blocks."""
    step = max(1, (shared.numel or TASK_NUMEL) // codes.BLOCK)

    def walk(start: int, _: Scratch) -> None:
        function(work, start, min(start + step, blocks))

    tasks = [Task(functools.partial(walk, start), step * codes.BLOCK) for start in range(0, blocks, step)]
    run_all(tasks, shared)
