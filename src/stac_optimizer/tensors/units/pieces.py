"""What an elementwise update works on: a parameter's tensors by name, parts of them, and units of such parts.

Note [Units of work]. An update of several elementwise operations is bound by memory for large tensors, each operation
being a trip through the whole of them, and by calls for small ones. So large ones are cut into blocks that stay in
cache, which also bounds the memory of temporaries, and on the CPU small ones are packed into blocks, at the price of
copying them in and out. The same operations run on the same elements, so no bit changes. torch.compile, which fuses by
itself, and a differentiated step get whole tensors. ``cutting.py`` says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Lists", "Piece", "Tensors", "Unit", "copy_back", "is_recorded"]


class Tensors(NamedTuple):
    """The tensors of one parameter, or of a part of it: of one shape, local and real.

    Args:
        param: the weights.
        grad: their gradient, which an update only reads.
        state: the averages that the rule keeps of them, in its order.
        scale: the scales of a single average in 8-bit codes, see ``codes.py``; else None.
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...] = ()
    scale: Tensor | None = None

    def flat(self) -> tuple[Tensor, ...]:
        """All of them but the scale."""
        return self.param, self.grad, *self.state

    def written(self) -> tuple[Tensor, ...]:
        """What an update writes to, but for the scale."""
        return self.param, *self.state


class Lists(NamedTuple):
    """The same of several parameters, list by list, for there may be thousands."""

    params: list[Tensor]
    grads: list[Tensor]
    states: Sequence[list[Tensor]] = ()
    scales: list[Tensor] | None = None

    def at(self, index: int) -> Tensors:
        """The tensors of one parameter."""
        state = tuple([tensors[index] for tensors in self.states])
        return Tensors(
            self.params[index], self.grads[index], state, None if self.scales is None else self.scales[index]
        )

    def only(self, chosen: Sequence[int]) -> Lists:
        """The lists of the parameters at these positions."""
        if len(chosen) == len(self.params):
            return self
        params, grads, *states = [[tensors[index] for index in chosen] for tensors in self.flat()]
        return Lists(params, grads, states, None if self.scales is None else [self.scales[index] for index in chosen])

    def flat(self) -> tuple[list[Tensor], ...]:
        """All lists but that of the scales."""
        return self.params, self.grads, *self.states


class Piece(NamedTuple):
    """A part of one parameter, or a pack of whole ones.

    Args:
        tensors: its part of weight, gradient and state.
        offset: the index, within the memory of the parameter, of its first element.
        strides: how much one step along each of its dimensions adds to that index.
    """

    tensors: Tensors
    offset: int = 0
    strides: tuple[int, ...] = (1,)


class Unit(NamedTuple):
    """What an update must look at before it writes to any of it, where it depends on a whole parameter.

    Args:
        parts: each gives pieces, and may be gone through several times, by any thread; what was written to a piece is
            in place once the next of its part is asked for, but for ``copies``.
        members: the positions of its parameters in the lists; several for a pack.
        sizes: of a pack, whose one piece is flat, the elements of each parameter in it; else empty.
        copies: tensors, and what was worked on in their place, for :func:`copy_back` once all pieces are done. Only
            while a step is recorded: dynamo of torch 2.6 goes through all pieces before it works on the first.
    """

    parts: Sequence[Iterable[Piece]]
    members: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    copies: Sequence[tuple[Tensor, Tensor]] = ()


def is_recorded() -> bool:
    """Whether the step is recorded, by torch.compile or for its derivative."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def copy_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put what was worked on in copies, the second of each pair, where it belongs."""
    for tensor, worked_on in copies:
        tensor.copy_(worked_on)
