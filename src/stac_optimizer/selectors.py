"""Selectors say which layers go to the cap, by meaning instead of position. They combine with ``|`` and ``-``.

Each raises a ValueError that lists the layers when it matches none: a misspelt name must not pass in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from stac_optimizer._layers import Layers, STACLayer
from stac_optimizer._validation import count, warn

__all__ = ["Selector", "embeddings", "last_layers", "named", "norms", "of_type", "where"]

# The name of a norm layer's class, or of a class that it inherits: LayerNorm, BatchNorm2d, LlamaRMSNorm.
NORM_NAME = re.compile(r"Norm(\dd)?$")


class Selector:
    """A choice of layers. Made by the functions of this module.

    Args:
        description: how the selector was written, for messages.
        pick: from the layers to the positions of those chosen.
    """

    def __init__(self, description: str, pick: Callable[[Layers], Iterable[int]]) -> None:
        self._description = description
        self._pick = pick

    def __repr__(self) -> str:
        return self._description

    def __or__(self, other: Selector) -> Selector:
        """Layers that either selects."""
        if not isinstance(other, Selector):
            return NotImplemented
        return Selector(f"{self!r} | {other!r}", lambda layers: self.select(layers) | other.select(layers))

    def __sub__(self, other: Selector) -> Selector:
        """Layers that this selects and the other does not."""
        if not isinstance(other, Selector):
            return NotImplemented
        return Selector(f"({self!r}) - ({other!r})", lambda layers: self.select(layers) - other.select(layers))

    def select(self, layers: Layers) -> frozenset[int]:
        """The positions of the chosen layers.

        Raises:
            ValueError: there are none.
        """
        chosen = frozenset(self._pick(layers))
        if not chosen:
            raise ValueError(f"{self!r} matches no layer. {_listing(layers)}")
        return chosen


def _listing(layers: Layers) -> str:
    listing = f"The layers are: {', '.join(map(repr, layers.names))}."
    for module, parameter, owner in layers.ties:
        listing += f" {module!r} has no parameters of its own: {parameter!r} is tied to {owner!r}."
    return listing


def last_layers(n: int) -> Selector:
    """The last ``n`` layers in registration order, ``n`` at least 1; all of them if there are fewer.

    Warns when the model ends in a module whose parameters all belong to earlier layers (a tied head), for then the
    last layer is another one than it seems.
    """
    n = count("n", n, least=1)

    def pick(layers: Layers) -> Iterable[int]:
        total = len(layers.layers)
        if layers.trailing_ties and n < total:
            module, parameter, owner = layers.trailing_ties[-1]
            last = ", ".join(map(repr, layers.names[-n:]))
            warn(
                f"{parameter!r} is tied to {owner!r}, so {module!r} has no parameters of its own and "
                f"the last {'layer is' if n == 1 else f'{n} layers are'} now {last}. To choose by name, pass "
                "cap=named(...)"
            )
        return range(max(total - n, 0), total)

    return Selector(f"last_layers({n})", pick)


def _by_module(description: str, is_chosen: Callable[[nn.Module], bool]) -> Selector:
    def pick(layers: Layers) -> Iterable[int]:
        if None in layers.modules:
            raise ValueError(f"{description} needs the model itself: names of parameters do not tell module types")
        return (i for i, module in enumerate(layers.modules) if module is not None and is_chosen(module))

    return Selector(description, pick)


def of_type(*types: type[nn.Module]) -> Selector:
    """Layers that are instances of any of these module classes."""
    for module_type in types:
        if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
            raise TypeError(f"of_type takes module classes, such as nn.LayerNorm, got {module_type!r}")
    if not types:
        raise ValueError("of_type takes at least one module class")
    return _by_module(f"of_type({', '.join(t.__name__ for t in types)})", lambda module: isinstance(module, types))


def norms() -> Selector:
    """Normalization layers: torch's, and every class whose name (or a base's) ends in ``Norm`` or ``Norm2d``."""
    return _by_module("norms()", lambda module: any(NORM_NAME.search(base.__name__) for base in type(module).__mro__))


def embeddings() -> Selector:
    """``nn.Embedding`` and ``nn.EmbeddingBag`` layers, subclasses included."""
    return _by_module("embeddings()", lambda module: isinstance(module, (nn.Embedding, nn.EmbeddingBag)))


def named(*patterns: str) -> Selector:
    """Layers whose name, or the name of a module around them, matches any of these patterns.

    Patterns are those of :mod:`fnmatch` and match whole names from the root: ``"lm_head"`` chooses the layer
    ``lm_head`` and all layers under it, but not ``lm_head2``; ``"*.norm*"`` chooses ``blocks.0.norm1``. Each pattern
    must match something.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"named takes patterns as strings, got {pattern!r} of type {type(pattern).__name__}")
    if not patterns:
        raise ValueError("named takes at least one pattern")

    def matching(pattern: str) -> Selector:
        def pick(layers: Layers) -> Iterable[int]:
            return (i for i, name in enumerate(layers.names) if any(fnmatchcase(p, pattern) for p in _paths(name)))

        return Selector(f"named({pattern!r})", pick)

    selectors = [matching(pattern) for pattern in patterns]
    return Selector(
        f"named({', '.join(map(repr, patterns))})",
        lambda layers: frozenset().union(*(selector.select(layers) for selector in selectors)),
    )


def _paths(name: str) -> list[str]:
    """The name, and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def where(predicate: Callable[[STACLayer], Any]) -> Selector:
    """Layers for which ``predicate(layer)`` is true; it sees ``name``, ``parameters``, ``type_name`` and the rest."""
    if not callable(predicate):
        raise TypeError(f"where takes a function of a layer, got {predicate!r} of type {type(predicate).__name__}")
    description = f"where({getattr(predicate, '__name__', repr(predicate))})"
    return Selector(description, lambda layers: (i for i, layer in enumerate(layers.layers) if predicate(layer)))
