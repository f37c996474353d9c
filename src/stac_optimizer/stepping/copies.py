"""Parameters of classes with operations of their own, such as quantized ones, are updated by way of plain copies.

Note [Classes with operations of their own]. A subclass of Tensor says itself what each operation does, and has few of
them: no packs, lists, views that walk memory or results given by ``out=``. What every such weight has is ``copy_`` to a
plain tensor and back, and plain zeros by ``zeros_like``, for state. So it is stepped on a copy, one parameter at a time
for the sake of memory, and rounded once, when the copy is stored. Of a class whose zeros are of that class again, one
that wraps other tensors, the tensors are updated as they are, on the single-tensor path. Before the first of a kind is
stepped, its copy is: what the class lacks shows before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.model.names import name_of
from stac_optimizer.rule import Group, Rule, StepInputs
from stac_optimizer.tensors.kinds import PLAIN_TYPES, has_own_operations

__all__ = ["has_foreign", "step_by_copies", "try_kinds"]

Step = Callable[[StepInputs], None]


def has_foreign(groups: Iterable[Group]) -> bool:
    """Whether any parameter is stepped on a copy, which no kernel that skips a step by itself leaves as it was."""
    with torch.no_grad():
        return any(_is_foreign(param) for group in groups for param in group["params"])


def step_by_copies(step: Step, inputs: StepInputs) -> None:
    """Step what is plain at once, and the rest one by one (Note [Classes with operations of their own])."""
    foreign = _foreign(inputs)
    if not foreign:
        step(inputs)
        return
    plain = [index for index in range(len(inputs.params)) if index not in foreign]
    if plain:
        step(_only(inputs, plain))
    for index in foreign:
        one = _only(inputs, [index])
        copied = _copied(one)
        step(copied)
        for tensor, result in zip(_written(one), _written(copied), strict=True):
            if result is not tensor:
                tensor.copy_(result)


def try_kinds(
    gathered: Iterable[StepInputs], rules: Mapping[str, Rule], tried: set[object], all_groups: Sequence[Group]
) -> None:
    """Refuse classes that lack what a step needs.

    Args:
        gathered: what is to be stepped.
        rules: by the name that groups hold.
        tried: kinds that can be stepped; grows.
        all_groups: the optimizer's groups, which know the names.

    Raises:
        RuntimeError: naming the first parameter. Nothing was changed.
    """
    for inputs in gathered:
        rule = rules[inputs.group["rule"]]
        for index in _foreign(inputs):
            param = inputs.params[index]
            kind = (rule.name, param.dtype, param.ndim, *(type(_local(t)) for t in (param, inputs.grads[index])))
            if kind in tried:
                continue
            try:
                _try(rule.step, _only(inputs, [index]))
            except Exception as error:  # what a class cannot do shows in many ways
                raise RuntimeError(
                    f"{name_of(all_groups, param)!r} ({inputs.group.get('stac_role', rule.name)}) is of the class "
                    f"{type(_local(param)).__name__}, with which a step of {rule.name} fails: "
                    f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}. The class needs clone, "
                    "zeros_like, and copy_ from and to a plain tensor; or give such weights to an optimizer that is "
                    "made for them. Nothing was changed"
                ) from error
            tried.add(kind)


def _try(step: Step, one: StepInputs) -> None:
    """Step a copy of one parameter; nothing changes, and no generator moves on."""
    param = one.params[0].detach()
    devices = [param.device] if param.device.type in ("cuda", "xpu") else []  # others have generators without devices
    with torch.random.fork_rng(devices, device_type=param.device.type if devices else "cuda"), torch.no_grad():
        clone = param.clone()
        states = {key: [tensor.clone() for tensor in tensors] for key, tensors in one.states.items()}
        group = {**one.group, "differentiable": False}
        copied = _copied(one._replace(params=[clone], states=states, group=group))
        step(copied)
        if copied.params[0] is not clone:
            clone.copy_(copied.params[0])


def _foreign(inputs: StepInputs) -> list[int]:
    """The places of parameters that are not plain, or whose gradient or state is not."""
    lists = (inputs.params, inputs.grads, *inputs.states.values())
    if torch.compiler.is_compiling() or all(PLAIN_TYPES.issuperset(map(type, tensors)) for tensors in lists):
        return []
    with torch.no_grad():  # in which the part of a DTensor on this rank is found at once
        return [
            index
            for index, (param, *rest) in enumerate(zip(*lists, strict=True))
            if _is_foreign(param) or (not is_sharded(param) and any(map(has_own_operations, rest)))
        ]


def _is_foreign(tensor: Tensor) -> bool:
    return has_own_operations(_local(tensor))


def _local(tensor: Any) -> Tensor:
    """What the class of a tensor is asked of: of a DTensor the part on this rank."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def _only(inputs: StepInputs, chosen: Sequence[int]) -> StepInputs:
    def at(items: Sequence[Any]) -> list[Any]:
        return [items[index] for index in chosen]

    states = {key: at(tensors) for key, tensors in inputs.states.items()}
    return inputs._replace(
        params=at(inputs.params), grads=at(inputs.grads), states=states, positions=at(inputs.positions)
    )


def _copied(inputs: StepInputs) -> StepInputs:
    """The same on plain copies; what has none, as it is and on the path that asks least of it."""
    params, grads = list(map(_workable, inputs.params)), list(map(_workable, inputs.grads))
    states = {key: list(map(_workable, tensors)) for key, tensors in inputs.states.items()}
    group = inputs.group
    if any(map(_is_foreign, (*params, *grads))):
        group = {**group, "foreach": False, "fused": None}
    return inputs._replace(params=params, grads=grads, states=states, group=group)


def _workable(tensor: Tensor) -> Tensor:
    if not _is_foreign(tensor):
        return tensor
    copy = torch.zeros_like(tensor)
    if _is_foreign(copy):
        return tensor
    copy.copy_(tensor)  # what that returns may be of the class again
    return copy


def _written(inputs: StepInputs) -> Iterable[Tensor]:
    return [*inputs.params, *(tensor for tensors in inputs.states.values() for tensor in tensors)]
