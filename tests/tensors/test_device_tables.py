"""Tables on the device: what they hold, and when they are remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from stac_optimizer.tensors import device_tables
from stac_optimizer.tensors.device_tables import integers, numbers, owners

CPU = torch.device("cpu")


def test_integers_are_exact_up_to_addresses() -> None:
    values = [0, 7, 2**40 + 3, 2**62 + 1]
    table = integers(values, CPU)
    assert table.dtype == torch.int64
    assert table.tolist() == values


def test_owners_name_the_tensor_of_each_chunk() -> None:
    assert owners([2, 0, 1, 3], CPU).tolist() == [0, 0, 2, 3, 3, 3]


def test_numbers_are_rounded_once_to_their_dtype() -> None:
    exact = numbers([0.1, torch.tensor(0.3, dtype=torch.float64)], torch.float64, CPU)
    assert exact.tolist() == [0.1, 0.3]
    rounded = numbers([0.1, torch.tensor(0.3, dtype=torch.float64)], torch.float32, CPU)
    assert torch.equal(rounded, torch.tensor([0.1, 0.3]))


@pytest.mark.parametrize("table", [integers, owners])
def test_tables_are_remembered_but_not_while_a_graph_is_captured(
    table: Callable[[Sequence[int], torch.device], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert table([1, 2, 5], CPU) is not table([1, 2, 5], CPU)  # where nothing is waited for, nothing is kept
    monkeypatch.setattr(device_tables, "_stream", lambda device: 0)
    first = table([1, 2, 5], CPU)
    assert table([1, 2, 5], CPU) is first
    assert table([1, 2, 4], CPU) is not first
    monkeypatch.setattr(device_tables, "_stream", lambda device: None)
    captured = table([1, 2, 5], CPU)
    assert captured is not first
    assert torch.equal(captured, first)
    assert table([1, 2, 5], CPU) is not captured
