"""Hyper-parameters for some of a model's parameters: which of the user's overrides apply to which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from stac_optimizer.groups.keys import STRUCTURE_KEYS
from stac_optimizer.model.layers import Layers
from stac_optimizer.model.selection import Selector, in_place_of
from stac_optimizer.validation import non_negative

__all__ = [
    "LR_RATIO",
    "Overrides",
    "checked_overrides",
    "checked_ratio",
    "merged",
    "overrides_by_name",
    "with_lr_of_ratio",
    "without_keys",
]

LR_RATIO = "lr_ratio"

Overrides: TypeAlias = Iterable[tuple[Selector, Mapping[str, Any]]]


def checked_overrides(overrides: Any) -> list[tuple[Selector, dict[str, Any]]]:
    """The pairs as given; what their values may be, the rules know.

    Raises:
        TypeError: no (selector, dict) pair.
        ValueError: a key that is no hyper-parameter, or both ``lr`` and ``lr_ratio``.
    """
    if isinstance(overrides, Mapping | str | Selector) or not isinstance(overrides, Iterable):
        raise TypeError(
            f"overrides must be (selector, dict) pairs, got {type(overrides).__name__}; write {_as_pairs(overrides)}"
        )
    pairs = list(overrides)
    if len(pairs) == 2 and isinstance(pairs[0], Selector) and isinstance(pairs[1], Mapping):
        raise TypeError(
            f"overrides must be (selector, dict) pairs, got one pair; put it in a list: [({pairs[0]!r}, ...)]"
        )
    result = []
    for index, pair in enumerate(pairs):
        where = f"overrides[{index}]"
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], Selector) and isinstance(pair[1], Mapping)):
            instead = in_place_of(pair[0]) if is_pair and isinstance(pair[1], Mapping) else ""
            raise TypeError(
                f"{where} must be a pair of a selector and a dict, such as (vectors(), {{'weight_decay': 0.0}}), got "
                f"{pair!r}{instead}"
            )
        values = dict(pair[1])
        for key in values:
            if not isinstance(key, str):
                raise TypeError(f"{where}: keys must be strings, got {key!r} of type {type(key).__name__}")
            if key in STRUCTURE_KEYS:
                raise ValueError(f"{where} may not set {key!r}, which STAC itself does; leave it out")
        result.append((pair[0], checked_ratio(values, f"{where}: ")))
    return result


def _as_pairs(given: Any) -> str:
    """What is no list of pairs, written as one."""
    if isinstance(given, Mapping) and given and all(isinstance(key, Selector) for key in given):
        return f"a list: [{', '.join(f'({key!r}, {value!r})' for key, value in given.items())}]"
    if isinstance(given, Mapping) and given:
        return f"a list, with a selector of what it is for: [(vectors(), {dict(given)!r})]"
    if isinstance(given, Selector):
        return f"[({given!r}, {{'weight_decay': 0.0}})]"
    return "[(vectors(), {'weight_decay': 0.0})], or leave it out"


def checked_ratio(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values, with a checked ``lr_ratio`` where there is one.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range, or stands beside an lr.
    """
    if LR_RATIO not in values:
        return values
    if "lr" in values:
        raise ValueError(
            f"{where}both lr and lr_ratio are given, {values['lr']!r} and {values[LR_RATIO]!r}; give one of them"
        )
    return {**values, LR_RATIO: non_negative(where + LR_RATIO, values[LR_RATIO])}


def with_lr_of_ratio(values: dict[str, Any], lr: Any) -> dict[str, Any]:
    """The values, with the lr that ``lr_ratio`` asks for in its place.

    Args:
        values: of a group.
        lr: what it is a ratio of.
    """
    if LR_RATIO not in values:
        return values
    return {**{key: value for key, value in values.items() if key != LR_RATIO}, "lr": lr * values[LR_RATIO]}


def without_keys(overrides: Sequence[tuple[Any, Mapping[str, Any]]], keys: Collection[str]) -> list[Any]:
    """The same pairs, without these keys."""
    return [(selector, {key: values[key] for key in values if key not in keys}) for selector, values in overrides]


def overrides_by_name(overrides: Sequence[tuple[Selector, Any]], layers: Layers) -> dict[str, tuple[int, ...]]:
    """For each parameter's name the positions of the overrides that apply to it.

    Raises:
        ValueError: a selector that matches nothing.
    """
    chosen = [selector.select(layers) for selector, _ in overrides]
    names = [name for layer in layers.layers for name in layer.parameter_names]
    return {name: tuple(index for index, some in enumerate(chosen) if name in some) for name in names}


def merged(overrides: Sequence[tuple[Any, Mapping[str, Any]]], applied: Iterable[int]) -> dict[str, Any]:
    """The values of the overrides that apply, later ones in place of earlier ones. ``lr`` and ``lr_ratio`` are one."""
    result: dict[str, Any] = {}
    for index in applied:
        values = overrides[index][1]
        if LR_RATIO in values or "lr" in values:
            result.pop("lr", None)
            result.pop(LR_RATIO, None)
        result.update(values)
    return result
