"""Repeated layers share a line of the partition's table, which a notebook shows in colour and unfolds."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from torch import nn

from stac_optimizer import STAC, last_layers, layerwise_lr_decay, named, norms, partition_trainable_layers
from tests.model.models import Net


def block(width: int) -> Net:
    return Net(attention=nn.Linear(width, width), norm=nn.LayerNorm(width), mlp=nn.Sequential(nn.Linear(width, width)))


def deep(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(block(width) for width in widths), nn.Linear(widths[-1], 2))


def names(model: nn.Module) -> list[str]:
    lines = str(partition_trainable_layers(model, cap=last_layers(1) | norms())).splitlines()
    first, last = (place for place, line in enumerate(lines) if line.startswith("---"))
    return [line.split()[0] for line in lines[first + 1 : last]]


def test_blocks_share_lines_and_a_last_one_of_another_width_stands_alone() -> None:
    assert names(deep(4, 4, 4, 4, 6)) == [
        "{0-3}.attention",
        "{0-3}.mlp.0",
        "4.attention",
        "4.mlp.0",
        "{0-3}.norm",
        "4.norm",
        "5",
    ]


def test_two_of_a_kind_are_shown_each() -> None:
    assert names(deep(4, 4)) == ["0.attention", "0.mlp.0", "1.attention", "1.mlp.0", "0.norm", "1.norm", "2"]


def test_blocks_within_stages_are_told_by_their_second_number() -> None:
    stages = nn.Sequential(deep(4, 4, 4), deep(6, 6, 6))
    assert names(stages)[:4] == ["0.{0-2}.attention", "0.{0-2}.mlp.0", "0.3", "1.{0-2}.attention"]


def test_numbers_that_are_missing_leave_a_gap_in_the_range() -> None:
    partition = partition_trainable_layers(deep(4, 4, 4, 4, 4), cap=named("2") | last_layers(1))
    assert "{0-1,3-4}.attention" in str(partition)


def test_a_line_of_several_sums_amounts_and_shows_the_range_of_rates() -> None:
    model = deep(4, 4, 4, 4)
    optimizer = STAC(model, lr=1e-3, trunk_lr=1e-3, overrides=layerwise_lr_decay(model, 0.5))
    (line,) = (line for line in str(optimizer.partition).splitlines() if line.startswith("{0-3}.attention"))
    cells = line.split()
    assert cells[2:4] == ["trunk", str(4 * 20)]
    assert cells[5] == str(4 * (20 * 4 + 2 * 4))
    assert line.endswith("6.25e-05 to 0.0005")


class Cells(HTMLParser):
    """What a page shows: rows of cells, and what is folded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += f"{data} "


def test_html_shows_the_cells_of_the_text_and_unfolds_names() -> None:
    partition = STAC(deep(4, 4, 4), cap=last_layers(1) | norms()).partition
    rows = Cells(partition._repr_html_()).rows
    text = [line.split() for line in str(partition).splitlines() if not line.startswith("---")]
    assert [len(row) for row in rows] == [len(rows[0])] * len(text)
    assert rows[1][0].split() == ["{0-2}.attention", "×", "3", *(f"{n}.attention" for n in range(3))]
    for shown, line in zip(rows[1:], text[1:], strict=True):
        amounts = "".join(shown[3:]).split()
        assert amounts == line[-len(amounts) :]


@pytest.mark.parametrize("name", ["<b>", "a&b"])
def test_html_escapes_names(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    page = partition_trainable_layers(model)._repr_html_()
    assert name not in page
    assert Cells(page).rows[1][0].strip() == name


def lines_of_linear(**arguments: Any) -> list[str]:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    partition = STAC(model, **{"lr": 1e-3, "weight_decay": 0.1, "last_n_layers": 0, **arguments}).partition
    return [" ".join(line.split()) for line in str(partition).splitlines() if "Linear" in line]


def test_a_layer_of_another_decay_or_lr_stands_alone() -> None:
    decay = lines_of_linear(overrides=[(named("3"), {"weight_decay": 0.0})])
    assert [line.split()[0] for line in decay] == ["{0-2,4-5}", "3"]
    assert [line.split()[-1] for line in decay] == ["0.1", "0"]
    rate = lines_of_linear(overrides=[(named("2"), {"lr_ratio": 0.5})])
    assert [(line.split()[0], line.split()[-1]) for line in rate] == [("{0-1,3-5}", "0.001"), ("2", "0.0005")]


def test_numbers_that_python_would_not_give_are_names() -> None:
    model = nn.Sequential()
    for name in ("00", "01", "02", "1", "2", "3", "9" * 5000):
        model.add_module(name, nn.Linear(2, 2))
    shown = [line.split()[0] for line in str(partition_trainable_layers(model)).splitlines() if "trunk" in line][:-1]
    assert shown == ["00", "01", "02", "{1-3}"]
