"""What a selector is: how it chooses, combines, and says that it matches nothing. Which there are: see selectors.py."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from stac_optimizer.model.layers import Layers, STACLayer
from stac_optimizer.model.names import listed

__all__ = ["Selector", "in_place_of", "layer_selector", "parameter_selector"]

# How strongly Python's operators bind, and what they do to sets.
OPERATORS: dict[str, tuple[int, Callable[[frozenset[str], frozenset[str]], frozenset[str]]]] = {
    "|": (0, operator.or_),
    "&": (1, operator.and_),
    "-": (2, operator.sub),
}
LEAF = 3
MANY = 100


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Selector:
    """A choice of parameters. Made by the functions of selectors.py, combined with ``|``, ``&`` and ``-``.

    Args:
        description: how the selector was written.
        pick: from the layers, and whether this stands inside a union, to the names of the chosen parameters.
        unit: what it chooses: "layer" or "parameter".
        by_type: whether it may match nothing inside a union.
        from_end: how many last layers it counts off; 0 where it does not go by position.
        hint: what to say when it matches nothing.
        binding: how strongly the last operator of the description binds.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import last_layers, norms, partition_trainable_layers, vectors
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> cap = last_layers(1) | vectors() - norms()
        >>> cap
        last_layers(1) | vectors() - norms()
        >>> [layer.parameter_names for layer in partition_trainable_layers(model, cap=cap).cap_layers]
        [('0.bias',), ('2.weight', '2.bias')]
    """

    description: str
    pick: Callable[[Layers, bool], frozenset[str]]
    unit: str = "layer"
    by_type: bool = False
    from_end: int = 0
    hint: str = ""
    binding: int = LEAF

    def __repr__(self) -> str:
        return self.description

    def __or__(self, other: Selector) -> Selector:
        """Parameters that either selects."""
        return self._combined("|", other)

    def __and__(self, other: Selector) -> Selector:
        """Parameters that both select."""
        return self._combined("&", other)

    def __sub__(self, other: Selector) -> Selector:
        """Parameters that this selects and the other does not."""
        return self._combined("-", other)

    # Between two selectors Python never asks these: what stands on the left is none.
    def __ror__(self, other: object) -> NoReturn:
        self._refuse("|", other)

    def __rand__(self, other: object) -> NoReturn:
        self._refuse("&", other)

    def __rsub__(self, other: object) -> NoReturn:
        self._refuse("-", other)

    def __bool__(self) -> bool:
        raise TypeError(
            f"the selector {self!r} is neither true nor false: write | in place of `or`, & in place of `and`, "
            "- in place of `not`"
        )

    def __iter__(self) -> NoReturn:
        self._refuse_lookup()

    def __contains__(self, item: object) -> NoReturn:
        self._refuse_lookup()

    def _refuse(self, sign: str, other: object) -> NoReturn:
        given = f"{other!r} of type {type(other).__name__}"
        raise TypeError(f"{sign} combines selectors, got {given} beside {self!r}{in_place_of(other)}")

    def _refuse_lookup(self) -> NoReturn:
        raise TypeError(
            f"the selector {self!r} is no collection, it chooses once it is given a model; what it chooses is shown by "
            f"partition_trainable_layers(model, cap={self!r}).cap_layers"
        )

    def select(self, layers: Layers, *, allow_empty: bool = False) -> frozenset[str]:
        """The full names of the chosen parameters.

        Args:
            layers: what to choose from.
            allow_empty: let a selector by type match nothing, as inside a union.

        Raises:
            ValueError: nothing is chosen, or the selector goes by type and only names were given.
        """
        chosen = self.pick(layers, allow_empty)
        if chosen or (allow_empty and self.by_type):
            return chosen
        raise ValueError(f"{self!r} matches no {self.unit}. {self.hint}{self._listing(layers)}")

    def _listing(self, layers: Layers) -> str:
        names = layers.names if self.unit == "layer" else tuple(name for name, _ in layers.named_parameters)
        listing = f"The {self.unit}s are: {listed(names, MANY)}."
        for place in layers.ties:
            listing += f" {place.layer!r} has no parameters of its own: {place.name!r} is tied to {place.owner!r}."
        return listing

    def _combined(self, sign: str, other: Selector) -> Selector:
        if not isinstance(other, Selector):
            self._refuse(sign, other)
        binding, combine = OPERATORS[sign]

        def pick(layers: Layers, in_union: bool) -> frozenset[str]:
            allow_empty = in_union or sign == "|"
            return combine(self.select(layers, allow_empty=allow_empty), other.select(layers, allow_empty=allow_empty))

        def written(part: Selector, needed: int) -> str:
            return f"({part!r})" if part.binding < needed else repr(part)

        return Selector(
            description=f"{written(self, binding)} {sign} {written(other, binding + 1)}",
            pick=pick,
            unit=self.unit if self.unit == other.unit else "parameter",
            by_type=self.by_type or other.by_type,
            from_end=max(self.from_end, other.from_end),
            hint=self.hint if self.hint == other.hint else "",
            binding=binding,
        )


def in_place_of(value: object) -> str:
    """What to write in place of something that is no selector; empty where that cannot be told."""
    kind = type(value)
    instead = ""
    if isinstance(value, Selector):
        instead = "it is a selector already"
    elif isinstance(value, str):
        instead = f"for layers of this name write named({value!r})"
    elif isinstance(value, type) and issubclass(value, nn.Module):
        instead = f"for layers of this class write of_type({value.__name__})"
    elif isinstance(value, nn.Module):
        instead = f"a module is chosen by its name, named(...), or by its class, of_type({kind.__name__})"
    elif kind is int and value:
        instead = f"for the last layers write last_layers({value})"
    elif isinstance(value, list | tuple | set) and value and all(isinstance(each, Selector) for each in value):
        instead = f"join them: {' | '.join(map(repr, value))}"
    elif callable(value) and getattr(value, "__module__", "").startswith(__package__):
        name = getattr(value, "__name__", kind.__name__)
        instead = f"{name} must be called: {name}(...)"
    elif callable(value):
        instead = "a function of layers goes into where(...), one of names and parameters into parameters_where(...)"
    return instead and f"; {instead}"


def layer_selector(
    description: str,
    pick: Callable[[Layers], Iterable[STACLayer]],
    *,
    by_type: bool = False,
    from_end: int = 0,
    hint: str = "",
) -> Selector:
    """A selector of all parameters of the layers that ``pick`` gives."""
    return Selector(
        description=description,
        pick=lambda layers, _: frozenset(name for layer in pick(layers) for name in layer.parameter_names),
        by_type=by_type,
        from_end=from_end,
        hint=hint,
    )


def parameter_selector(
    description: str, is_chosen: Callable[[str, Tensor], Any], *, by_type: bool = False, hint: str = ""
) -> Selector:
    """A selector of the parameters of which ``is_chosen(name, parameter)`` is true."""
    return Selector(
        description=description,
        pick=lambda layers, _: frozenset(name for name, param in layers.named_parameters if is_chosen(name, param)),
        unit="parameter",
        by_type=by_type,
        hint=hint,
    )
