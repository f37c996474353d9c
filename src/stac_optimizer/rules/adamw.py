"""The cap's rule, AdamW or AMSGrad: the state is declared here, the arithmetic is torch's functional entry.

Decoupled Weight Decay Regularization (Loshchilov and Hutter), https://arxiv.org/abs/1711.05101, and On the Convergence
of Adam and Beyond (Reddi et al.), https://openreview.net/forum?id=ryQu7f-RZ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stac_optimizer import _rounding, _shards, _tensors, _units
from stac_optimizer._units import Piece, Unit
from stac_optimizer._validation import boolean, non_negative, pair_of_fractions
from stac_optimizer.rules._rule import Group, Hyperparameter, Rule, StateTensor, StepInputs

__all__ = ["AdamW"]


class AdamW(Rule):
    """``torch.optim.AdamW`` to the bit, on each of its paths.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the parameter), with ``amsgrad`` also
    ``max_exp_avg_sq``. One lr moves a weight by about lr.
    """

    name = "adamw"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "amsgrad": Hyperparameter(default=False, check=boolean),
    }
    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
    paths = frozenset({"single", "foreach", "fused"})

    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        """The counter and two averages, three tensors under ``amsgrad``."""
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
        return StateTensor(key="step", counter=True), *(StateTensor(key=key) for key in keys)

    def refusal(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """What torch's AdamW would find out in the middle of its update."""
        reason = super().refusal(param, grad, group)
        if reason is not None:
            return reason
        if grad.dtype != param.dtype:
            return f"is {param.dtype} and its gradient {grad.dtype}; AdamW needs one dtype, so convert the gradient"
        device = param.device.type
        if group["fused"] and not (device in _tensors.fused_devices() and param.is_floating_point()):
            return f"is {param.dtype} on {device!r}, for which torch has no fused AdamW; use fused=False"
        if group["capturable"] and not torch.compiler.is_compiling() and device not in _tensors.capturable_devices():
            return f"is on {device!r}, which cannot be captured; use capturable=False"
        return None

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        if not group["fused"] or group["stochastic_rounding"]:
            return False
        params = _shards.local_views(group["params"])
        held = [_shards.local_views(list(states.get(whole, {}).values())) for whole in group["params"]]
        return not any(param.is_cpu for param in params) and all(map(_is_walkable, params, held))

    def update(self, inputs: StepInputs) -> None:
        """Call torch, on the path that the flags ask for."""
        params, grads = _shards.local_views(inputs.params), _shards.local_views(inputs.grads, inputs.params)
        states = [_shards.local_views(tensors) for tensors in inputs.states]
        work = Work(inputs.params, params, grads, states, inputs.group, inputs.grad_scale, inputs.found_inf)
        path = self.path(inputs.params, inputs.group)
        if inputs.group["stochastic_rounding"]:
            _rounding_adamw(work, inputs.positions, list(map(_shards.run_offset, inputs.params)))
        elif path == "fused":
            _fused_adamw(work)
        elif path == "foreach" and not params[0].is_cpu:
            _adamw(work, foreach=inputs.group["foreach"])
        else:
            _adamw_in_blocks(work, foreach=path == "foreach")


class Work(NamedTuple):
    """The update of some parameters, ``wholes``, of one group by local tensors; ``states`` starts with the counters."""

    wholes: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    group: Group
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def only(self, chosen: Sequence[int]) -> Work:
        """The same for the parameters at these positions."""
        held = (self.wholes, self.params, self.grads, *self.states)
        wholes, params, grads, *states = [[tensors[i] for i in chosen] for tensors in held]
        return Work(wholes, params, grads, states, self.group, self.grad_scale, self.found_inf)

    def using(self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> Work:
        """The same on other tensors; torch.compile of torch 2.6 knows no ``_replace``."""
        return Work(self.wholes, params, grads, states, self.group, self.grad_scale, self.found_inf)

    def needs_no_copy(self, index: int) -> bool:
        """Whether gradient and state of a parameter are of its dtype, and the gradient of its layout."""
        param, grad = self.params[index], self.grads[index]
        same_dtype = all(tensors[index].dtype == param.dtype for tensors in (self.grads, *self.states[1:]))
        return same_dtype and _tensors.has_layout_of(grad, param)


# Note [Fused AdamW and layouts]
# torch's fused kernels walk memory, not indices: where the layouts of parameter, gradient and state differ they compute
# wrong values or write outside the parameter. Gradients are brought to the parameter's layout; a parameter with gaps in
# memory, such as a slice, or with state in another layout, takes the single-tensor path.
def _fused_adamw(work: Work) -> None:
    walkable = list(map(_is_walkable, work.params, zip(*work.states, strict=True)))
    # What needs copies goes one by one in blocks. torch's kernel writes the unscaled gradients back, hence the clone.
    plain = [
        ok and work.grad_scale is None and work.needs_no_copy(index) and not _ends_elsewhere(work, index)
        for index, ok in enumerate(walkable)
    ]
    if any(plain):
        _adamw(work.only([index for index, flag in enumerate(plain) if flag]), fused=True)
    for index, (ok, is_done) in enumerate(zip(walkable, plain, strict=True)):
        one = work.only([index])
        if not ok:
            _adamw_in_blocks(one, foreach=False)
        elif not is_done:
            one = _in_layout(one)
            is_shard = _ends_elsewhere(one, 0)
            for block, _ in _blocks(one, cut=not is_shard):
                _fused_block(
                    block.using(block.params, [grad.clone() for grad in block.grads], block.states), is_shard=is_shard
                )


def _in_layout(work: Work) -> Work:
    """The same with gradients in the layout of their parameters."""
    return work.using(work.params, list(map(_tensors.in_layout_of, work.params, work.grads)), work.states)


def _is_walkable(param: Tensor, state: Iterable[Tensor]) -> bool:
    return _tensors.is_dense(param) and all(not each.ndim or _tensors.has_layout_of(each, param) for each in state)


# Note [Fused AdamW and shards]
# On the CPU torch's fused kernel rounds differently in the last elements of a tensor, which do not fill a vector. So
# that a shard gets the bits of the whole, its last elements are computed among others that fill vectors, and what it
# has of the whole's end in its place there. This many elements are whole vectors on every CPU.
LANES = 64


def _ends_elsewhere(work: Work, index: int) -> bool:
    """Whether a parameter is a shard, so that its end need not be that of the whole."""
    param = work.params[index]
    return param.is_cpu and param.is_contiguous() and _shards.is_sharded(work.wholes[index])


def _fused_block(work: Work, *, is_shard: bool) -> None:
    """Run torch's fused kernel on a block of one parameter, or on all that this rank holds of it."""
    if not is_shard:
        _adamw(work, fused=True)
        return
    (step,), *states = work.states
    before = step.clone()
    flat = [tensor.view(-1) for tensor in (*work.params, *work.grads, *(tensor for (tensor,) in states))]
    end = _shards.places_at_end(work.wholes[0], LANES)
    last = flat[0].numel() - len(end)
    cut = last - last % LANES
    _adamw(_on(work, [tensor[:cut] for tensor in flat]), fused=True)
    for start, places, numel in (
        (cut, list(range(last - cut)), LANES),
        (last, end, work.wholes[0].numel() % LANES),
    ):
        if places:
            step.copy_(before)
            parts = [tensor[start : start + len(places)] for tensor in flat]
            among = [part.new_ones(numel).index_copy_(0, torch.tensor(places, device="cpu"), part) for part in parts]
            _adamw(_on(work, among), fused=True)
            for index, (part, others) in enumerate(zip(parts, among, strict=True)):
                if index != 1:  # gradients are read-only
                    part.copy_(others[places])


def _on(work: Work, tensors: Sequence[Tensor]) -> Work:
    """The same for other tensors of one parameter: weight, gradient, averages."""
    params, grads, *states = [[tensor] for tensor in tensors]
    return work.using(params, grads, [work.states[0], *states])


def _adamw_in_blocks(work: Work, *, foreach: bool) -> None:
    """Small parameters together, as lists in buckets; large ones block by block, see Note [Units of work]."""
    numels = [_block_numel(param) for param in work.params]
    small = [index for index, param in enumerate(work.params) if param.numel() <= numels[index]]
    sizes = [work.params[index].numel() for index in small]
    for some in _units.filled(small, sizes, max(numels)) if foreach else [small]:
        if some:
            _adamw(work.only(some), foreach=foreach)
    for index, param in enumerate(work.params):
        if param.numel() > numels[index]:
            for block, _ in _blocks(work.only([index])):
                _adamw(block, foreach=foreach)


def _block_numel(param: Tensor) -> int:
    return param.numel() if _units.is_recorded() else _units.block_numel(param)


def _blocks(work: Work, *, cut: bool = True) -> Iterator[tuple[Work, Piece]]:
    """The blocks of one parameter, without ``cut`` a single one, each to be stepped from the same count of steps."""
    (step,), *states = work.states
    before = step.clone()
    tensors = [*work.params, *work.grads, *(tensor for (tensor,) in states)]
    for piece in _units.blocks(*tensors, numel=_block_numel(work.params[0]) if cut else None):
        step.copy_(before)
        yield _on(work, piece.tensors), piece


def _rounding_adamw(work: Work, positions: Sequence[int], offsets: Sequence[int]) -> None:
    """In float32, block by block; what is stored is rounded stochastically, each kind of tensor by bits of its own."""
    seed, fused = work.group["rounding_seed"], work.group["fused"] or None
    counts = _rounding.counts(work.states[0]) + 1
    kinds = range(len(work.states))
    salts = [_rounding.salts(seed, positions, counts, kind=kind, offsets=offsets) for kind in kinds]
    for index in range(len(positions)):
        one = work.only([index])
        is_shard = bool(fused) and _ends_elsewhere(one, 0)
        if is_shard:
            one = _in_layout(one)
        for block, piece in _blocks(one, cut=not is_shard):
            (step,), *states = block.states
            stored = [*block.params, *(tensor for (tensor,) in states)]
            weight = block.params[0].float()
            held = [_tensors.in_layout_of(weight, tensor.float()) for (tensor,) in states]
            grads = [_tensors.in_layout_of(weight, grad.float()) for grad in block.grads]
            in_float32 = block.using([weight], grads, [[step], *([tensor] for tensor in held)])
            if fused:
                _fused_block(in_float32, is_shard=is_shard)
            else:
                _adamw(in_float32, foreach=False)
            for result, tensor, salt in zip((weight, *held), stored, salts, strict=True):
                if tensor.dtype == torch.bfloat16:
                    noise = _rounding.noise_of(piece, Unit([piece], (index,)), salt)
                    _rounding.round_into(result, tensor, noise)
                else:  # of a checkpoint, which keeps its dtype
                    tensor.copy_(result)


def _adamw(work: Work, *, fused: bool | None = None, foreach: bool | None = None) -> None:
    group = work.group
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    grads = work.grads if fused else _tensors.unscaled(work.grads, work.grad_scale)
    # torch wants one dtype. A checkpoint may have brought state of another, which it keeps: work in the wider one then.
    stored = [work.params, *work.states[1:]]
    dtypes = [
        reduce(torch.promote_types, (tensor.dtype for tensor in tensors)) for tensors in zip(*stored, strict=True)
    ]
    weights, exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = working = [_converted(tensors, dtypes) for tensors in stored]
    adamw(
        weights,
        _converted(grads, dtypes),
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs[0] if max_exp_avg_sqs else [],
        work.states[0],
        foreach=foreach,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=fused,
        grad_scale=work.grad_scale if fused else None,
        found_inf=work.found_inf if fused else None,
        has_complex=any(param.is_complex() for param in weights),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for results, tensors in zip(working, stored, strict=True):
        for result, tensor in zip(results, tensors, strict=True):
            _tensors.downcast(result, tensor)


def _converted(tensors: list[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
