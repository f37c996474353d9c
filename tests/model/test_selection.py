"""Selectors that match nothing, stand in a union, or are used as what they are not; and the algebra of all others."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stac_optimizer import (
    biases,
    embeddings,
    last_layers,
    named,
    norms,
    of_type,
    parameters_where,
    vectors,
    where,
)
from stac_optimizer.model.layers import find_layers
from stac_optimizer.model.selectors import Selector
from tests.model.models import Net, tied_model
from tests.model.test_selectors import LAYERS, chosen, language_model

GIVEN_A_LAYER = (
    "The function is given a STACLayer (name, type_name, parameter_names, parameters, numel), not the module; "
    "for classes of modules use of_type. "
)
GIVEN_A_PARAMETER = "The function is given a parameter's full name and the parameter. "
LEAVE_OUT = "The model has none: leave it out. "
# Selectors of nothing, what the message says matches nothing, and the hint.
NOTHING: list[tuple[Selector, str, str]] = [
    (named("head"), "named('head')", ""),
    (named("norm1"), "named('norm1')", ""),
    (named("blocks.0.norm"), "named('blocks.0.norm')", ""),
    (named("still"), "named('still')", ""),
    (named("LM_HEAD"), "named('LM_HEAD')", ""),
    (named("*.Norm*"), "named('*.Norm*')", ""),
    (named("lm_head.fc.weight"), "named('lm_head.fc.weight')", ""),
    (named("tokens", "bags", "lm_head"), "named('bags')", ""),
    (of_type(nn.Conv2d), "of_type(Conv2d)", LEAVE_OUT),
    (of_type(nn.Conv1d) | of_type(nn.Conv2d), "of_type(Conv1d) | of_type(Conv2d)", LEAVE_OUT),
    (where(lambda layer: isinstance(layer, nn.Linear)), "where(<lambda>)", GIVEN_A_LAYER),
    (last_layers(1) | where(lambda layer: False), "where(<lambda>)", GIVEN_A_LAYER),
    (named("bag") | named("bags"), "named('bags')", ""),
    (named("bag") - named("bags"), "named('bags')", ""),
    (named("bag") - of_type(nn.Conv2d), "of_type(Conv2d)", LEAVE_OUT),
    (named("bag") & of_type(nn.Conv2d), "of_type(Conv2d)", LEAVE_OUT),
    (named("bag") - embeddings(), "named('bag') - embeddings()", ""),
    (named("bag") & named("tokens"), "named('bag') & named('tokens')", ""),
    (last_layers(1) | named("bag") & named("tokens"), "named('bag') & named('tokens')", ""),
    (last_layers(1) | norms() & named("bags"), "named('bags')", ""),
]


@pytest.mark.parametrize(("selector", "culprit", "hint"), NOTHING, ids=[repr(selector) for selector, _, _ in NOTHING])
def test_selector_of_nothing_raises_and_lists_layers(selector: Selector, culprit: str, hint: str) -> None:
    listing = ", ".join(repr(name) for name in LAYERS)
    message = f"{culprit} matches no layer. {hint}The layers are: {listing}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(selector)


@pytest.mark.parametrize(
    ("selector", "culprit", "hint"),
    [
        (vectors(), "vectors()", LEAVE_OUT),
        (biases(), "biases()", LEAVE_OUT),
        (biases() | vectors(), "biases() | vectors()", LEAVE_OUT),
        (parameters_where(lambda name, param: "bias" in name), "parameters_where(<lambda>)", GIVEN_A_PARAMETER),
        (last_layers(1) | parameters_where(lambda name, param: False), "parameters_where(<lambda>)", GIVEN_A_PARAMETER),
        (parameters_where(lambda name, param: True) - named("*"), "parameters_where(<lambda>) - named('*')", ""),
        (named("a") - parameters_where(lambda name, param: True), "named('a') - parameters_where(<lambda>)", ""),
    ],
    ids=repr,
)
def test_parameter_selector_of_nothing_raises_and_lists_parameters(selector: Selector, culprit: str, hint: str) -> None:
    model = Net(a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 2, bias=False))
    message = f"{culprit} matches no parameter. {hint}The parameters are: 'a.weight', 'b.weight'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(selector, model)


def test_listing_of_a_large_model_is_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(120)))
    with pytest.raises(ValueError, match=r"The layers are: '0', '1', .* '99' and 20 more\.$"):
        chosen(named("head"), model)


@pytest.mark.parametrize("selector", [norms(), embeddings()], ids=repr)
def test_type_selector_of_nothing_says_to_leave_it_out(selector: Selector) -> None:
    with pytest.raises(
        ValueError, match=r"matches no layer\. The model has none: leave it out\. The layers are: '<root>'"
    ):
        chosen(selector, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "selector",
    [
        last_layers(1) | norms() | embeddings(),
        embeddings() | norms() | last_layers(1),
        of_type(nn.Conv1d) | named("1"),
        norms() - named("0") | named("1"),
        last_layers(1) | embeddings() & (norms() | vectors()),
        last_layers(1) | (norms() - embeddings()),
    ],
    ids=repr,
)
def test_type_selector_may_match_nothing_inside_a_union(selector: Selector) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert chosen(selector, model) == ["1"]


def test_allow_empty_lets_a_type_match_nothing_and_a_name_not() -> None:
    layers = find_layers(nn.Sequential(nn.Linear(2, 2)))
    assert norms().select(layers, allow_empty=True) == frozenset()
    with pytest.raises(ValueError, match="matches no layer"):
        named("1").select(layers, allow_empty=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda: norms() or last_layers(1),
        lambda: norms() and last_layers(1),
        lambda: not norms(),
        lambda: bool(norms()),
        lambda: 1 if norms() else 0,
    ],
    ids=["or", "and", "not", "bool", "if"],
)
def test_selector_has_no_truth_value(use: Callable[[], Any]) -> None:
    words = (
        "selector norms() is neither true nor false: write | in place of `or`, & in place of `and`, - in place of `not`"
    )
    with pytest.raises(TypeError, match=re.escape(words)):
        use()


@pytest.mark.parametrize(
    "use",
    [lambda: "lm_head" in norms(), lambda: list(norms()), lambda: find_layers(norms())],
    ids=["in", "list", "model"],
)
def test_selector_is_no_collection(use: Callable[[], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"norms\(\) is no collection.*partition_trainable_layers\(model, cap=norms\(\)\)"
    ):
        use()


MODEL = language_model()
NAMES = st.sets(st.sampled_from(LAYERS))


def of_names(names: set[str]) -> Selector:
    return where(lambda layer: layer.name in names)


Expression = tuple[Selector, set[str] | None]
"""A selector and the set that it stands for; None where a part of it is empty, which is refused."""


SIGNS: dict[str, Callable[[Any, Any], Any]] = {"|": operator.or_, "&": operator.and_, "-": operator.sub}


def combined(left: Expression, sign: str, right: Expression) -> Expression:
    selector = SIGNS[sign](left[0], right[0])
    if left[1] is None or right[1] is None:
        return selector, None
    return selector, SIGNS[sign](left[1], right[1]) or None


LEAVES = NAMES.map(lambda names: (of_names(names), names or None))
EXPRESSIONS = st.recursive(
    LEAVES, lambda inner: st.builds(combined, inner, st.sampled_from("|&-"), inner), max_leaves=6
)


@given(EXPRESSIONS)
def test_combined_selectors_behave_as_sets(expression: Expression) -> None:
    selector, names = expression
    if names is None:
        with pytest.raises(ValueError, match="matches no layer"):
            chosen(selector, MODEL)
    else:
        assert chosen(selector, MODEL) == [name for name in LAYERS if name in names]


@pytest.mark.parametrize("selector", [named("lm_head"), norms() - named("ln_f")], ids=repr)
def test_selector_of_nothing_explains_ties(selector: Selector) -> None:
    message = (
        f"{selector!r} matches no layer. The layers are: 'wte', 'block', 'ln_f'. "
        "'lm_head' has no parameters of its own: 'lm_head.weight' is tied to 'wte.weight'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen(selector, tied_model())


EVALUATED = {make.__name__: make for make in (last_layers, norms, embeddings, vectors, biases, named)}
WRITABLE = st.recursive(
    st.sampled_from([last_layers(1), norms(), embeddings(), vectors(), biases(), named("bag", "lm_head")]),
    lambda inner: st.builds(lambda left, sign, right: SIGNS[sign](left, right), inner, st.sampled_from("|&-"), inner),
    max_leaves=6,
)
LAYERS_OF_MODEL = find_layers(MODEL)


def outcome(selector: Selector) -> Any:
    """What it chooses, or says."""
    try:
        return selector.select(LAYERS_OF_MODEL)
    except ValueError as error:
        return str(error)


@given(WRITABLE)
def test_repr_is_the_expression_that_makes_the_selector(selector: Selector) -> None:
    again = eval(repr(selector), EVALUATED)
    assert repr(again) == repr(selector)
    assert outcome(again) == outcome(selector)
