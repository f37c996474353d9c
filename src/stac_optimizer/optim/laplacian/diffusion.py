"""What rules with a Laplacian share: what it is applied to, and how all else is done in blocks that stay in cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_cut
from stac_optimizer.optim.laplacian.stacks import Work, stackable
from stac_optimizer.optim.laplacian.stencil import STENCILS, diffuse_, diffused_wholes, has_neighbours
from stac_optimizer.rule import Group, Hyperparameter, Rule, StateLists, StepInputs, TensorList, Wholes
from stac_optimizer.rule.execution.preparation import step_prepared
from stac_optimizer.rule.moments import Factors
from stac_optimizer.tensors.units.cutting import block_numel, blocks
from stac_optimizer.tensors.units.pieces import Lists, is_recorded
from stac_optimizer.validation import boolean, count, non_negative, one_of

__all__ = ["COMMON", "Diffused", "DiffusingRule", "at", "coupled", "denominators", "diffused_squares", "in_blocks"]

Diffused: TypeAlias = Callable[[TensorList], TensorList]
"""Makes x + c2 · Δx, in place where tensors are whole and contiguous; a collective for DTensors."""


def _stencil(name: str, value: Any) -> str:
    chosen: str = one_of(name, value, tuple(STENCILS))
    return chosen


COMMON: Mapping[str, Hyperparameter] = {
    "c2": Hyperparameter(default=1e-4, check=non_negative),
    "stencil": Hyperparameter(default="9point", check=_stencil),
    "min_spatial_size": Hyperparameter(default=16, check=count),
    "decoupled_weight_decay": Hyperparameter(default=False, check=boolean),
}
"""The hyper-parameters that they share."""


class DiffusingRule(Rule):
    """A rule that adds to some tensors c2 times their Laplacian, for which it needs whole ones, unless c2 is 0."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"

    def needs_whole(self, group: Group) -> bool:
        return bool(group["c2"])

    @abstractmethod
    def move(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, diffused: Diffused) -> None:
        """Update parameters and state in place, as :meth:`Rule.update` does."""

    def step(self, inputs: StepInputs) -> None:
        is_whole = self.needs_whole(inputs.group)
        update = self.update if any(map(is_cut, inputs.params)) else self._update_wholes
        step_prepared(inputs, update, is_whole=is_whole, is_dealt=is_whole)

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        def diffused(tensors: TensorList) -> TensorList:
            parts = _as_declared(tensors, wholes.shapes)
            return _as_real(wholes.apply(partial(_of_wholes, group=group), parts, lambda part, _: part.dtype))

        self.move(params, grads, state, group, diffused)

    def _update_wholes(
        self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes
    ) -> None:
        """The same where nothing is cut: small tensors in stacks."""
        work, shapes = Work(params, grads, state), wholes.shapes
        stacks = stackable(params, state["step"], shapes) if group["c2"] else []
        for places in stacks:
            some = work.only(places)
            stacked = some.stacked()
            self.move(*stacked, group, partial(_of_stacks, group=group))
            some.take_back(stacked)
        are_stacked = {place for places in stacks for place in places}
        rest = [index for index in range(len(params)) if index not in are_stacked]
        if rest:
            declared = [shapes[index] for index in rest]

            def diffused(tensors: TensorList) -> TensorList:
                parts = [part.contiguous() for part in _as_declared(tensors, declared)]
                return _as_real(_of_wholes(parts, group))

            self.move(*work.only(rest), group, diffused)


def _of_wholes(tensors: TensorList, group: Group) -> TensorList:
    return diffused_wholes(tensors, group["c2"], group["stencil"], group["min_spatial_size"])


def _of_stacks(stacks: TensorList, group: Group) -> TensorList:
    for stack in stacks:
        if has_neighbours(stack.shape[1:], group["min_spatial_size"]):
            diffuse_(stack, group["c2"], group["stencil"])
    return stacks


def _as_declared(tensors: TensorList, shapes: Sequence[torch.Size]) -> TensorList:
    """Complex where the parameter is, whose shape then lacks the dimension of the two parts."""
    return [
        torch.view_as_complex(tensor) if tensor.ndim > len(shape) else tensor
        for tensor, shape in zip(tensors, shapes, strict=True)
    ]


def _as_real(tensors: Sequence[Tensor]) -> TensorList:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def diffused_squares(squares: TensorList, group: Group, diffused: Diffused) -> TensorList:
    """Copies of sums of squares, diffused, which must not fall below 0; they themselves where c2 is 0."""
    if not group["c2"]:
        return squares
    result = diffused([square.clone(memory_format=torch.contiguous_format) for square in squares])
    torch._foreach_clamp_min_(result, 0.0)
    return result


def coupled(params: TensorList, grads: TensorList, group: Group) -> TensorList:
    """Gradients with the decay added, unless it is decoupled."""
    if not group["weight_decay"] or group["decoupled_weight_decay"]:
        return grads
    factor = group["weight_decay"]
    # Of a list autograd would keep the weights for the factor's sake, which the step then changes.
    result = [param * factor for param in params] if is_recorded() else list(torch._foreach_mul(params, factor))
    torch._foreach_add_(result, grads)
    return result


def denominators(squares: TensorList, eps: float) -> TensorList:
    """√v + ε. Not in place, for autograd needs the roots."""
    return list(torch._foreach_add(torch._foreach_sqrt(squares), eps))


def in_blocks(first: TensorList, second: TensorList, *others: TensorList) -> Iterator[tuple[list[int], Lists]]:
    """Lists of alike tensors, those of large ones cut into blocks, and the places of the tensors in the lists."""
    lists = Lists(first, second, others)
    are_large = [not is_recorded() and tensor.numel() > block_numel(tensor) for tensor in first]
    small = [index for index, is_large in enumerate(are_large) if not is_large]
    if small:
        yield small, lists.only(small)
    for index, is_large in enumerate(are_large):
        if is_large:
            for (param, grad, state, _), *_ in blocks(lists.at(index), numel=block_numel(first[index])):
                yield [index], Lists([param], [grad], [[tensor] for tensor in state])


def at(places: Sequence[int], factors: Factors) -> Factors:
    """The factors of the tensors at these places."""
    return cast("Factors", [factors[place] for place in places])
