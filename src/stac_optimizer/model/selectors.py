"""Selectors say which parameters something is for, by meaning instead of position.

Layer selectors choose all parameters of a layer: :func:`last_layers`, :func:`of_type`, :func:`norms`,
:func:`embeddings`, :func:`named`, :func:`where`. Parameter selectors choose each by itself: :func:`vectors`,
:func:`biases`, :func:`parameters_where`. They combine with ``|`` (either), ``&`` (both) and ``-`` (but not).

A selector that matches nothing is a ValueError that lists what there is, for a misspelt name must not pass in silence.
Inside a union, those that go by type or shape (``of_type``, ``norms``, ``embeddings``, ``vectors``, ``biases``) may
match nothing as long as the union matches something, so that one recipe serves many models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from stac_optimizer.model.layers import Layers, STACLayer
from stac_optimizer.model.names import tensor_name
from stac_optimizer.model.selection import Selector, in_place_of, layer_selector, parameter_selector
from stac_optimizer.validation import count

__all__ = [
    "Selector",
    "biases",
    "embeddings",
    "last_layers",
    "named",
    "norms",
    "of_type",
    "parameters_where",
    "untied_embeddings",
    "vectors",
    "where",
]

# The name of a norm layer's class, or of a class that it inherits: LayerNorm, BatchNorm2d, LlamaRMSNorm, RMSNormGated.
NORM_NAME = re.compile(r"Norm(\dd|Gated)?$")
# The name of a bias in torch and the libraries around it: bias, in_proj_bias, q_bias; bias_ih_l0, bias_k.
BIAS_NAME = re.compile(r"bias$|^bias_")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LEAVE_OUT = "The model has none: leave it out. "
GIVEN_A_LAYER = (
    "The function is given a STACLayer (name, type_name, parameter_names, parameters, numel), not the module; for "
    "classes of modules use of_type. "
)
GIVEN_A_PARAMETER = "The function is given a parameter's full name and the parameter. "


def last_layers(n: int) -> Selector:
    """The last layers in registration order.

    A model that ends in a tied head (its weight is the embedding's) has its last layer before that; a split whose cap
    lacks the tied weight then warns.

    Args:
        n: how many, 1 or more; all of them if there are fewer.

    Raises:
        TypeError: ``n`` is no integer.
        ValueError: ``n`` is less than 1.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import last_layers, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=last_layers(2)).cap_layer_names
        ('1', '2')
    """
    n = count("n", n, least=1)
    return layer_selector(f"last_layers({n})", lambda layers: layers.layers[-n:], from_end=n)


def _by_module(description: str, is_chosen: Callable[[nn.Module, nn.Module | None], bool]) -> Selector:
    """A selector by a layer's module and the module around it."""

    def pick(layers: Layers) -> Iterable[STACLayer]:
        for layer, module, parent in zip(layers.layers, layers.modules, layers.parents, strict=True):
            if module is None:
                raise ValueError(
                    f"{description} needs the model itself: names of parameters do not tell module types. Pass the "
                    "model in place of its named parameters, or choose by name: named(...), vectors(), biases()"
                )
            if is_chosen(module, parent):
                yield layer

    return layer_selector(description, pick, by_type=True, hint=LEAVE_OUT)


def of_type(*types: type[nn.Module]) -> Selector:
    """Layers that are instances of any of these module classes, subclasses included. Needs the model, not names alone.

    Args:
        *types: one class or more, such as ``nn.LayerNorm``.

    Raises:
        TypeError: one of them is no module class.
        ValueError: there are none.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import of_type, partition_trainable_layers
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=of_type(nn.Conv2d)).cap_layer_names
        ('0',)
    """
    kinds: tuple[Any, ...] = types
    for given in kinds:
        if not isinstance(given, type) or not issubclass(given, nn.Module):
            instead = f"; write of_type({type(given).__name__})" if isinstance(given, nn.Module) else in_place_of(given)
            instead = "; give them one by one, of_type(A, B)" if isinstance(given, tuple | list) else instead
            raise TypeError(f"of_type takes module classes, such as nn.LayerNorm, got {given!r}{instead}")
    if not types:
        raise ValueError("of_type takes at least one module class, such as of_type(nn.LayerNorm), got none")
    return _by_module(f"of_type({', '.join(t.__name__ for t in types)})", lambda module, _: isinstance(module, types))


def norms() -> Selector:
    """Normalization layers. Needs the model, not names alone.

    These are torch's, and every class whose name, or that of a base, ends in ``Norm``, ``Norm2d`` (1d, 3d) or
    ``NormGated``.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import last_layers, norms, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=last_layers(1) | norms()).cap_layer_names
        ('1', '2')
    """
    return _by_module(
        "norms()", lambda module, _: any(NORM_NAME.search(base.__name__) for base in type(module).__mro__)
    )


def embeddings() -> Selector:
    """``nn.Embedding`` and ``nn.EmbeddingBag`` layers, subclasses included. Needs the model, not names alone.

    Parametrized ones count, and so do adapters as PEFT makes them: tables of parameters (``nn.ParameterDict``) in a
    module whose ``base_layer`` is an embedding.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import embeddings, last_layers, partition_trainable_layers
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> partition_trainable_layers(model, cap=last_layers(1) | embeddings()).cap_layer_names
        ('0', '2')
    """
    return _by_module("embeddings()", _is_embedding)


def _is_embedding(module: nn.Module, parent: nn.Module | None) -> bool:
    if isinstance(module, nn.ParameterDict):
        while isinstance(base := getattr(parent, "base_layer", None), nn.Module):
            parent = base
        return isinstance(parent, EMBEDDINGS)
    return isinstance(module, EMBEDDINGS)


def untied_embeddings(layers: Layers) -> frozenset[str]:
    """Names of embeddings' parameters whose rows have no gradient where their tokens are absent; none without modules.

    One that is tied to another kind of module, such as the head, has gradients in every row.
    """
    if None in layers.modules:
        return frozenset()
    dense = {place.owner for place in layers.shared if not isinstance(place.module, EMBEDDINGS)}
    return embeddings().select(layers, allow_empty=True) - dense


def named(*patterns: str) -> Selector:
    """Layers whose name, or the name of a module around them, matches any of these patterns.

    Args:
        *patterns: one or more, as :mod:`fnmatch` has them. They match whole names of layers from the root:
            ``"lm_head"`` chooses the layer ``lm_head`` and all layers under it, but not ``lm_head2``; ``"*.norm*"``
            chooses ``blocks.0.norm1``. Each must match something, inside a union too.

    Raises:
        TypeError: a pattern is no string.
        ValueError: there are none.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import named, partition_trainable_layers
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2), "gate": nn.Linear(4, 1)})
        >>> partition_trainable_layers(model, cap=named("head", "g*")).cap_layer_names
        ('head', 'gate')
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"named takes patterns as strings, got {pattern!r} of type {type(pattern).__name__}; give them one by "
                "one: named('lm_head', '*.norm*')"
            )
    if not patterns:
        raise ValueError("named takes at least one pattern, such as named('lm_head'), got none")

    def matching(pattern: str) -> Selector:
        def pick(layers: Layers) -> Iterable[STACLayer]:
            return (layer for layer in layers.layers if any(fnmatchcase(path, pattern) for path in _paths(layer.name)))

        return layer_selector(f"named({pattern!r})", pick)

    selectors = [matching(pattern) for pattern in patterns]
    return Selector(
        description=f"named({', '.join(map(repr, patterns))})",
        pick=lambda layers, _: frozenset().union(*(selector.select(layers) for selector in selectors)),
    )


def _paths(name: str) -> list[str]:
    """The name, and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _name_of(predicate: Callable[..., Any]) -> str:
    return getattr(predicate, "__name__", repr(predicate))


def _told(predicate: Callable[..., Any], hint: str) -> Callable[..., Any]:
    """The function; where it takes what it is given for something else, its error says what that is."""

    def told(*given: Any) -> Any:
        try:
            return predicate(*given)
        except (AttributeError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else AttributeError
            raise kind(f"{error}. {hint.rstrip()}") from error

    return told


def where(predicate: Callable[[STACLayer], Any]) -> Selector:
    """Layers for which a function is true. It must be true of one, inside a union too.

    Args:
        predicate: takes the :class:`STACLayer`, a record of a layer's ``name``, ``type_name``, ``parameter_names``,
            ``parameters`` and ``numel``. It is not given the module: for classes there is :func:`of_type`.

    Raises:
        TypeError: it is no function.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import partition_trainable_layers, where
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=where(lambda layer: layer.numel < 20)).cap_layer_names
        ('1',)
    """
    if not callable(predicate):
        raise TypeError(
            f"where takes a function of a layer, got {predicate!r} of type {type(predicate).__name__}"
            f"{in_place_of(predicate)}"
        )
    is_chosen = _told(predicate, GIVEN_A_LAYER)
    return layer_selector(
        f"where({_name_of(predicate)})",
        lambda layers: (layer for layer in layers.layers if is_chosen(layer)),
        hint=GIVEN_A_LAYER,
    )


def vectors() -> Selector:
    """Parameters of fewer than two dimensions: biases, the scales of norms, single numbers.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import partition_trainable_layers, vectors
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [layer.parameter_names for layer in partition_trainable_layers(model, cap=vectors()).cap_layers]
        [('0.bias',), ('1.weight', '1.bias')]
    """
    return parameter_selector("vectors()", lambda _, parameter: parameter.dim() < 2, by_type=True, hint=LEAVE_OUT)


def biases() -> Selector:
    """Parameters that are called a bias, whatever their shape.

    The last part of the name ends in ``bias`` (``bias``, ``in_proj_bias``, ``q_bias``) or starts with ``bias_``
    (``bias_ih_l0`` of recurrent layers, ``bias_k`` of attention). A table such as ``relative_position_bias_table``, or
    the ``weight`` of a module that is called a bias, is none.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import biases, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [layer.parameter_names for layer in partition_trainable_layers(model, cap=biases()).cap_layers]
        [('0.bias',), ('1.bias',)]
    """
    return parameter_selector(
        "biases()", lambda name, _: BIAS_NAME.search(tensor_name(name)), by_type=True, hint=LEAVE_OUT
    )


def parameters_where(predicate: Callable[[str, Tensor], Any]) -> Selector:
    """Parameters for which a function of two arguments is true. It must be true of one, inside a union too.

    Args:
        predicate: takes the parameter's full name, as in ``model.named_parameters()`` but without the names of
            wrappers, and the parameter.

    Raises:
        TypeError: it is no function.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import parameters_where, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> cap = parameters_where(lambda name, parameter: name.endswith("weight") and parameter.shape[0] < 4)
        >>> partition_trainable_layers(model, cap=cap).cap_layers[0].parameter_names
        ('1.weight',)
    """
    if not callable(predicate):
        raise TypeError(
            f"parameters_where takes a function of a name and a parameter, got {predicate!r} of type "
            f"{type(predicate).__name__}{in_place_of(predicate)}"
        )
    return parameter_selector(
        f"parameters_where({_name_of(predicate)})", _told(predicate, GIVEN_A_PARAMETER), hint=GIVEN_A_PARAMETER
    )
