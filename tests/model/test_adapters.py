"""A cap that counts from the end of a model of adapters, as PEFT makes them, has some by chance, and says so."""

from __future__ import annotations

import re
import warnings

import pytest
from torch import nn

from stac_optimizer import STAC, last_layers, named, partition_trainable_layers, recipes
from stac_optimizer.model.selectors import Selector


def adapted(blocks: int, kind: str = "lora_B", head: nn.Module | None = None) -> nn.Module:
    """Frozen layers with adapters beside them, under the names that PEFT gives them."""
    layers = []
    for _ in range(blocks):
        layer = nn.ModuleDict({"base": nn.Linear(4, 4).requires_grad_(False)})
        layer["lora_A"] = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        layer[kind] = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        layers.append(layer)
    return nn.ModuleDict({"blocks": nn.ModuleList(layers), **({} if head is None else {"head": head})})


@pytest.mark.parametrize("kind", ["lora_B", "lora_magnitude_vector", "ia3_l"])
def test_cap_of_one_adapter_by_chance_warns_and_names_the_selector(kind: str) -> None:
    with pytest.warns(UserWarning, match="model ends in adapters") as caught:
        optimizer = STAC(adapted(3, kind))
    assert optimizer.partition.cap_layer_names == (f"blocks.2.{kind}.default",)
    (message,) = [str(warning.message) for warning in caught]
    assert f"the cap has 'blocks.2.{kind}.default', 1 of 3 layers {kind!r}" in message
    (pattern,) = set(re.findall(r"cap=named\('(.*?)'\)", message))
    cap = partition_trainable_layers(adapted(3, kind), cap=named(pattern)).cap_layer_names
    assert cap == tuple(f"blocks.{block}.{kind}.default" for block in range(3))


def test_recipe_warns_and_takes_the_selector() -> None:
    with pytest.warns(UserWarning, match=r"also_cap=named\('\*\.lora_B'\)"):
        STAC(adapted(3), **recipes.finetuning(lr=1e-4))
    optimizer = STAC(adapted(3), **recipes.finetuning(lr=1e-4, also_cap=named("*.lora_B")))
    assert len(optimizer.partition.cap_layers) == len(optimizer.partition.trunk_layers) == 3


@pytest.mark.parametrize(
    ("model", "cap"),
    [
        (adapted(3, head=nn.Linear(4, 2)), last_layers(1)),
        (adapted(1), last_layers(1)),
        (adapted(3), named("blocks.2.*")),
        (adapted(3), last_layers(1) | named("*.lora_B")),
    ],
    ids=["head", "only-one", "by-name", "all-of-them"],
)
def test_cap_that_is_meant_is_quiet(model: nn.Module, cap: Selector) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STAC(model, cap=cap)
        STAC(adapted(3), last_n_layers=0)
