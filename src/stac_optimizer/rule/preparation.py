"""What is done around the update of a rule, so that its own text is the mathematics alone.

Local parts of DTensors, complex numbers as two reals, low precision and stochastic rounding, scales and signs of
gradients, counting, and blocks or lists of bounded memory (Note [Units of work]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from stac_optimizer.distributed.dealing import ranks_to_deal_to
from stac_optimizer.distributed.shards import is_cut, real_parts, run_offset
from stac_optimizer.rule.hyperparameters import Group
from stac_optimizer.rule.inputs import StateLists, StepInputs, TensorList
from stac_optimizer.rule.state import count_step_
from stac_optimizer.rule.wholes import Norms, Wholes
from stac_optimizer.tensors import codes, rounding
from stac_optimizer.tensors.cutting import block_numel, filled, units
from stac_optimizer.tensors.kinds import has_data
from stac_optimizer.tensors.layouts import indices_by_device_and_dtype
from stac_optimizer.tensors.pieces import Lists, Piece, Tensors, Unit, is_recorded
from stac_optimizer.tensors.precision import arithmetic_dtype, arithmetic_lr, unscaled

__all__ = ["step_prepared"]

SCALE = "exp_avg_scale"
# So many sharded parameters for each rank are dealt out at once: enough that their different sizes even out. Of plain
# ones, of which each rank has all in memory, one.
DEALT = 4


Update: TypeAlias = Callable[[TensorList, TensorList, StateLists, Group, Wholes], None]
"""See :meth:`stac_optimizer.rule.Rule.update`."""

Measure: TypeAlias = Callable[[TensorList, TensorList, StateLists, Group], Sequence[TensorList]]
"""See :meth:`stac_optimizer.rule.Rule.measured`."""


class _Part(NamedTuple):
    """A piece of the parameters at these places of the lists.

    Args:
        piece: the piece.
        unit: whose members are those places, several of a pack.
    """

    piece: Piece
    unit: Unit


def step_prepared(
    inputs: StepInputs,
    update: Update,
    *,
    measure: Measure | None = None,
    is_whole: bool = False,
    is_dealt: bool = False,
) -> None:
    """Count, prepare and update.

    Args:
        inputs: of one group.
        update: the rule's.
        measure: what is done first on all parts of all parameters, where the update asks for norms of whole ones.
        is_whole: whether it must get whole parameters.
        is_dealt: whether ranks share out what it computes of them, so that several must be at hand at once.
    """
    shares = inputs.group.get("share_work", False)
    ranks = ranks_to_deal_to(inputs.params, shares=shares) if is_dealt else 1
    count_step_(inputs.states["step"], never_stops=inputs.group["stochastic_rounding"] or SCALE in inputs.states)
    keys = [key for key in inputs.states if key not in ("step", SCALE)]
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
        is_single = group["foreach"] is False and ranks == 1

        def parts() -> Iterator[list[_Part]]:
            made = _whole(lists, indices) if is_whole else _cut(lists, indices, inputs.states["step"])  # noqa: B023
            return _together(made, inputs.params, is_single=is_single, ranks=ranks)  # noqa: B023

        norms = None if measure is None else _measured(inputs, group, keys, parts(), measure, seeds)
        for some in parts():
            _update_parts(inputs, group, keys, some, update, seeds, norms)


def _whole(lists: Lists, indices: Sequence[int]) -> Iterator[_Part]:
    for index in indices:
        yield _Part(Piece(lists.at(index), strides=lists.params[index].stride()), Unit((), (index,)))


def _cut(lists: Lists, indices: Sequence[int], steps: Sequence[Tensor]) -> Iterator[_Part]:
    """Blocks and packs; what is in one pack has taken as many steps."""
    by_step: dict[float, list[int]] = {}
    for index in indices:
        is_told = lists.params[index].is_cpu and has_data(steps[index]) and not is_recorded()
        by_step.setdefault(steps[index].item() if is_told else 0.0, []).append(index)
    for same in by_step.values():
        for unit in units(lists.only(same)):
            places = Unit((), tuple([same[member] for member in unit.members]), unit.sizes)
            yield from (_Part(piece, places) for piece in unit.pieces)


def _together(
    parts: Iterable[_Part], params: Sequence[Tensor], *, is_single: bool, ranks: int
) -> Iterator[list[_Part]]:
    """What is updated together: single pieces and packs, or lists of about one block's elements.

    Args:
        parts: of one device and dtype.
        params: the parameters as the optimizer holds them.
        is_single: whether pieces go one by one.
        ranks: how many ranks whole parameters are dealt out to, some for each.
    """
    waiting: list[_Part] = []
    for part in parts:
        if is_single or part.unit.sizes:  # a pack is written back when the next is asked for
            yield [part]
        else:
            waiting.append(part)
    if waiting:
        full = block_numel(waiting[0].piece.tensors.param)
        sizes = [part.piece.tensors.param.numel() for part in waiting]
        if ranks > 1:  # by whole ones, for lists must be the same on all ranks, whose parts are not
            wholes = [params[part.unit.members[0]] for part in waiting]
            sizes = [min(whole.numel(), full // (DEALT if is_cut(whole) else 1)) // ranks for whole in wholes]
        yield from filled(waiting, sizes, full)


def _measured(
    inputs: StepInputs,
    group: Group,
    keys: Sequence[str],
    batches: Iterable[list[_Part]],
    measure: Measure,
    seeds: Sequence[Tensor],
) -> Norms | None:
    """The norms that an update asks for, of whole parameters; on the way it may have changed their state."""
    norms: Norms | None = None
    for parts in batches:
        work = _Work.of(inputs, keys, parts)
        kinds = measure(work.weights, work.grads, work.state, group)
        norms = norms or Norms(inputs.params, len(kinds))
        norms.add([part.unit for part in parts], kinds)
        for kind in range(1, len(work.stored)):  # weights are not written to
            _store(work.held[kind], work.stored[kind], parts, seeds[kind] if seeds else None, group)
    if norms is not None:
        norms.settle()
    return norms


def _update_parts(
    inputs: StepInputs,
    group: Group,
    keys: Sequence[str],
    parts: Sequence[_Part],
    update: Update,
    seeds: Sequence[Tensor],
    norms: Norms | None,
) -> None:
    work = _Work.of(inputs, keys, parts)
    units = [part.unit for part in parts]
    params = [inputs.params[unit.members[0]] for unit in units]
    wholes = Wholes(params, shares=group.get("share_work", False), norms=norms.of(units) if norms else ())
    update(work.weights, work.grads, work.state, group, wholes)
    for kind, (results, tensors) in enumerate(zip(work.held, work.stored, strict=True)):
        _store(results, tensors, parts, seeds[kind] if seeds else None, group)


class _Work(NamedTuple):
    """What an update works on for parts of parameters.

    Args:
        stored: their weights, and each kind of their state.
        held: the same as they are computed with.
        grads: ready to descend along.
        state: what of ``held`` is state, by key, and the counters.
    """

    stored: list[list[Tensor]]
    held: list[list[Tensor]]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]

    @property
    def weights(self) -> list[Tensor]:
        """The weights as they are computed with."""
        return self.held[0]

    @classmethod
    def of(cls, inputs: StepInputs, keys: Sequence[str], parts: Sequence[_Part]) -> _Work:
        stored = [[part.piece.tensors.param for part in parts]]
        stored += [[part.piece.tensors.state[place] for part in parts] for place in range(len(keys))]
        dtype = arithmetic_dtype(stored[0][0].dtype)
        scales = [part.piece.tensors.scale for part in parts]
        held = [[_arithmetic(t, scale, dtype) for t, scale in zip(tensors, scales, strict=True)] for tensors in stored]
        grads = [_prepared_gradient(part.piece.tensors.grad, dtype, inputs) for part in parts]
        steps = [inputs.states["step"][part.unit.members[0]] for part in parts]
        return cls(stored, held, grads, {"step": steps, **dict(zip(keys, held[1:], strict=True))})


def _store(
    results: Sequence[Tensor], stored: Sequence[Tensor], parts: Sequence[_Part], seeds: Tensor | None, group: Group
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


def _arithmetic(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored tensor as it is computed with."""
    return codes.decode_matrix(tensor, scale) if scale is not None and tensor.dtype == torch.int8 else tensor.to(dtype)


def _store_in_codes(average: Tensor, held: Tensor, part: _Part, seeds: Tensor) -> None:
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
