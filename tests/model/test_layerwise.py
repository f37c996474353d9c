"""Learning rates that fall towards the input: depths of models, selectors by exact names, checks, and STAC's groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, layerwise_lr_decay, vectors
from stac_optimizer.model.layers import find_layers
from tests.model.models import Net, compiled, frozen, parameter, tied_model
from tests.support import small_model


def block() -> Net:
    return Net(fc=nn.Linear(2, 2), norm=nn.LayerNorm(2))


def vision_transformer() -> Net:
    """Parameters of the model, a patch layer, blocks one level down, a norm and a head."""
    return Net(
        cls_token=parameter(1, 2),
        patch_embed=nn.Linear(2, 2),
        encoder=Net(scale=parameter(1), layer=nn.ModuleList(block() for _ in range(11))),
        norm=nn.LayerNorm(2),
        head=nn.Linear(2, 2),
    )


def two_stacks() -> Net:
    """An encoder with a norm after its blocks, and a decoder."""
    return Net(
        encoder=Net(tokens=nn.Embedding(3, 2), blocks=nn.Sequential(block(), block()), norm=nn.LayerNorm(2)),
        decoder=Net(blocks=nn.Sequential(block(), block())),
    )


BLOCK = ("fc", "norm")
# A model, and the layers of each depth.
DEPTHS: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "blocks": (
        vision_transformer,
        [
            ["<root>", "patch_embed", "encoder"],
            *([f"encoder.layer.{index}.{name}" for name in BLOCK] for index in range(11)),
            ["norm", "head"],
        ],
    ),
    "two-stacks-and-no-end": (
        two_stacks,
        [
            ["encoder.tokens"],
            ["encoder.blocks.0.fc", "encoder.blocks.0.norm"],
            ["encoder.blocks.1.fc", "encoder.blocks.1.norm", "encoder.norm"],
            ["decoder.blocks.0.fc", "decoder.blocks.0.norm"],
            ["decoder.blocks.1.fc", "decoder.blocks.1.norm"],
        ],
    ),
    "sequential": (small_model, [["0"], ["1"], ["3"]]),
    "sequential-of-blocks": (
        lambda: nn.Sequential(block(), nn.Sequential(block(), block()), nn.Linear(2, 2)),
        [["0.fc", "0.norm"], ["1.0.fc", "1.0.norm", "1.1.fc", "1.1.norm"], ["2"]],
    ),
    "no-numbers": (lambda: Net(a=block(), b2=nn.Linear(2, 2)), [["a.fc"], ["a.norm"], ["b2"]]),
    "tied-head": (tied_model, [["wte"], ["block"], ["ln_f"]]),
    "one-layer": (lambda: nn.Linear(2, 2), [["<root>"]]),
    "compiled": (lambda: compiled(small_model()), [["0"], ["1"], ["3"]]),
}


def ratios(model: Any, factor: float, **arguments: Any) -> dict[str, float]:
    """The ratio of each layer that has one. Each override must choose whole layers, and no layer twice."""
    given = list(model.named_parameters())
    layers = find_layers(given, **arguments)
    result: dict[str, float] = {}
    for selector, override in layerwise_lr_decay(model, factor, **arguments):
        chosen = selector.select(layers)
        for layer in layers.layers:
            if chosen.intersection(layer.parameter_names):
                assert chosen.issuperset(layer.parameter_names)
                assert layer.name not in result
                result[layer.name] = override["lr_ratio"]
        assert list(override) == ["lr_ratio"]
    return result


@pytest.mark.parametrize(("build", "depths"), DEPTHS.values(), ids=DEPTHS)
def test_ratio_falls_with_the_distance_from_the_end(build: Callable[[], nn.Module], depths: list[list[str]]) -> None:
    expected = {name: 0.5 ** (len(depths) - 1 - depth) for depth, names in enumerate(depths[:-1]) for name in names}
    assert ratios(build(), 0.5) == expected


def test_names_alone_give_the_overrides_of_the_model() -> None:
    model = vision_transformer()
    layers = find_layers(model)
    by_module, by_name = layerwise_lr_decay(model, 0.75), layerwise_lr_decay(model.named_parameters(), 0.75)
    for (one, ratio), (other, other_ratio) in zip(by_module, by_name, strict=True):
        assert one.select(layers) == other.select(layers)
        assert ratio == other_ratio


def test_layer_of_a_shallow_depth_does_not_take_what_is_under_it() -> None:
    model = Net(encoder=Net(scale=parameter(1), layer=nn.ModuleList([block(), block()])), head=nn.Linear(2, 2))
    (first, _), *_ = layerwise_lr_decay(model, 0.5)
    assert first.select(find_layers(model)) == {"encoder.scale"}


def test_factor_1_changes_nothing() -> None:
    assert layerwise_lr_decay(vision_transformer(), 1) == []


def test_override_is_called_by_its_depth() -> None:
    assert [repr(selector) for selector, _ in layerwise_lr_decay(small_model(), 0.5)] == [
        "depth 0 of layerwise_lr_decay",
        "depth 1 of layerwise_lr_decay",
    ]


def test_freezing_changes_no_ratio() -> None:
    model = vision_transformer()
    before = ratios(model, 0.5)
    names = [name for name, _ in model.named_parameters() if ".layer.0." in name or name.startswith("patch_embed")]
    frozen(model, *names)
    after = ratios(model, 0.5)
    assert after == {name: ratio for name, ratio in before.items() if ".layer.0." not in name and name != "patch_embed"}
    assert ratios(model, 0.5, include_frozen=True) == before


# The model, the factor, other arguments, the error, and what its message holds.
WRONG: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "zero": (small_model(), 0.0, {}, ValueError, r"factor must be a number in \(0, 1\], got 0\.0"),
    "negative": (small_model(), -0.5, {}, ValueError, "factor.*got -0.5"),
    "above-one": (small_model(), 1.01, {}, ValueError, "factor.*got 1.01"),
    "nan": (small_model(), float("nan"), {}, ValueError, "factor.*got nan"),
    "string": (small_model(), "0.5", {}, TypeError, r"factor must be a number in \(0, 1\], got '0.5' of type str"),
    "bool": (small_model(), True, {}, TypeError, "factor.*True of type bool"),
    "tensor": (small_model(), torch.tensor(0.5), {}, TypeError, "factor.*of type Tensor"),
    "no-model": (None, 0.5, {}, TypeError, "model must be a module.*NoneType"),
    "set": ({("w", parameter(1))}, 0.5, {}, TypeError, "model must be a module.*got set"),
    "parameters": (list(small_model().parameters()), 0.5, {}, TypeError, "pass the model itself"),
    "all-frozen": (frozen(small_model()), 0.5, {}, ValueError, "no trainable parameters"),
    "include_frozen": (small_model(), 0.5, {"include_frozen": None}, TypeError, "include_frozen must be True or False"),
}


@pytest.mark.parametrize(("model", "factor", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_argument_raises(
    model: Any, factor: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layerwise_lr_decay(model, factor, **arguments)


def lr_of(optimizer: STAC, param: torch.Tensor) -> float:
    (lr,) = (group["lr"] for group in optimizer.param_groups if any(own is param for own in group["params"]))
    return float(lr)


def test_stac_steps_each_depth_at_its_own_lr() -> None:
    model = small_model()
    overrides = [*layerwise_lr_decay(model, 0.5), (vectors(), {"weight_decay": 0.0})]
    optimizer = STAC(model, lr=0.8, trunk_lr=0.4, weight_decay=0.1, overrides=overrides)
    for name, lr in (("0", 0.1), ("1", 0.2), ("3", 0.8)):
        assert lr_of(optimizer, model.get_parameter(f"{name}.weight")) == pytest.approx(lr)
        assert lr_of(optimizer, model.get_parameter(f"{name}.bias")) == pytest.approx(lr)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decays == {name: 0.1 * (param.dim() > 1) for name, param in model.named_parameters()}


def test_depth_that_is_frozen_trains_at_its_ratio_once_unfrozen() -> None:
    model = frozen(small_model(), "0.weight", "0.bias")
    overrides = layerwise_lr_decay(model, 0.5, include_frozen=True)
    optimizer = STAC(model, trunk_lr=0.4, overrides=overrides, include_frozen=True)
    assert lr_of(optimizer, model.get_parameter("0.weight")) == pytest.approx(0.1)
