"""The table of a partition: its columns, sums, and what it says of parameters that were moved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from torch import Tensor, nn

from stac_optimizer import STAC, STACLayer, STACPartition, last_layers, partition_trainable_layers, vectors
from stac_optimizer.model.layers import find_layers
from stac_optimizer.model.partition import split
from tests.model.models import Net
from tests.model.test_layers import MODELS
from tests.support import small_model

TABLE = """\
layer               type       role   parameters   share  state bytes  AdamW bytes
----------------------------------------------------------------------------------
encoder.projection  Linear     trunk      12,040   98.3%       48,168       96,328
encoder.norm        LayerNorm  trunk          80    0.7%          328          648
head                Linear     cap           123    1.0%          992          992
----------------------------------------------------------------------------------
2 layers                       trunk      12,120   99.0%       48,496       96,976
1 layer                        cap           123    1.0%          992          992
3 layers                       all        12,243  100.0%       49,488       97,968"""


def table_model() -> Net:
    return Net(encoder=Net(projection=nn.Linear(300, 40), norm=nn.LayerNorm(40)), head=nn.Linear(40, 3))


def without_state(table: str) -> str:
    return re.sub(r"[\d,]+(?=  +[\d,]+$)", lambda match: "-".rjust(len(match[0])), table, flags=re.MULTILINE)


def test_table_has_no_state_bytes_without_an_optimizer() -> None:
    assert str(partition_trainable_layers(table_model())) == without_state(TABLE)


def test_table_of_an_optimizer_shows_its_state_bytes() -> None:
    assert str(STAC(table_model(), lr=1e-3, trunk_lr=1e-3).partition) == TABLE


def optimized(partition: STACPartition, change: Callable[[str, STACLayer], STACLayer]) -> STACPartition:
    """The partition as an optimizer would fill it in, by role and layer."""
    return replace(
        partition,
        trunk_layers=tuple(change("trunk", layer) for layer in partition.trunk_layers),
        cap_layers=tuple(change("cap", layer) for layer in partition.cap_layers),
    )


def test_table_shows_each_part_of_a_layer_and_counts_the_layer_once() -> None:
    partition = partition_trainable_layers(small_model(), cap=last_layers(1) | vectors())
    partition = optimized(partition, lambda role, layer: replace(layer, state_bytes=layer.numel))
    assert (
        str(partition)
        == """\
layer     type       role   parameters   share  state bytes  AdamW bytes
------------------------------------------------------------------------
0         Linear     trunk          30   47.6%           30          244
0         Linear     cap             5    7.9%            5           44
1         LayerNorm  cap            10   15.9%           10           88
3         Linear     cap            18   28.6%           18          152
------------------------------------------------------------------------
1 layer              trunk          30   47.6%           30          244
3 layers             cap            33   52.4%           33          284
3 layers             all            63  100.0%           63          528"""
    )


def test_table_shows_lr_and_decay_where_they_differ() -> None:
    lrs = {"0": (1e-3, 3e-4), "1": (7.5e-4,), "3": (1e-3,)}
    partition = partition_trainable_layers(small_model())
    differing = optimized(
        partition,
        lambda role, layer: replace(
            layer, state_bytes=0, lrs=lrs[layer.name], weight_decays=(0.1,) if role == "trunk" else (0.0,)
        ),
    )
    assert (
        str(differing)
        == """\
layer     type       role   parameters   share  state bytes  AdamW bytes             lr  decay
----------------------------------------------------------------------------------------------
0         Linear     trunk          35   55.6%            0          288  0.001, 0.0003    0.1
1         LayerNorm  trunk          10   15.9%            0           88        0.00075    0.1
3         Linear     cap            18   28.6%            0          152          0.001      0
----------------------------------------------------------------------------------------------
2 layers             trunk          45   71.4%            0          376
1 layer              cap            18   28.6%            0          152
3 layers             all            63  100.0%            0          528"""
    )
    one_lr = optimized(differing, lambda role, layer: replace(layer, lrs=(1e-3,)))
    assert "  lr  " not in str(one_lr)
    assert str(one_lr).splitlines()[0].endswith("AdamW bytes  decay")
    assert (
        str(optimized(one_lr, lambda role, layer: replace(layer, weight_decays=(0.0,))))
        .splitlines()[0]
        .endswith("AdamW bytes")
    )


def test_table_of_amsgrad_compares_with_three_averages() -> None:
    partition = partition_trainable_layers(nn.Linear(10, 10))
    assert str(partition).splitlines()[-1].endswith(f" {2 * 4 * 110 + 8:,}")
    assert str(replace(partition, amsgrad=True)).splitlines()[-1].endswith(f" {3 * 4 * 110 + 8:,}")


def is_matrix(param: Tensor) -> bool:
    return param.dim() == 2


def test_table_ends_with_what_was_moved_to_the_cap() -> None:
    lines = str(split(find_layers(small_model()), trunk_takes=is_matrix)).splitlines()
    assert lines[-2].startswith("3 layers")
    assert lines[-1] == ("In the cap because the trunk's rule takes matrices only: '0.bias', '1.weight', '1.bias'")
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    last = str(split(find_layers(deep), trunk_takes=is_matrix)).splitlines()[-1]
    assert last.endswith(": '0.bias', '1.bias', '2.bias', '3.bias', '4.bias', '5.bias' and 3 more")


@pytest.mark.parametrize(("build", "expected", "types"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("last_n_layers", [0, 1, 99])
def test_table_lines_up_and_adds_up(
    build: Callable[[], nn.Module], expected: list[str], types: str, last_n_layers: int
) -> None:
    model = build()
    partition = partition_trainable_layers(model, last_n_layers=last_n_layers)
    table = str(optimized(partition, lambda role, layer: replace(layer, state_bytes=1000 * layer.numel + 1)))
    header, *lines = table.splitlines()
    body = [line for line in lines if set(line) != {"-"}]
    role = header.index("role")
    ends = [role + len("trunk"), *(header.index(word) + len(word) for word in ("parameters", "share", "state bytes"))]
    rows = []
    for line in body:
        assert line[role - 2 : role] == "  "
        cells = [line[start:end] for start, end in pairwise([*ends, None])]
        assert all(re.fullmatch(r" {2,}[\d,.]+%?", cell) for cell in cells), line
        numbers = [float(cell.strip(" %").replace(",", "")) for cell in cells]
        rows.append((line[role : ends[0]].strip(), numbers))
    layers, totals = rows[: len(expected)], dict(rows[len(expected) :])
    for name, total in totals.items():
        added = [numbers for own_role, numbers in layers if name in (own_role, "all")]
        summed = [sum(column) for column in zip(*added, strict=True)] or [0.0] * 4
        assert total == pytest.approx(summed, abs=0.05 * len(expected) + 0.05)
    assert list(totals) == ["trunk", "cap", "all"]
    assert totals["all"][0] == sum(param.numel() for param in model.parameters() if param.requires_grad)
