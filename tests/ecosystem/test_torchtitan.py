"""STAC in torchtitan's container of optimizers."""

from __future__ import annotations

from pathlib import Path

from tests.ecosystem.pages import block, continued, named_state
from tests.support import assert_same_bits, small_model


def test_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, again = continued("torchtitan", tmp_path, 7)
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert_same_bits(named_state(again.optimizer), named_state(whole.optimizer))


def test_each_part_of_a_pipeline_has_a_cap() -> None:
    names: dict[str, object] = {}
    exec(block("torchtitan").split("torch.manual_seed(0)")[0], names)
    container = names["STACContainer"]
    assert callable(container)
    parts = [small_model(), small_model()]
    optimizers = list(container(parts))
    assert [optimizer.partition.cap_layer_names for optimizer in optimizers] == [("3",), ("3",)]
