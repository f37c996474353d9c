"""What is done around the update of a rule, so that its own text is the mathematics alone.

Local parts of DTensors, complex numbers as two reals, low precision and stochastic rounding, scales and signs of
gradients, counting, and blocks or lists of bounded memory (Note [Units of work]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from stac_optimizer.distributed.dealing import ranks_to_deal_to
from stac_optimizer.distributed.shards import real_parts, run_offset, which_are_cut
from stac_optimizer.rule.execution.parts import (
    Part,
    cut_in_turns,
    cut_parts,
    in_one_part,
    row_parts,
    together,
    whole_parts,
)
from stac_optimizer.rule.execution.rows import RowSums
from stac_optimizer.rule.execution.wholes import Factors, Norms, Wholes
from stac_optimizer.rule.hyperparameters import Group
from stac_optimizer.rule.inputs import StateLists, StepInputs, TensorList
from stac_optimizer.rule.state import count_step_
from stac_optimizer.tensors import codes, rounding
from stac_optimizer.tensors.layouts import indices_by_device_and_dtype
from stac_optimizer.tensors.precision import arithmetic_dtype, arithmetic_lr, unscaled
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.units.pieces import Lists, Piece, Tensors
from stac_optimizer.tensors.units.threads import Task, run_all, shares

__all__ = ["Measuring", "step_prepared"]

SCALE = "exp_avg_scale"


Update: TypeAlias = Callable[[TensorList, TensorList, StateLists, Group, Wholes], None]
"""See :meth:`stac_optimizer.rule.Rule.update`."""

Measure: TypeAlias = Callable[[TensorList, TensorList, StateLists, Group], Sequence[TensorList]]
"""See :meth:`stac_optimizer.rule.Rule.measured`."""


Settle: TypeAlias = Callable[[Sequence[TensorList], StateLists, Group, Wholes], Sequence[TensorList]]
"""See :meth:`stac_optimizer.rule.Rule.settled`."""


class Measuring(NamedTuple):
    """What a rule asks of whole parameters before it updates any part of them.

    Args:
        measure: is called on all parts of a parameter before any is updated.
        settle: is called once on what that gave of the whole.
        by_rows: whether those are sums over rows, and parts are cut between rows; else norms.
    """

    measure: Measure
    settle: Settle
    by_rows: bool = False


def step_prepared(
    inputs: StepInputs,
    update: Update,
    *,
    measuring: Measuring | None = None,
    numbers: Sequence[str] = (),
    is_whole: bool = False,
    is_dealt: bool = False,
) -> None:
    """Count, prepare and update.

    Args:
        inputs: of one group.
        update: the rule's.
        measuring: what is done first, where the update asks for what only whole parameters tell.
        numbers: the keys of state of which a parameter has one number.
        is_whole: whether it must get whole parameters.
        is_dealt: whether ranks share out what it computes of them, so that several must be at hand at once.
    """
    shares_work = inputs.group.get("share_work", False)
    ranks = ranks_to_deal_to(inputs.params, shares=shares_work) if is_dealt else 1
    count_step_(inputs.states["step"], never_stops=inputs.group["stochastic_rounding"] or SCALE in inputs.states)
    keys = [key for key in inputs.states if key not in ("step", SCALE, *numbers)]
    lists = Lists(
        real_parts(inputs.params),
        real_parts(inputs.grads, inputs.params),
        [real_parts(inputs.states[key]) for key in keys],
        real_parts(inputs.states[SCALE]) if SCALE in inputs.states else None,
    )
    has_noise = inputs.group["stochastic_rounding"] or lists.scales is not None
    seeds = _noise_seeds(inputs, len(keys)) if has_noise else []
    for indices in indices_by_device_and_dtype(lists.flat()):
        group = {**inputs.group, "lr": _prepared_lr(inputs.group["lr"], lists.params[indices[0]].device)}
        task = _Task(inputs, group, keys, lists, seeds, measuring, is_whole, ranks)
        if measuring is not None:
            _update_measured(task, indices, measuring, update)
            continue
        shared = None if is_whole else shares(lists.only(indices).flat())
        if shared is not None and shared.numel is not None:
            turns = cut_in_turns(lists, indices, inputs, shared.numel)
            run_all([Task(partial(_update_in_turn, task, parts, update), numel) for parts, numel in turns], shared)
        else:
            for work in task.works(indices):
                work.update(update)


def _update_in_turn(task: _Task, parts: Iterable[Part], update: Update, scratch: Scratch) -> None:
    for part in parts:
        _Work(task, [part], on_copies=False).update(update)


def _update_measured(task: _Task, indices: Sequence[int], measuring: Measuring, update: Update) -> None:
    """What is in one part is measured and updated at one go; what is not, one parameter after the other.

    Those cut over ranks are all measured first, for one collective.
    """
    cut = {*which_are_cut(task.inputs.params)}
    whole = [index for index in indices if index not in cut]
    at_once = in_one_part(task.lists, whole)
    for work in task.works(at_once, in_one_part=True):
        work.update(update, task.settled([(work, work.measured(measuring.measure))], measuring))
    large = {*whole}.difference(at_once)
    for some in ([index] for index in sorted(large)):
        _update_in_two(task, some, measuring, update)
    if len(whole) < len(indices):
        _update_in_two(task, [index for index in indices if index in cut], measuring, update)


def _update_in_two(task: _Task, indices: Sequence[int], measuring: Measuring, update: Update) -> None:
    """First all parts are measured, then all are updated."""
    # State that is rounded when it is stored would not be what was measured: an average of squares in float16 may be 0
    # by then. So measuring leaves it as it was, and moves it once more before the update.
    dtype = arithmetic_dtype(task.lists.params[indices[0]].dtype)
    is_rounded = any(tensors[indices[0]].dtype != dtype for tensors in task.lists.states)
    measured = ((work, work.measured(measuring.measure)) for work in task.works(indices, on_copies=is_rounded))
    factors = task.settled(measured, measuring)
    for work in task.works(indices):
        if is_rounded:
            work.measured(measuring.measure)
        work.update(update, factors)


class _Task(NamedTuple):
    """What is the same for all parts of one device and dtype.

    Args:
        inputs: of the step.
        group: its hyper-parameters, lr prepared.
        keys: of the state that is as large as the parameters.
        lists: local and real.
        seeds: of the noise by which weights, and each kind of state, are rounded; empty where there is none.
        measuring: what is asked of whole parameters.
        is_whole: whether there may be no parts.
        ranks: how many ranks whole parameters are dealt out to.
    """

    inputs: StepInputs
    group: Group
    keys: Sequence[str]
    lists: Lists
    seeds: Sequence[Tensor]
    measuring: Measuring | None
    is_whole: bool
    ranks: int

    def works(self, indices: Sequence[int], *, in_one_part: bool = False, on_copies: bool = False) -> Iterator[_Work]:
        """The work on these parameters, in parts.

        Args:
            indices: their places.
            in_one_part: whether each of them is in one part however it is cut.
            on_copies: whether what is stored stays as it is.
        """
        if self.is_whole:
            made = whole_parts(self.lists, indices)
        elif self.measuring is not None and self.measuring.by_rows and not in_one_part:
            made = row_parts(self.lists, indices)
        else:
            made = cut_parts(self.lists, indices, self.inputs)
        is_single = self.group["foreach"] is False and self.ranks == 1
        for parts in together(made, self.inputs.params, is_single=is_single, ranks=self.ranks):
            yield _Work(self, parts, on_copies=on_copies)

    def settled(self, measured: Iterable[tuple[_Work, Sequence[TensorList]]], measuring: Measuring) -> Factors:
        """What an update asks of whole parameters."""
        found = (RowSums if measuring.by_rows else Norms)(self.inputs.params)
        for work, kinds in measured:
            found.add(work.units, work.rows, kinds)
            del kinds  # before the next are made
        members, wholes = found.settled()
        states = {key: [tensors[member] for member in members] for key, tensors in self.inputs.states.items()}
        params = [self.inputs.params[member] for member in members]
        return Factors(members, measuring.settle(wholes, states, self.group, Wholes(params)))


class _Work:
    """What an update works on for parts of parameters.

    Args:
        task: what it is part of.
        parts: to be updated together.
        on_copies: whether nothing that is stored may change.
    """

    def __init__(self, task: _Task, parts: Sequence[Part], *, on_copies: bool) -> None:
        self._task, self._parts = task, parts
        self.units, self.rows = [part.unit for part in parts], [part.row for part in parts]
        self._stored = [[part.piece.tensors.param for part in parts]]
        self._stored += [[part.piece.tensors.state[place] for part in parts] for place in range(len(task.keys))]
        dtype = arithmetic_dtype(self._stored[0][0].dtype)
        scales = [part.piece.tensors.scale for part in parts]
        self._held = [
            [_arithmetic(tensor, scale, dtype, copy=on_copies) for tensor, scale in zip(tensors, scales, strict=True)]
            for tensors in self._stored
        ]
        self._grads = [_prepared_gradient(part.piece.tensors.grad, dtype, task.inputs) for part in parts]
        steps = [task.inputs.states["step"][part.unit.members[0]] for part in parts]
        self._state = {"step": steps, **dict(zip(task.keys, self._held[1:], strict=True))}

    def measured(self, measure: Measure) -> Sequence[TensorList]:
        """What is to be known of whole parameters; the state may have changed by it."""
        return measure(self._held[0], self._grads, self._state, self._task.group)

    def update(self, update: Update, factors: Factors | None = None) -> None:
        """Update, and store what was not computed in place."""
        task = self._task
        params = [task.inputs.params[unit.members[0]] for unit in self.units]
        settled = factors.of(self.units, self.rows, self._held[0]) if factors else ()
        update(
            self._held[0],
            self._grads,
            self._state,
            task.group,
            Wholes(params, shares=task.group.get("share_work", False), settled=settled),
        )
        for kind, (results, tensors) in enumerate(zip(self._held, self._stored, strict=True)):
            _store(results, tensors, self._parts, task.seeds[kind] if task.seeds else None, task.group)


def _store(
    results: Sequence[Tensor], stored: Sequence[Tensor], parts: Sequence[Part], seeds: Tensor | None, group: Group
) -> None:
    """Write back what was not computed in place: rounded to low precision, or in codes."""
    for part, result, tensor in zip(parts, results, stored, strict=True):
        if result is tensor:
            continue
        if tensor.dtype == torch.int8:
            assert seeds is not None
            _store_in_codes(result, tensor, part, seeds)
        elif group["stochastic_rounding"] and tensor.dtype == torch.bfloat16:
            assert seeds is not None
            rounding.round_into(result, tensor, rounding.noise_of(part.piece, part.unit, seeds))
        else:
            tensor.copy_(result)


def _arithmetic(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, *, copy: bool) -> Tensor:
    """A stored tensor as it is computed with."""
    if scale is not None and tensor.dtype == torch.int8:
        return codes.decode_matrix(tensor, scale)
    return tensor.to(dtype, copy=copy)


def _store_in_codes(average: Tensor, held: Tensor, part: Part, seeds: Tensor) -> None:
    scale = part.piece.tensors.scale
    assert scale is not None
    blocks = codes.in_blocks(average)
    piece = Piece(Tensors(blocks, blocks), 0, (codes.matrix_shape(held)[1], codes.BLOCK, 1))
    noise = rounding.noise_of(piece, part.unit, seeds, of_blocks=True)
    codes.encode_matrix_(blocks, held, scale, noise)


def _prepared_gradient(grad: Tensor, dtype: torch.dtype, inputs: StepInputs) -> Tensor:
    """The gradient to descend along; the stored one is not written to."""
    (grad,) = unscaled([grad.to(dtype)], inputs.grad_scale)
    return -grad if inputs.group["maximize"] else grad


def _prepared_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A number, or a tensor of no dimension: a captured step then sees its changes."""
    if not isinstance(lr, Tensor):
        return lr
    lr = arithmetic_lr(lr)
    is_readable = lr.is_cpu and not (lr.requires_grad or torch.compiler.is_compiling())
    return lr.item() if is_readable else lr.to(device)


def _noise_seeds(inputs: StepInputs, states: int) -> list[Tensor]:
    """For the weights, and for each kind of state, a seed for each parameter.

    Codes alone get the same ones in all parameters, and those of weights, as the sign trunk's do: they are then the
    same wherever parameters are dealt out over ranks, each of which counts its own.
    """
    rounds = inputs.group["stochastic_rounding"]
    positions = inputs.positions if rounds else [0] * len(inputs.params)
    seed, counts = inputs.group["rounding_seed"], rounding.counts(inputs.states["step"])
    offsets = list(map(run_offset, inputs.params))
    kinds = range(states + 1) if rounds else [0] * (states + 1)
    return [rounding.noise_seeds(seed, positions, counts, kind=kind, offsets=offsets) for kind in kinds]
