"""Layers that repeat each other, as the same layer of each block of a deep model does, under one name for all."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from stac_optimizer.model.layers import STACLayer

__all__ = ["Repeats", "repeats_of"]

# Two of a kind are as soon read as a range.
FEWEST = 3
NUMBER = re.compile("0|[1-9][0-9]{0,8}")  # as Python counts modules; 00 and 01 would not be told apart


class Repeats(NamedTuple):
    """Layers under one name.

    Args:
        name: theirs, with a range in the place of the number in which they differ: ``h.{0-11}.attn``.
        layers: they; a single one where it has no like.
    """

    name: str
    layers: tuple[STACLayer, ...]


def repeats_of(layers: Sequence[STACLayer]) -> list[Repeats]:
    """Put together what has one type, as many parameters, one decay, and names that differ in one number alone.

    That is the first in a name; where it tells stages of different widths apart, the second.
    """
    found: list[Repeats] = []
    left = list(layers)
    for nth in range(2):
        alike: dict[Hashable, list[STACLayer]] = {}
        for layer in left:
            if (parts := _around_number(layer.name, nth)) is not None:
                decays = tuple(dict.fromkeys(layer.weight_decays))
                key = (*map(tuple, parts[::2]), layer.type_name, layer.numel, layer.state_bytes, decays)
                alike.setdefault(key, []).append(layer)
        several = [some for of_kind in alike.values() for some in _by_lr(of_kind) if len(some) >= FEWEST]
        found += [Repeats(_name(some, nth), tuple(some)) for some in several]
        done = {id(layer) for some in several for layer in some}
        left = [layer for layer in left if id(layer) not in done]
    found += [Repeats(layer.name, (layer,)) for layer in left]
    order = {id(layer): place for place, layer in enumerate(layers)}
    return sorted(found, key=lambda repeats: order[id(repeats.layers[0])])


def _by_lr(layers: list[STACLayer]) -> list[list[STACLayer]]:
    """All together where they have one lr, or each its own, as by depth; else those of one lr each."""
    by_lr: dict[tuple[float, ...], list[STACLayer]] = {}
    for layer in layers:
        by_lr.setdefault(tuple(dict.fromkeys(layer.lrs)), []).append(layer)
    return [layers] if len(by_lr) in (1, len(layers)) else list(by_lr.values())


def _around_number(name: str, nth: int) -> tuple[list[str], int, list[str]] | None:
    """The parts of a name before its first, or a later, number, that, and the parts behind; None without one."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if NUMBER.fullmatch(part)]
    if nth >= len(places):
        return None
    place = places[nth]
    return parts[:place], int(parts[place]), parts[place + 1 :]


def _name(layers: Iterable[STACLayer], nth: int) -> str:
    around = [parts for parts in (_around_number(layer.name, nth) for layer in layers) if parts is not None]
    before, _, behind = around[0]
    return ".".join([*before, "{" + _ranges(number for _, number, _ in around) + "}", *behind])


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
