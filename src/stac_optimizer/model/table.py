"""The table of a partition: a line a layer, totals, what was moved; and the bytes of the AdamW to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from stac_optimizer.model.layers import STACLayer
from stac_optimizer.model.names import listed
from stac_optimizer.model.repeats import Repeats, repeats_of

__all__ = ["Row", "Table", "table_of"]

MOVED_SHOWN = 6

Column = tuple[str, Callable[[STACLayer], tuple[float, ...]]]


class Row(NamedTuple):
    """A line of a table.

    Args:
        role: "trunk", "cap" or "all".
        cells: a text for each column.
        names: of its layers.
    """

    role: str
    cells: tuple[str, ...]
    names: tuple[str, ...]


class Table(NamedTuple):
    """What is shown of a partition.

    Args:
        header: a name for each column.
        rows: a line for each layer, or for those that repeat each other.
        totals: a line for each role, and for both.
        moved: what to say of parameters that the trunk's rule could not take, or nothing.
    """

    header: tuple[str, ...]
    rows: list[Row]
    totals: list[Row]
    moved: str

    def __str__(self) -> str:
        """Columns as wide as their widest cell: the first three are words, to the left, the others numbers."""
        rows, totals = ([row.cells for row in part] for part in (self.rows, self.totals))
        widths = [max(map(len, column)) for column in zip(self.header, *rows, *totals, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(padded).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [line(self.header), rule, *map(line, rows), rule, *map(line, totals)]
        return "\n".join([*lines, self.moved] if self.moved else lines)


def table_of(
    trunk_layers: Sequence[STACLayer], cap_layers: Sequence[STACLayer], *, amsgrad: bool, moved: Sequence[str]
) -> Table:
    """The table of these layers; the arguments are the fields of :class:`STACPartition`."""
    roles = {"trunk": trunk_layers, "cap": cap_layers}
    every_layer = [*trunk_layers, *cap_layers]
    numel = sum(layer.numel for layer in every_layer)
    columns: list[Column] = [("lr", lambda layer: layer.lrs), ("decay", lambda layer: layer.weight_decays)]
    shown = [column for column in columns if _differ(column, every_layer)]

    def row(role: str, alike: Repeats) -> Row:
        amounts = _amounts(alike.layers, numel, amsgrad)
        cells = (alike.name, alike.layers[0].type_name or "-", role, *amounts, *_settings(shown, alike.layers))
        return Row(role, cells, tuple(layer.name for layer in alike.layers))

    def total(role: str, layers: Sequence[STACLayer]) -> Row:
        cells = (_layer_count(layers), "", role, *_amounts(layers, numel, amsgrad), *("" for _ in shown))
        return Row(role, cells, ())

    names = ("layer", "type", "role", "parameters", "share", "state bytes", "AdamW bytes")
    return Table(
        (*names, *(name for name, _ in shown)),
        [row(role, alike) for role, layers in roles.items() for alike in repeats_of(layers)],
        [total(role, layers) for role, layers in {**roles, "all": every_layer}.items()],
        f"In the cap because the trunk's rule takes matrices only: {listed(moved, MOVED_SHOWN)}" if moved else "",
    )


def _differ(column: Column, layers: Iterable[STACLayer]) -> bool:
    """Whether a setting has several values in these layers. Without an optimizer it has none."""
    return len({value for layer in layers for value in column[1](layer)}) > 1


def _settings(columns: Iterable[Column], layers: Sequence[STACLayer]) -> Iterable[str]:
    """The values of each column in these layers: a range, where one is not like the other."""
    for _, values in columns:
        found = [tuple(dict.fromkeys(values(layer))) for layer in layers]
        several = sorted({value for some in found for value in some})
        if len(set(found)) > 1:
            yield f"{several[0]:.4g} to {several[-1]:.4g}"
        else:
            yield ", ".join(f"{value:g}" for value in found[0]) or "-"


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
