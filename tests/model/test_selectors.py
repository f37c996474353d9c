"""Selectors: what each chooses, how they combine, what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from stac_optimizer import (
    STACLayer,
    biases,
    embeddings,
    last_layers,
    named,
    norms,
    of_type,
    parameters_where,
    partition_trainable_layers,
    vectors,
    where,
)
from stac_optimizer.model.layers import find_layers
from stac_optimizer.model.selectors import Selector, untied_embeddings
from tests.model.models import Net, TokenEmbedding, frozen, lora_embedding, parameter, tied_model


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(4)


class LlamaRMSNorm(Weighted):
    """A norm that torch does not know, as model libraries write it."""


class ChannelNorm2d(Weighted):
    """Another, with its dimensions in the name."""


class Scaled(nn.GroupNorm):
    """A norm by its base alone."""


class RMSNormGated(Weighted):
    """A norm of state space models."""


class Normalizer(LlamaRMSNorm):
    """A norm by its base, in a name that ends otherwise."""


class NormalLinear(nn.Linear):
    """No norm, for all its name."""


def language_model() -> Net:
    """One layer of everything that selectors tell apart."""

    def block() -> Net:
        return Net(norm1=nn.LayerNorm(4), fc=NormalLinear(4, 4), norm2=LlamaRMSNorm())

    return Net(
        w=parameter(1),
        tokens=TokenEmbedding(7, 4),
        bag=nn.EmbeddingBag(7, 4),
        blocks=nn.ModuleList([block(), block()]),
        scaled=Scaled(2, 4),
        other=Normalizer(),
        channel=ChannelNorm2d(),
        gated=RMSNormGated(),
        batch=nn.BatchNorm2d(4),
        lm_head=Net(fc=nn.Linear(4, 7)),
        lm_head2=nn.Linear(4, 7),
        still=frozen(nn.LayerNorm(4)),
    )


LAYERS = [
    "<root>",
    "tokens",
    "bag",
    *(f"blocks.{index}.{name}" for index in range(2) for name in ("norm1", "fc", "norm2")),
    "scaled",
    "other",
    "channel",
    "gated",
    "batch",
    "lm_head.fc",
    "lm_head2",
]


def chosen(selector: Selector, model: Any = None) -> list[str]:
    """The layers that it chooses, whole ones."""
    model = language_model() if model is None else model
    partition = partition_trainable_layers(model, cap=selector)
    assert not set(partition.trunk_layer_names) & set(partition.cap_layer_names)
    return list(partition.cap_layer_names)


def chosen_parameters(selector: Selector, model: Any) -> list[str]:
    layers = find_layers(model)
    names = selector.select(layers)
    return [name for name, _ in layers.named_parameters if name in names]


# A selector, as it is written, and the layers that it chooses.
BLOCK_NORMS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"]
CHOICES: list[tuple[Selector, str, list[str]]] = [
    (last_layers(1), "last_layers(1)", ["lm_head2"]),
    (last_layers(2), "last_layers(2)", ["lm_head.fc", "lm_head2"]),
    (last_layers(99), "last_layers(99)", LAYERS),
    (of_type(nn.LayerNorm), "of_type(LayerNorm)", ["blocks.0.norm1", "blocks.1.norm1"]),
    (
        of_type(nn.LayerNorm, nn.BatchNorm2d),
        "of_type(LayerNorm, BatchNorm2d)",
        ["blocks.0.norm1", "blocks.1.norm1", "batch"],
    ),
    (of_type(nn.Linear), "of_type(Linear)", ["blocks.0.fc", "blocks.1.fc", "lm_head.fc", "lm_head2"]),
    (of_type(Net), "of_type(Net)", ["<root>"]),
    (norms(), "norms()", [*BLOCK_NORMS, "scaled", "other", "channel", "gated", "batch"]),
    (embeddings(), "embeddings()", ["tokens", "bag"]),
    (where(lambda layer: layer.numel == 1), "where(<lambda>)", ["<root>"]),
    (named("lm_head"), "named('lm_head')", ["lm_head.fc"]),
    (named("lm_head*"), "named('lm_head*')", ["lm_head.fc", "lm_head2"]),
    (named("lm_head.fc"), "named('lm_head.fc')", ["lm_head.fc"]),
    (named("blocks.1"), "named('blocks.1')", [name for name in LAYERS if name.startswith("blocks.1")]),
    (named("*.norm*"), "named('*.norm*')", BLOCK_NORMS),
    (named("blocks.?.norm[!2]"), "named('blocks.?.norm[!2]')", ["blocks.0.norm1", "blocks.1.norm1"]),
    (named("*.fc"), "named('*.fc')", ["blocks.0.fc", "blocks.1.fc", "lm_head.fc"]),
    (named("<root>"), "named('<root>')", ["<root>"]),
    (named("*"), "named('*')", LAYERS),
    (named("bag", "tokens"), "named('bag', 'tokens')", ["tokens", "bag"]),
    (last_layers(1) | embeddings(), "last_layers(1) | embeddings()", ["tokens", "bag", "lm_head2"]),
    (norms() - named("blocks"), "norms() - named('blocks')", ["scaled", "other", "channel", "gated", "batch"]),
    (
        (named("tokens", "bag") | last_layers(1)) - named("bag"),
        "(named('tokens', 'bag') | last_layers(1)) - named('bag')",
        ["tokens", "lm_head2"],
    ),
    (norms() & named("blocks.0"), "norms() & named('blocks.0')", ["blocks.0.norm1", "blocks.0.norm2"]),
    (
        last_layers(1) | norms() & named("blocks.0") - named("*.norm2"),
        "last_layers(1) | norms() & named('blocks.0') - named('*.norm2')",
        ["blocks.0.norm1", "lm_head2"],
    ),
    (
        named("*") - (norms() - named("blocks")) - (last_layers(2) | named("blocks")),
        "named('*') - (norms() - named('blocks')) - (last_layers(2) | named('blocks'))",
        ["<root>", "tokens", "bag"],
    ),
    (
        (last_layers(1) | norms()) & (named("blocks.1") | named("lm_head2")),
        "(last_layers(1) | norms()) & (named('blocks.1') | named('lm_head2'))",
        ["blocks.1.norm1", "blocks.1.norm2", "lm_head2"],
    ),
    (
        of_type(nn.Conv2d) | norms() - named("blocks") | last_layers(1),
        "of_type(Conv2d) | norms() - named('blocks') | last_layers(1)",
        ["scaled", "other", "channel", "gated", "batch", "lm_head2"],
    ),
]


@pytest.mark.parametrize(("selector", "written", "expected"), [pytest.param(*case, id=case[1]) for case in CHOICES])
def test_selector_chooses_layers_by_meaning(selector: Selector, written: str, expected: list[str]) -> None:
    assert chosen(selector) == expected
    assert repr(selector) == written


def named_in_all_ways() -> Net:
    """Vectors, matrices, and every way to call a bias."""
    return Net(
        scale=nn.Parameter(torch.ones(())),
        relative_position_bias_table=parameter(3, 2),
        attention=nn.MultiheadAttention(4, 2, add_bias_kv=True),
        recurrent=nn.LSTM(2, 2),
        normed=weight_norm(nn.Linear(2, 2)),
        shifted=register_parametrization(nn.Linear(2, 2), "bias", nn.Identity()),
        experts=Net(q_bias=parameter(3, 2), unbiased=parameter(2)),
        bias=nn.Embedding(3, 2),
    )


RECURRENT_BIASES = ["recurrent.bias_ih_l0", "recurrent.bias_hh_l0"]
PARAMETER_CHOICES: list[tuple[Selector, str, list[str]]] = [
    (
        biases(),
        "biases()",
        [
            "attention.in_proj_bias",
            "attention.bias_k",
            "attention.bias_v",
            "attention.out_proj.bias",
            *RECURRENT_BIASES,
            "normed.bias",
            "shifted.parametrizations.bias.original",
            "experts.q_bias",
        ],
    ),
    (
        vectors(),
        "vectors()",
        [
            "scale",
            "attention.in_proj_bias",
            "attention.out_proj.bias",
            *RECURRENT_BIASES,
            "normed.bias",
            "shifted.parametrizations.bias.original",
            "experts.unbiased",
        ],
    ),
    (vectors() & named("recurrent"), "vectors() & named('recurrent')", RECURRENT_BIASES),
    (
        named("experts", "normed") - biases(),
        "named('experts', 'normed') - biases()",
        ["normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1", "experts.unbiased"],
    ),
    (
        parameters_where(lambda name, param: name.startswith("recurrent.") and param.dim() == 2),
        "parameters_where(<lambda>)",
        ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"],
    ),
    (
        last_layers(1) | biases() & named("experts"),
        "last_layers(1) | biases() & named('experts')",
        ["experts.q_bias", "bias.weight"],
    ),
]


@pytest.mark.parametrize(
    ("selector", "written", "expected"), [pytest.param(*case, id=case[1]) for case in PARAMETER_CHOICES]
)
def test_parameter_selector_chooses_part_of_layers(selector: Selector, written: str, expected: list[str]) -> None:
    model = named_in_all_ways()
    assert chosen_parameters(selector, model) == expected
    assert chosen_parameters(selector, model.named_parameters()) == expected
    assert repr(selector) == written


def test_selector_serves_several_models() -> None:
    selector = last_layers(1) | norms()
    small = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert chosen(selector, small) == ["0", "2"]
    assert chosen(selector) == [*BLOCK_NORMS, "scaled", "other", "channel", "gated", "batch", "lm_head2"]


def test_where_sees_the_layer_record() -> None:
    model = language_model()
    seen: list[STACLayer] = []

    def is_bag(layer: STACLayer) -> bool:
        seen.append(layer)
        return layer.name == "bag"

    assert chosen(where(is_bag), model) == ["bag"]
    assert [layer.name for layer in seen] == LAYERS
    bag = seen[LAYERS.index("bag")]
    assert (bag.parameter_names, bag.type_name, bag.numel, bag.state_bytes) == (
        ("bag.weight",),
        "EmbeddingBag",
        28,
        None,
    )
    assert bag.parameters[0] is model.get_parameter("bag.weight")


def test_where_is_named_by_its_function() -> None:
    def is_small(layer: STACLayer) -> bool:
        return layer.numel < 0

    with pytest.raises(ValueError, match=r"^where\(is_small\) matches no layer"):
        chosen(where(is_small))


@pytest.mark.parametrize("selector", [named("lm_head"), where(lambda layer: "lm_head." in layer.name)], ids=repr)
def test_selector_by_name_works_on_names_alone(selector: Selector) -> None:
    assert chosen(selector, language_model().named_parameters()) == ["lm_head.fc"]


@pytest.mark.parametrize("selector", [of_type(nn.Linear), norms(), embeddings()], ids=repr)
@pytest.mark.parametrize(
    "combine", [lambda a: a, lambda a: a | named("bag"), lambda a: named("*") - a], ids=["alone", "or", "minus"]
)
def test_selector_by_type_refuses_names_alone(selector: Selector, combine: Callable[[Selector], Selector]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(selector))} needs the model itself: names of parameters"):
        chosen(combine(selector), language_model().named_parameters())


def test_embeddings_choose_parametrized_and_adapted_ones() -> None:
    model = Net(
        plain=nn.Embedding(7, 4),
        normed=spectral_norm(nn.Embedding(7, 4)),
        adapted=lora_embedding(),
        twice=Net(base_layer=lora_embedding(), delta=nn.ParameterDict({"default": parameter(1, 4)})),
        linear=Net(base_layer=nn.Linear(2, 2), lora_A=nn.ParameterDict({"default": parameter(1, 2)})),
        table=nn.ParameterDict({"default": parameter(1, 2)}),
    )
    tables = ["lora_embedding_A", "lora_embedding_B"]
    assert chosen(embeddings(), model) == [
        "plain",
        "normed",
        *(f"adapted.{table}" for table in tables),
        *(f"twice.base_layer.{table}" for table in tables),
        "twice.delta",
    ]


def test_selectors_by_type_see_through_parametrizations() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(2, 2)), spectral_norm(nn.LayerNorm((2, 2))), nn.Conv1d(2, 2, 1))
    assert chosen(of_type(nn.Linear), model) == ["0"]
    assert chosen(norms(), model) == ["1"]


def two_tables(*, tied: bool) -> Net:
    model = Net(source=nn.Embedding(7, 4), target=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False))
    model.get_submodule("target").weight = model.get_parameter("source.weight")
    if tied:
        model.get_submodule("head").weight = model.get_parameter("source.weight")
    return model


def test_untied_embeddings_are_those_without_gradients_in_every_row() -> None:
    cases: tuple[tuple[Net, frozenset[str]], ...] = (
        (two_tables(tied=False), frozenset({"source.weight"})),
        (two_tables(tied=True), frozenset()),
        (tied_model(), frozenset()),
    )
    for model, names in cases:
        assert untied_embeddings(find_layers(model)) == names
        assert untied_embeddings(find_layers(model.named_parameters())) == frozenset()
    assert untied_embeddings(find_layers(nn.Linear(2, 2))) == frozenset()


# A wrong argument, the error, and what its message holds.
WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = {
    "named-nothing": (named, (), ValueError, "named takes at least one pattern"),
    "named-list": (named, (["a"],), TypeError, r"named takes patterns as strings, got \['a'\] of type list"),
    "named-none": (named, ("a", None), TypeError, "got None of type NoneType"),
    "of_type-nothing": (of_type, (), ValueError, "of_type takes at least one module class"),
    "of_type-instance": (of_type, (nn.Tanh(),), TypeError, r"module classes, such as nn.LayerNorm, got Tanh\(\)"),
    "of_type-tuple": (of_type, ((nn.Linear,),), TypeError, "module classes"),
    "of_type-other-class": (of_type, (nn.Linear, int), TypeError, "module classes.*<class 'int'>"),
    "last_layers-0": (last_layers, (0,), ValueError, r"n must be an integer in \[1, inf\), got 0"),
    "last_layers-negative": (last_layers, (-1,), ValueError, "n must be .* got -1"),
    "last_layers-float": (last_layers, (1.0,), TypeError, r"n must be an integer.*1\.0 of type float"),
    "last_layers-bool": (last_layers, (True,), TypeError, "n must be an integer.*True of type bool"),
    "where-name": (where, ("lm_head",), TypeError, "where takes a function of a layer, got 'lm_head' of type str"),
    "parameters_where-name": (
        parameters_where,
        ("bias",),
        TypeError,
        "parameters_where takes a function of a name and a parameter, got 'bias' of type str",
    ),
    "of_type-made": (of_type, (nn.Tanh(),), TypeError, r"write of_type\(Tanh\)"),
    "where-selector": (where, (norms(),), TypeError, r"got norms\(\) .*it is a selector already"),
    "where-class": (where, (3,), TypeError, r"write last_layers\(3\)"),
}


@pytest.mark.parametrize(("make", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_argument_of_selector_raises(
    make: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(*arguments)


def test_selector_of_wrapped_names_uses_clean_ones() -> None:
    compiled: Any = torch.compile(language_model())
    assert chosen(named("lm_head"), compiled) == ["lm_head.fc"]
    with pytest.raises(ValueError, match="layers are: '<root>', 'tokens'"):
        chosen(named("_orig_mod.*"), compiled)
