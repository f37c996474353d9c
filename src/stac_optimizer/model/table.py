"""The table of a partition: a line a layer, totals, what was moved; and the bytes of the AdamW to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stac_optimizer.model.layers import STACLayer
from stac_optimizer.model.names import listed

__all__ = ["partition_table"]

MOVED_SHOWN = 6

Column = tuple[str, Callable[[STACLayer], tuple[float, ...]]]


def partition_table(
    trunk_layers: Sequence[STACLayer], cap_layers: Sequence[STACLayer], *, amsgrad: bool, moved: Sequence[str]
) -> str:
    """The table of these layers; the arguments are the fields of :class:`STACPartition`."""
    roles = {"trunk": trunk_layers, "cap": cap_layers}
    every_layer = [*trunk_layers, *cap_layers]
    numel = sum(layer.numel for layer in every_layer)
    columns: list[Column] = [("lr", lambda layer: layer.lrs), ("decay", lambda layer: layer.weight_decays)]
    shown = [column for column in columns if _differ(column, every_layer)]

    header = (
        "layer",
        "type",
        "role",
        "parameters",
        "share",
        "state bytes",
        "AdamW bytes",
        *(name for name, _ in shown),
    )
    rows = [
        (layer.name, layer.type_name or "-", role, *_amounts([layer], numel, amsgrad), *_settings(shown, layer))
        for role, layers in roles.items()
        for layer in layers
    ]
    totals = [
        (_layer_count(layers), "", role, *_amounts(layers, numel, amsgrad), *("" for _ in shown))
        for role, layers in {**roles, "all": every_layer}.items()
    ]
    return "\n".join([*_lines(header, rows, totals), *_moved_line(moved)])


def _differ(column: Column, layers: Iterable[STACLayer]) -> bool:
    """Whether a setting has several values in these layers. Without an optimizer it has none."""
    return len({value for layer in layers for value in column[1](layer)}) > 1


def _settings(columns: Iterable[Column], layer: STACLayer) -> Iterable[str]:
    return (", ".join(f"{value:g}" for value in dict.fromkeys(values(layer))) or "-" for _, values in columns)


def _layer_count(layers: Iterable[STACLayer]) -> str:
    """How many layers these are; one that stands in both roles is one."""
    number = len({layer.name for layer in layers})
    return f"{number} layer{'' if number == 1 else 's'}"


def _amounts(layers: Sequence[STACLayer], total: int, amsgrad: bool) -> tuple[str, str, str, str]:
    """Parameters, their share of all, and the bytes of state."""
    numel = sum(layer.numel for layer in layers)
    state_bytes = [layer.state_bytes for layer in layers]
    return (
        f"{numel:,}",
        f"{numel / max(total, 1):.1%}",
        "-" if None in state_bytes else f"{sum(number or 0 for number in state_bytes):,}",
        f"{sum(_adamw_bytes(layer, amsgrad) for layer in layers):,}",
    )


def _adamw_bytes(layer: STACLayer, amsgrad: bool) -> int:
    """State bytes of ``torch.optim.AdamW``: two averages, three for AMSGrad, and a float32 counter."""
    averages = 3 if amsgrad else 2
    return sum(averages * parameter.numel() * parameter.element_size() + 4 for parameter in layer.parameters)


def _lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], totals: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell: the first three are words, to the left, the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, *totals, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [line(header), rule, *map(line, rows), rule, *map(line, totals)]


def _moved_line(moved: Sequence[str]) -> list[str]:
    if not moved:
        return []
    return [f"In the cap because the trunk's rule takes matrices only: {listed(moved, MOVED_SHOWN)}"]
