"""The trunk's update on the CPU in one pass over memory, by torch.compile: what ``fused=True`` runs there.

One loop is made of the operations of ``arithmetic.py``, so the bits are the same; it is limited by the
bytes of weight, gradient and average. It is compiled once for each :class:`Variant`: sizes are dynamic, and lr and all
other coefficients reach the loop as tensors, which may change without another compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_optimizer.optim.signum.arithmetic import Coefficients, SignUpdate, next_mask, update
from stac_optimizer.optim.signum.single import (
    Kernels,
    can_pack,
    count_passing,
    single_tensor,
    step_unit,
    update_piece,
)
from stac_optimizer.tensors import codes, cutting, rounding
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.pieces import Piece, Tensors, Unit
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.torch_private import errors_of_compiling
from stac_optimizer.validation import warn

__all__ = ["step_compiled"]

# A constant of the kernels, whose loops then need no masks for a last few elements.
ROW = codes.BLOCK
# For sizes of 0 and 1 dynamo compiles anew.
LEAST_ROWS = 2
# Enough for inductor to see that threads pay.
PROBE_ROWS = 1024
# More save little, and take long to compile: 16 loops 22 s, 8 loops 14 s, one 11 s without a cache.
AT_ONCE = 8
CPU = torch.device("cpu")


class Variant(NamedTuple):
    """What a compiled kernel is made for; all else may change between calls.

    Args:
        dtypes: of weight and gradient; with momentum of the average.
        decays: whether weights decay.
        is_scaled: whether gradients come with a scale.
        maximize: whether to ascend.
        masked: whether the step has a mask.
        rounds: whether weights are rounded by chance.
        threads: how many share a loop; inductor writes their number into it.
    """

    dtypes: tuple[torch.dtype, ...]
    decays: bool
    is_scaled: bool
    maximize: bool
    masked: bool
    rounds: bool
    threads: int

    @property
    def is_coded(self) -> bool:
        """Whether averages are held in codes."""
        return torch.int8 in self.dtypes

    @property
    def at_once(self) -> int:
        """How many pieces one call takes.

        A call costs 0.1 ms of Python, as much as 0.2 million weights take. Where arithmetic is the limit that does not
        matter, and a mask needs its mean first, which waits for other ranks.
        """
        return 1 if self.is_coded or self.masked or self.rounds else AT_ONCE


def step_compiled(work: SignUpdate) -> None:
    """Update parameters of one dtype; what is in mixed layouts or does not fill rows, as by default."""
    is_worth_it = any(param.numel() > cutting.PACK_NUMEL for param in work.lists.params)
    found = _kernels_of(_variant(work)) if is_worth_it else None
    if found is None:
        single_tensor(work)
        return
    bound = _Bound(found, work)
    for unit in cutting.units(work.lists, pack=can_pack(work), cut=False):
        step_unit(work, unit, Kernels(bound.count_passing, bound.update_piece))
    bound.flush()


def _variant(work: SignUpdate) -> Variant:
    return Variant(
        dtypes=tuple(tensors[0].dtype for tensors in work.lists.flat()),
        decays=work.group["weight_decay"] > 0,
        is_scaled=work.grad_scale is not None,
        maximize=work.group["maximize"],
        masked=work.group["cautious"],
        rounds=work.group["stochastic_rounding"],
        threads=torch.get_num_threads(),
    )


class Run(NamedTuple):
    """What a kernel does in one loop: tensors whose rows follow one another, and what belongs to these alone.

    Args:
        tensors: in rows of ``ROW`` elements; of codes with one scale for each row.
        mean: of the mask, or None.
        noise_seed: for rounding by chance, or None.
    """

    tensors: Tensors
    mean: Tensor | None
    noise_seed: Tensor | None


class LoopKernels(NamedTuple):
    """The kernels of one variant.

    Args:
        count: counts where the mask of one run lets pass.
        update: updates runs, as many as the variant takes at once.
        idle: runs to fill up with.
    """

    count: Callable[..., Any]
    update: Callable[..., Any]
    idle: list[Run]


@functools.cache
def _kernels_of(variant: Variant) -> LoopKernels | None:
    """The kernels of a variant, or None and one warning where they cannot be compiled."""
    maximize = variant.maximize
    noise_of = functools.partial(rounding.noise_of_run, of_blocks=not variant.rounds)

    # Where dynamo is disabled these run as they stand, on whole tensors: better not at all.
    def count(tensors: Tensors, coefficients: Coefficients) -> Tensor | None:
        if not torch.compiler.is_compiling() or not _is_in_rows(tensors):
            return None
        return next_mask(tensors, coefficients, maximize=maximize).count_nonzero()

    def step(runs: Sequence[Run], coefficients: Coefficients) -> bool:
        if not torch.compiler.is_compiling():
            return False
        for tensors, mean, noise_seed in runs:
            if not _is_in_rows(tensors):
                return False
            noise = None if noise_seed is None else noise_of(tensors.param, noise_seed)
            update(tensors, coefficients, maximize=maximize, mean=mean, noise=noise, rounds=variant.rounds)
        return True

    coefficients = _probe_numbers(variant)
    probes = [_probe(variant, PROBE_ROWS + index) for index in range(variant.at_once)]
    try:
        idle = [_probe(variant, LEAST_ROWS) for _ in probes]
        made = LoopKernels(_compile(count), _compile(step), idle)
        has_run = made.update(probes, coefficients)
        if variant.masked:
            made.count(probes[0].tensors, coefficients)
    except Exception as error:  # a missing or broken compiler shows in many ways
        _warn_of(error)
        return None
    if not has_run:
        _warn_once(MESSAGE.format("torch.compile is disabled"))
    return made if has_run else None


MESSAGE = (
    "fused=True: Signum's kernel for the CPU could not be compiled ({}); the default path runs instead, with the "
    "same results. It needs a C++ compiler"
)


def _warn_of(error: Exception) -> None:
    _warn_once(MESSAGE.format(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"))


_warn_once = functools.cache(warn)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamo gives up on a code object after a few recompilations, so each variant gets one of its own.
    function.__code__ = function.__code__.replace()
    return torch.compile(function, dynamic=True, fullgraph=True)


def _is_in_rows(tensors: Tensors) -> bool:
    """True; the length of rows, being asked for, is a constant of the kernel."""
    return tensors.param.shape[1] == ROW


def _probe(variant: Variant, rows: int) -> Run:
    """A run of zeros. Of some runs for one call no two have the same size, or the kernel would ask for that."""
    param, grad, *state = [torch.zeros((rows, ROW), dtype=each, device=CPU) for each in variant.dtypes]
    scale = torch.zeros((rows, 1), dtype=torch.float32, device=CPU) if variant.is_coded else None
    mean = torch.ones((), dtype=arithmetic_dtype(variant.dtypes[0]), device=CPU)
    noise_seed = torch.zeros((), dtype=torch.int32, device=CPU)
    tensors = Tensors(param, grad, tuple(state), scale)
    has_noise = variant.rounds or variant.is_coded
    return Run(tensors, mean if variant.masked else None, noise_seed if has_noise else None)


def _probe_numbers(variant: Variant) -> Coefficients:
    """Each number a tensor of its own: the kernel would be made for those that are one."""
    dtype = arithmetic_dtype(variant.dtypes[0])
    lr, decay_factor, change_factor, scale = (torch.ones((), dtype=dtype, device=CPU) for _ in range(4))
    return Coefficients(
        lr, decay_factor if variant.decays else None, change_factor, scale if variant.is_scaled else None
    )


class _Bound:
    """The kernels of ``single.py`` for some work: compiled ones for what they fit, else those.

    Updates that can be called several at once wait for the last: Python is twice as fast while no kernel has swept it
    from the caches.
    """

    def __init__(self, compiled: LoopKernels, work: SignUpdate) -> None:
        self.compiled = compiled
        dtype = arithmetic_dtype(work.lists.params[0].dtype)
        given: Sequence[Any] = work.coefficients(CPU)
        self.coefficients = Coefficients._make(
            None if n is None else torch.as_tensor(n, dtype=dtype, device=CPU) for n in given
        )
        self.waiting: list[tuple[Run, Callable[[], None]]] = []
        self.scratch = Scratch()

    def count_passing(self, piece: Piece, unit: Unit, coefficients: Coefficients, *, maximize: bool) -> Tensor:
        """As :func:`.single.count_passing`."""
        eager = functools.partial(
            count_passing, unit=unit, coefficients=coefficients, maximize=maximize, scratch=self.scratch
        )
        rows, rest = _cut(piece)
        counted: Tensor | None = None if rows is None else _result(self.compiled.count, rows.tensors, self.coefficients)
        if counted is None:
            return eager(piece)
        return counted if rest is None else counted + eager(rest)

    def update_piece(
        self,
        piece: Piece,
        unit: Unit,
        coefficients: Coefficients,
        *,
        maximize: bool,
        mean: Tensor | None,
        noise_seeds: Tensor | None,
        rounds: bool,
    ) -> None:
        """As :func:`.single.update_piece`."""
        eager = functools.partial(
            update_piece,
            unit=unit,
            coefficients=coefficients,
            maximize=maximize,
            mean=mean,
            noise_seeds=noise_seeds,
            rounds=rounds,
            scratch=self.scratch,
        )
        has_own = bool(unit.sizes) and not (mean is None and noise_seeds is None)  # each parameter of a pack
        rows, rest = (None, piece) if has_own else _cut(piece)
        if rest is not None:
            eager(rest)
        if rows is None:
            return
        seed = None if noise_seeds is None else rounding.seed_from(rows.offset, noise_seeds[unit.members[0]])
        self.waiting.append((Run(rows.tensors, mean, seed), functools.partial(eager, rows)))
        if unit.sizes or len(self.compiled.idle) == 1:  # a pack is written back once it is done
            self.flush()

    def flush(self) -> None:
        """Run the updates that wait."""
        idle = self.compiled.idle
        for start in range(0, len(self.waiting), len(idle)):
            some = self.waiting[start : start + len(idle)]
            runs = [run for run, _ in some]
            if not _result(self.compiled.update, [*runs, *idle[len(runs) :]], self.coefficients):
                for _, eager in some:
                    eager()
        self.waiting.clear()


def _result(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """What a kernel returns; None where it cannot run, as when dynamo finds that it has compiled it too often."""
    try:
        return kernel(*arguments)
    except errors_of_compiling() as error:
        _warn_of(error)
        return None


def _cut(piece: Piece) -> tuple[Piece | None, Piece | None]:
    """What of a piece a kernel takes, as rows, and what is left: of its last elements, or all of it.

    A kernel takes what follows one another in memory, and blocks of codes that are whole.
    """
    first, scale = piece.tensors.param, piece.tensors.scale
    held = piece.tensors.flat() if scale is None else (*piece.tensors.flat(), scale)
    is_run = all(map(Tensor.is_contiguous, held)) and piece.strides == first.stride() and all(map(has_data, held))
    numel = first.numel()
    if not is_run or (scale is not None and first.shape[-1] != ROW) or numel < LEAST_ROWS * ROW:
        return None, piece
    # A kernel is made for tensors that require grad, or do not.
    flat = [(tensor.detach() if tensor.requires_grad else tensor).view(-1) for tensor in piece.tensors.flat()]
    end = numel - numel % ROW
    rest = Piece(_tensors([tensor[end:] for tensor in flat], None), piece.offset + end) if end < numel else None
    rows = [tensor[:end].view(-1, ROW) for tensor in flat]
    return Piece(_tensors(rows, None if scale is None else scale.view(-1, 1)), piece.offset, (ROW, 1)), rest


def _tensors(flat: Sequence[Tensor], scale: Tensor | None) -> Tensors:
    return Tensors(flat[0], flat[1], tuple(flat[2:]), scale)
