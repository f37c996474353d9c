"""Selectors: what each chooses, how they combine, what they refuse, and the warning of a tied head."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stac_optimizer import (
    STACLayer,
    embeddings,
    last_layers,
    named,
    norms,
    of_type,
    partition_trainable_layers,
    where,
)
from stac_optimizer.selectors import Selector
from tests.test_partition import Net, frozen, parameter, tied_model


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


class TokenEmbedding(nn.Embedding):
    """An embedding by its base."""


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
    "batch",
    "lm_head.fc",
    "lm_head2",
]


def chosen(selector: Selector, model: Any = None) -> list[str]:
    model = language_model() if model is None else model
    return list(partition_trainable_layers(model, cap=selector).cap_layer_names)


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
    (norms(), "norms()", [*BLOCK_NORMS, "scaled", "other", "channel", "batch"]),
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
    (norms() - named("blocks"), "(norms()) - (named('blocks'))", ["scaled", "other", "channel", "batch"]),
    (
        (named("tokens", "bag") | last_layers(1)) - named("bag"),
        "(named('tokens', 'bag') | last_layers(1)) - (named('bag'))",
        ["tokens", "lm_head2"],
    ),
]


@pytest.mark.parametrize(("selector", "written", "expected"), [pytest.param(*case, id=case[1]) for case in CHOICES])
def test_selector_chooses_layers_by_meaning(selector: Selector, written: str, expected: list[str]) -> None:
    assert chosen(selector) == expected
    assert repr(selector) == written


def test_selector_serves_several_models() -> None:
    selector = last_layers(1) | norms()
    small = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert chosen(selector, small) == ["0", "2"]
    assert chosen(selector) == [*BLOCK_NORMS, "scaled", "other", "channel", "batch", "lm_head2"]


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


# Selectors of nothing, with what the message says matches nothing.
NOTHING: list[tuple[Selector, str]] = [
    (named("head"), "named('head')"),
    (named("norm1"), "named('norm1')"),
    (named("blocks.0.norm"), "named('blocks.0.norm')"),
    (named("still"), "named('still')"),
    (named("LM_HEAD"), "named('LM_HEAD')"),
    (named("*.Norm*"), "named('*.Norm*')"),
    (named("tokens", "bags", "lm_head"), "named('bags')"),
    (of_type(nn.Conv2d), "of_type(Conv2d)"),
    (where(lambda layer: False), "where(<lambda>)"),
    (named("bag") | named("bags"), "named('bags')"),
    (named("bag") - named("bags"), "named('bags')"),
    (named("bag") - embeddings(), "(named('bag')) - (embeddings())"),
]


@pytest.mark.parametrize(("selector", "culprit"), NOTHING, ids=[repr(selector) for selector, _ in NOTHING])
def test_selector_of_nothing_raises_and_lists_layers(selector: Selector, culprit: str) -> None:
    listing = ", ".join(repr(name) for name in LAYERS)
    message = f"{culprit} matches no layer. The layers are: {listing}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(selector)


@pytest.mark.parametrize("selector", [norms(), embeddings()], ids=repr)
def test_type_selector_of_nothing_raises(selector: Selector) -> None:
    with pytest.raises(ValueError, match=r"matches no layer. The layers are: '<root>'"):
        chosen(selector, nn.Linear(2, 2))


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
    "or-name": (operator.or_, (norms(), "lm_head"), TypeError, "unsupported operand.*'Selector' and 'str'"),
    "name-or": (operator.or_, ("lm_head", norms()), TypeError, "unsupported operand.*'str' and 'Selector'"),
    "minus-type": (operator.sub, (norms(), nn.LayerNorm), TypeError, "unsupported operand.*'Selector' and 'type'"),
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


MODEL = language_model()
NAMES = st.sets(st.sampled_from(LAYERS))


def of_names(names: set[str]) -> Selector:
    return where(lambda layer: layer.name in names)


Expression = tuple[Selector, set[str] | None]
"""A selector and the set that it stands for; None where a part of it is empty, which is refused."""


def combined(left: Expression, sign: str, right: Expression) -> Expression:
    selector = left[0] | right[0] if sign == "|" else left[0] - right[0]
    if left[1] is None or right[1] is None:
        return selector, None
    names = left[1] | right[1] if sign == "|" else left[1] - right[1]
    return selector, names or None


LEAVES = NAMES.map(lambda names: (of_names(names), names or None))
EXPRESSIONS = st.recursive(LEAVES, lambda inner: st.builds(combined, inner, st.sampled_from("|-"), inner), max_leaves=6)


@given(EXPRESSIONS)
def test_combined_selectors_behave_as_sets(expression: Expression) -> None:
    selector, names = expression
    if names is None:
        with pytest.raises(ValueError, match="matches no layer"):
            chosen(selector, MODEL)
    else:
        assert chosen(selector, MODEL) == [name for name in LAYERS if name in names]


def split_and_warnings(model: Any, **arguments: Any) -> tuple[tuple[str, ...], list[str]]:
    """The cap, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = partition_trainable_layers(model, **arguments).cap_layer_names
    return names, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        ({}, "the last layer is now 'ln_f'"),
        ({"last_n_layers": 2}, "the last 2 layers are now 'block', 'ln_f'"),
        ({"cap": last_layers(1)}, "the last layer is now 'ln_f'"),
    ],
    ids=["one-layer", "two-layers", "selector"],
)
def test_tied_head_warns_what_is_tied_and_what_the_cap_is(arguments: dict[str, Any], now: str) -> None:
    names, (message,) = split_and_warnings(tied_model(), **arguments)
    assert names == ("block", "ln_f")[-arguments.get("last_n_layers", 1) :]
    assert message == (
        "'lm_head.weight' is tied to 'wte.weight', so 'lm_head' has no parameters of its own and "
        f"{now}. To choose by name, pass cap=named(...)"
    )


def test_several_tied_heads_warn_once() -> None:
    model = tied_model()
    model.second_head = nn.Linear(4, 7, bias=False)
    model.second_head.weight = model.get_parameter("wte.weight")
    names, (message,) = split_and_warnings(model)
    assert names == ("ln_f",)
    assert "'second_head.weight' is tied to 'wte.weight'" in message


QUIET: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "all-trunk": (tied_model, {"last_n_layers": 0}),
    "all-cap": (tied_model, {"last_n_layers": 3}),
    "cap-by-name": (tied_model, {"cap": named("wte")}),
    "own-bias": (lambda: tied_model(bias=True), {}),
    "frozen": (lambda: frozen(tied_model(), "wte.weight"), {}),
    "tie-before-the-end": (lambda: nn.Sequential(tied_model(), nn.Linear(7, 7)), {}),
    "names-alone": (lambda: tied_model().named_parameters(), {}),
}


@pytest.mark.parametrize(("build", "arguments"), QUIET.values(), ids=QUIET)
def test_tie_that_changes_nothing_draws_no_warning(build: Callable[[], Any], arguments: dict[str, Any]) -> None:
    assert split_and_warnings(build(), **arguments)[1] == []


@pytest.mark.parametrize("selector", [named("lm_head"), norms() - named("ln_f")], ids=repr)
def test_selector_of_nothing_explains_ties(selector: Selector) -> None:
    message = (
        f"{selector!r} matches no layer. The layers are: 'wte', 'block', 'ln_f'. "
        "'lm_head' has no parameters of its own: 'lm_head.weight' is tied to 'wte.weight'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(selector, tied_model())


def test_tied_head_follows_its_first_owner_into_the_cap() -> None:
    model = tied_model()
    partition = partition_trainable_layers(model, cap=named("wte"))
    assert partition.cap_parameters[0] is model.get_parameter("lm_head.weight")
