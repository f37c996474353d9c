"""The table of a partition as HTML, for notebooks: roles in colour, repeated layers to unfold."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from stac_optimizer.model.table import Row, Table

__all__ = ["as_html"]

# Translucent, so that they serve on light and dark pages.
COLOURS = {"trunk": "rgba(66, 133, 244, 0.18)", "cap": "rgba(251, 140, 0, 0.22)", "all": "transparent"}
WORDS = 3  # columns of words come first, then numbers
# A line a row, which wide tables scroll for; what is unfolded stands below the others' line.
CELL = "padding: 2px 8px; vertical-align: top; white-space: nowrap; text-align: {}"


def as_html(table: Table) -> str:
    """A table without scripts or style sheets, for pages may strip both."""
    head = "".join(_cell(name, place, "th") for place, name in enumerate(table.header))
    rows = "".join(map(_row, table.rows))
    totals = "".join(map(_row, table.totals))
    moved = f"<p>{escape(table.moved)}</p>" if table.moved else ""
    return (
        f'<div style="overflow-x: auto"><table style="border-collapse: collapse"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody>"
        f'<tfoot style="border-top: 1px solid">{totals}</tfoot></table>{moved}</div>'
    )


def _row(row: Row) -> str:
    first, *others = row.cells
    cells = [_name(first, row.names), *(_cell(text, place) for place, text in enumerate(others, start=1))]
    return f'<tr style="background: {COLOURS[row.role]}">{"".join(cells)}</tr>'


def _name(name: str, names: Iterable[str]) -> str:
    """The first cell: a name for several layers unfolds to theirs."""
    names = list(names)
    if len(names) < 2:
        return _cell(name, 0)
    inner = "<br>".join(map(escape, names))
    summary = f'<summary style="cursor: pointer">{escape(name)} × {len(names)}</summary>'
    return f'<td style="{CELL.format("left")}"><details>{summary}{inner}</details></td>'


def _cell(text: str, place: int, tag: str = "td") -> str:
    return f'<{tag} style="{CELL.format("left" if place < WORDS else "right")}">{escape(text)}</{tag}>'
