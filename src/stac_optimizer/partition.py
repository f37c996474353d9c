"""The split of a model's layers into trunk and cap, and the table that shows it. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stac_optimizer._layers import Layers, STACLayer, find_layers
from stac_optimizer._validation import count
from stac_optimizer.selectors import Selector, last_layers

__all__ = ["STACLayer", "STACPartition", "partition_trainable_layers", "split"]


@dataclass(frozen=True, eq=False, kw_only=True)
class STACPartition:
    """The layers of each role, in registration order. ``print`` shows them as a table.

    Args:
        trunk_layers: the earlier layers.
        cap_layers: the last layers, or those that a selector chose.
    """

    trunk_layers: tuple[STACLayer, ...]
    cap_layers: tuple[STACLayer, ...]

    @property
    def trunk_layer_names(self) -> tuple[str, ...]:
        """Names of the trunk's layers."""
        return tuple(layer.name for layer in self.trunk_layers)

    @property
    def cap_layer_names(self) -> tuple[str, ...]:
        """Names of the cap's layers."""
        return tuple(layer.name for layer in self.cap_layers)

    @property
    def trunk_parameters(self) -> tuple[Tensor, ...]:
        """Parameters of the trunk, layer by layer."""
        return tuple(parameter for layer in self.trunk_layers for parameter in layer.parameters)

    @property
    def cap_parameters(self) -> tuple[Tensor, ...]:
        """Parameters of the cap, layer by layer."""
        return tuple(parameter for layer in self.cap_layers for parameter in layer.parameters)

    def __str__(self) -> str:
        """A table: a line for each layer, a total for each role and for both.

        ``state bytes`` is what the optimizer keeps once every parameter has stepped ("-" where no optimizer was asked),
        ``AdamW bytes`` what ``torch.optim.AdamW`` would keep.
        """
        roles = (("trunk", self.trunk_layers), ("cap", self.cap_layers))
        every_layer = (*self.trunk_layers, *self.cap_layers)
        numel = sum(layer.numel for layer in every_layer)
        header = ("layer", "type", "role", "parameters", "share", "state bytes", "AdamW bytes")
        rows = [
            (layer.name, layer.type_name or "-", role, *_amounts([layer], numel))
            for role, layers in roles
            for layer in layers
        ]
        totals = [(_layer_count(layers), "", role, *_amounts(layers, numel)) for role, layers in roles]
        totals.append((_layer_count(every_layer), "", "all", *_amounts(every_layer, numel)))
        return _table(header, rows, totals)


def _layer_count(layers: Iterable[STACLayer]) -> str:
    number = len(tuple(layers))
    return f"{number} layer{'' if number == 1 else 's'}"


def _amounts(layers: Iterable[STACLayer], total: int) -> tuple[str, str, str, str]:
    """Parameters, their share of all, and the bytes of state."""
    layers = tuple(layers)
    numel = sum(layer.numel for layer in layers)
    state_bytes = [layer.state_bytes for layer in layers]
    return (
        f"{numel:,}",
        f"{numel / max(total, 1):.1%}",
        "-" if None in state_bytes else f"{sum(number or 0 for number in state_bytes):,}",
        f"{sum(layer.adamw_bytes for layer in layers):,}",
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], totals: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell: the first three are words, to the left, the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, *totals, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows), rule, *map(line, totals)])


def split(layers: Layers, *, last_n_layers: int = 1, cap: Selector | None = None) -> STACPartition:
    """Split layers that were found already; the arguments are those of :func:`partition_trainable_layers`."""
    last_n_layers = count("last_n_layers", last_n_layers)
    if cap is not None and not isinstance(cap, Selector):
        raise TypeError(
            f"cap must be a selector, such as named('lm_head'), or None, got {cap!r} of type {type(cap).__name__}"
        )
    if cap is None and last_n_layers:
        cap = last_layers(last_n_layers)
    chosen = cap.select(layers) if cap is not None else frozenset()
    return STACPartition(
        trunk_layers=tuple(layer for index, layer in enumerate(layers.layers) if index not in chosen),
        cap_layers=tuple(layer for index, layer in enumerate(layers.layers) if index in chosen),
    )


def partition_trainable_layers(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    last_n_layers: int = 1,
    cap: Selector | None = None,
) -> STACPartition:
    """Split the layers of a model into trunk and cap.

    A layer is a module that directly owns trainable parameters, in the order of ``model.named_modules()``. Frozen
    parameters are left out, a shared parameter belongs to its first owner, parameters of the model itself form the
    layer ``"<root>"``. Names never carry the prefixes of wrappers (DDP, ``torch.compile``, checkpoint wrappers); where
    only names are given, a leading ``module.`` stays, as a user's own submodule may be called so.

    Args:
        model: a module, or (name, parameter) pairs as ``model.named_parameters()`` gives, which are split exactly as
            the module would be.
        last_n_layers: how many final layers form the cap, 0 or more; 0: all trunk; more than there are: all cap.
        cap: a selector that replaces ``last_n_layers``.

    Raises:
        TypeError: an argument of the wrong type, or parameters without names.
        ValueError: nothing is trainable, a negative ``last_n_layers``, or a selector that matches nothing.

    Example:
        >>> from torch import nn
        >>> from stac_optimizer import norms, last_layers, partition_trainable_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> partition_trainable_layers(model, cap=norms() | last_layers(1)).cap_layer_names
        ('1', '2')
    """
    return split(find_layers(model), last_n_layers=last_n_layers, cap=cap)
