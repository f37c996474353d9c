"""The trunk's update on the CPU in one pass over memory, by torch.compile: what ``fused=True`` runs there.

One loop is made of the operations of ``arithmetic.py``, so the bits are the same; it is limited by the
bytes of weight, gradient and average. It is compiled once for each :class:`Variant`: sizes are dynamic, and lr and all
other coefficients reach the loop as tensors, which may change without another compilation.

A loop runs in one thread; threads share out pieces (Note [Few joins] in ``threads.py``). So inductor is asked for code
of C++ around the loop too, which lets other threads run meanwhile where its Python code holds them up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stac_optimizer.optim.signum.arithmetic import Coefficients, SignUpdate, next_mask, update
from stac_optimizer.optim.signum.single import Kernels, count_passing, single_tensor, step_units, update_piece
from stac_optimizer.tensors import codes, cutting, rounding
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.layouts import has_layout_of, is_dense
from stac_optimizer.tensors.pieces import Piece, Tensors, Unit
from stac_optimizer.tensors.precision import arithmetic_dtype
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.threads import Shares, Task, run_all, shares
from stac_optimizer.tensors.torch_private import errors_of_compiling
from stac_optimizer.validation import warn

__all__ = ["step_compiled"]

# A constant of the kernels, whose loops then need no masks for a last few elements.
ROW = codes.BLOCK
# For sizes of 0 and 1 dynamo compiles anew.
LEAST_ROWS = 2
PROBE_ROWS = 16
# Less would be limited by the calls.
LEAST_NUMEL = 512 * 1024
OPTIONS: dict[str, Any] = {"cpp.threads": 1, "cpp_wrapper": True}
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
    """

    dtypes: tuple[torch.dtype, ...]
    decays: bool
    is_scaled: bool
    maximize: bool
    masked: bool
    rounds: bool

    @property
    def is_coded(self) -> bool:
        """Whether averages are held in codes."""
        return torch.int8 in self.dtypes


def step_compiled(work: SignUpdate) -> None:
    """Update parameters of one dtype; what is in mixed layouts or does not fill rows, as by default."""
    is_worth_it = any(param.numel() > cutting.PACK_NUMEL for param in work.lists.params)
    shared = shares(work.lists.flat(), least=LEAST_NUMEL, most=2 * cutting.LARGE_NUMEL)
    found = _kernels_of(_variant(work), shared.threads > 1) if is_worth_it else None
    if found is None:
        single_tensor(work)
        return
    bound = _Bound(found, work)
    step_units(work, shared, Kernels(bound.count_passing, bound.update_piece))
    if bound.errors:  # of threads, which know no line of the user's to point at
        _warn_of(bound.errors[0])


def _variant(work: SignUpdate) -> Variant:
    return Variant(
        dtypes=tuple(tensors[0].dtype for tensors in work.lists.flat()),
        decays=work.group["weight_decay"] > 0,
        is_scaled=work.grad_scale is not None,
        maximize=work.group["maximize"],
        masked=work.group["cautious"],
        rounds=work.group["stochastic_rounding"],
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
        count: counts where the mask of a run lets pass.
        update: updates a run.
    """

    count: Callable[..., Any]
    update: Callable[..., Any]


@functools.cache
def _kernels_of(variant: Variant, is_shared: bool) -> LoopKernels | None:
    """The kernels of a variant, or None and one warning where they cannot be compiled.

    Args:
        variant: what they are made for.
        is_shared: whether other threads run them than the calling one, which dynamo tells apart.
    """
    maximize = variant.maximize
    noise_of = functools.partial(rounding.noise_of_run, of_blocks=not variant.rounds)

    # Where dynamo is disabled these run as they stand, on whole tensors: better not at all.
    def count(tensors: Tensors, coefficients: Coefficients) -> Tensor | None:
        if not torch.compiler.is_compiling() or not _is_in_rows(tensors):
            return None
        return next_mask(tensors, coefficients, maximize=maximize).count_nonzero()

    def step(run: Run, coefficients: Coefficients) -> bool:
        tensors, mean, noise_seed = run
        if not torch.compiler.is_compiling() or not _is_in_rows(tensors):
            return False
        noise = None if noise_seed is None else noise_of(tensors.param, noise_seed)
        update(tensors, coefficients, maximize=maximize, mean=mean, noise=noise, rounds=variant.rounds)
        return True

    ran: list[bool] = []

    def try_both(made: LoopKernels, scratch: Scratch) -> None:
        run, coefficients = _probe(variant), _probe_numbers(variant)
        if variant.masked:
            made.count(run.tensors, coefficients)
        ran.append(made.update(run, coefficients))

    try:
        made = LoopKernels(_compile(count), _compile(step))
        run_all([Task(functools.partial(try_both, made), 1)], Shares(2 if is_shared else 1, None))
    except Exception as error:  # a missing or broken compiler shows in many ways
        _warn_of(error)
        return None
    if ran != [True]:
        _warn_once(MESSAGE.format("torch.compile is disabled"))
        return None
    return made


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
    return torch.compile(function, dynamic=True, fullgraph=True, options=OPTIONS)


def _is_in_rows(tensors: Tensors) -> bool:
    """True; the length of rows, being asked for, is a constant of the kernel."""
    return tensors.param.shape[1] == ROW


def _probe(variant: Variant) -> Run:
    """A run of zeros."""
    param, grad, *state = [torch.zeros((PROBE_ROWS, ROW), dtype=each, device=CPU) for each in variant.dtypes]
    scale = torch.zeros((PROBE_ROWS, 1), dtype=torch.float32, device=CPU) if variant.is_coded else None
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
    """The kernels of ``single.py`` for some work: compiled ones for what they fit, else those."""

    def __init__(self, compiled: LoopKernels, work: SignUpdate) -> None:
        self.compiled = compiled
        self.errors: list[Exception] = []
        dtype = arithmetic_dtype(work.lists.params[0].dtype)
        given: Sequence[Any] = work.coefficients(CPU)
        self.coefficients = Coefficients._make(
            None if n is None else torch.as_tensor(n, dtype=dtype, device=CPU) for n in given
        )

    def count_passing(
        self, piece: Piece, unit: Unit, coefficients: Coefficients, *, maximize: bool, scratch: Scratch | None
    ) -> Tensor:
        """As :func:`.single.count_passing`."""
        rows, rest = _cut(piece)
        counted: Tensor | None = None if rows is None else self._result(self.compiled.count, rows.tensors)
        eager = functools.partial(
            count_passing, unit=unit, coefficients=coefficients, maximize=maximize, scratch=scratch
        )
        if counted is None:
            return eager(piece)
        return counted if rest is None else counted + eager(rest)

    def update_piece(
        self,
        piece: Piece,
        unit: Unit,
        coefficients: Coefficients,
        *,
        mean: Tensor | None,
        noise_seeds: Tensor | None,
        **others: Any,
    ) -> None:
        """As :func:`.single.update_piece`."""
        has_own = bool(unit.sizes) and not (mean is None and noise_seeds is None)  # each parameter of a pack
        rows, rest = (None, piece) if has_own else _cut(piece)
        if rows is not None:
            seed = None if noise_seeds is None else rounding.seed_from(rows.offset, noise_seeds[unit.members[0]])
            if not self._result(self.compiled.update, Run(rows.tensors, mean, seed)):
                rest = piece
        if rest is not None:
            update_piece(rest, unit, coefficients, mean=mean, noise_seeds=noise_seeds, **others)

    def _result(self, kernel: Callable[..., Any], argument: Any) -> Any:
        """What a kernel returns; None where it cannot run, as when dynamo finds that it has compiled it too often."""
        try:
            return kernel(argument, self.coefficients)
        except errors_of_compiling() as error:
            self.errors.append(error)
            return None


def _cut(piece: Piece) -> tuple[Piece | None, Piece | None]:
    """What of a piece a kernel takes, as rows, and what is left: of its last elements, or all of it.

    A kernel takes what follows one another in memory, and blocks of codes that are whole.
    """
    first, scale = piece.tensors.param, piece.tensors.scale
    held = piece.tensors.flat() if scale is None else (*piece.tensors.flat(), scale)
    is_plain = all(map(Tensor.is_contiguous, held))
    is_alike = is_plain or (scale is None and is_dense(first) and all(has_layout_of(tensor, first) for tensor in held))
    is_run = is_alike and piece.strides == first.stride() and all(map(has_data, held))
    numel = first.numel()
    if not is_run or (scale is not None and first.shape[-1] != ROW) or numel < LEAST_ROWS * ROW:
        return None, piece
    # A kernel is made for tensors that require grad, or do not.
    detached = [tensor.detach() if tensor.requires_grad else tensor for tensor in piece.tensors.flat()]
    flat = [tensor.view(-1) if is_plain else tensor.as_strided((numel,), (1,)) for tensor in detached]
    end = numel - numel % ROW
    rest = Piece(_tensors([tensor[end:] for tensor in flat], None), piece.offset + end) if end < numel else None
    rows = [tensor[:end].view(-1, ROW) for tensor in flat]
    return Piece(_tensors(rows, None if scale is None else scale.view(-1, 1)), piece.offset, (ROW, 1)), rest


def _tensors(flat: Sequence[Tensor], scale: Tensor | None) -> Tensors:
    return Tensors(flat[0], flat[1], tuple(flat[2:]), scale)
