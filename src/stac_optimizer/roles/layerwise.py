"""Learning rates that fall layer by layer towards the input, as overrides for STAC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from numbers import Real
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from stac_optimizer.model.layers import find_layers
from stac_optimizer.model.selection import Selector, layer_selector

__all__ = ["layerwise_lr_decay"]


def layerwise_lr_decay(
    model: nn.Module | Iterable[tuple[str, Tensor]], factor: float, *, include_frozen: bool = False
) -> list[tuple[Selector, dict[str, float]]]:
    """Overrides that multiply the lr of each depth of a model by ``factor`` to the power of its distance from the end.

    Depth goes by numbered blocks, in registration order: what stands before the first block (embeddings, patches,
    position and class tokens) is one depth, each block (``encoder.layer.3`` and all under it) one more, what stands
    after the last block (final norm, head) the last one, which keeps its lr. What stands between two blocks belongs to
    the earlier. Without numbered blocks each layer is a depth. A tied head has the depth of its first owner, frozen
    blocks are counted, so that freezing changes no ratio.

    Args:
        model: the model that STAC gets, or its (name, parameter) pairs.
        factor: in (0, 1]; 1 changes nothing. Usual for fine-tuning: 0.65 to 0.95, the smaller the larger the model.
        include_frozen: as in :class:`STAC`: also give overrides for depths that are frozen now.

    Returns:
        (selector, ``{"lr_ratio": ratio}``) pairs from the first depth on, none for depths whose ratio is 1. They stand
        beside other overrides in STAC's ``overrides``.

    Raises:
        TypeError: ``factor`` is no number, ``include_frozen`` no boolean, or ``model`` neither module nor pairs.
        ValueError: ``factor`` is out of range, or nothing in the model is trainable.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import STAC, layerwise_lr_decay
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> [override for _, override in layerwise_lr_decay(model, 0.5)]
        [{'lr_ratio': 0.25}, {'lr_ratio': 0.5}]
        >>> optimizer = STAC(model, lr=1e-3, trunk_lr=1e-3, overrides=layerwise_lr_decay(model, 0.5))
        >>> sorted(group["lr"] for group in optimizer.param_groups)
        [0.00025, 0.0005, 0.001]

    References:
        Clark et al., ELECTRA (arXiv 2003.10555); Bao et al., BEiT (arXiv 2106.08254).
    """
    factor = _checked(factor)
    given = list(model) if isinstance(model, Iterator) else model
    chosen = frozenset(find_layers(given, include_frozen=include_frozen).names)
    depths = _depths(find_layers(given, include_frozen=True).names)
    return [
        (_exactly(names, depth), {"lr_ratio": ratio})
        for depth, names in enumerate(depths)
        if (ratio := factor ** (len(depths) - 1 - depth)) != 1.0 and not chosen.isdisjoint(names)
    ]


def _checked(factor: Any) -> float:
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"factor must be a number in (0, 1], got {factor!r} of type {type(factor).__name__}")
    if not 0.0 < float(factor) <= 1.0:
        raise ValueError(f"factor must be a number in (0, 1], got {factor!r}")
    return float(factor)


def _depths(names: Sequence[str]) -> list[list[str]]:
    """The names of layers, depth by depth."""
    blocks = [_block(name) for name in names]
    if not any(blocks):
        return [[name] for name in names]
    last = max(index for index, block in enumerate(blocks) if block)
    depths: list[str] = []
    for index, block in enumerate(blocks):
        previous = depths[-1] if depths else "before the first block"
        depths.append("after the last block" if index > last else block or previous)
    grouped = groupby(zip(depths, names, strict=True), key=itemgetter(0))
    return [[name for _, name in group] for _, group in grouped]


def _block(name: str) -> str:
    """The path of a layer's numbered block, up to its first number; empty where there is none."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _exactly(names: Sequence[str], depth: int) -> Selector:
    """The layers of these names, by name alone: a pattern would take those under them too."""
    wanted = frozenset(names)
    return layer_selector(
        f"depth {depth} of layerwise_lr_decay",
        lambda layers: (layer for layer in layers.layers if layer.name in wanted),
    )
