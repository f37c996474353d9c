"""What is given in place of a model, or of a selector: the message says what it is, and what to write."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import STAC, embeddings, last_layers, norms, parameters_where, partition_trainable_layers, where
from tests.model.models import frozen
from tests.support import small_model

PASS = "pass the model itself, or model.named_parameters()"


def normed() -> nn.Module:
    """A model with buffers."""
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


# What is given as the model, the error, and the words that its message must have.
NO_MODEL: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "state dict": (
        lambda: small_model().state_dict(),
        TypeError,
        ["got OrderedDict of tensors without gradients", "model.state_dict()", PASS],
    ),
    "its items": (
        lambda: small_model().state_dict().items(),
        ValueError,
        [
            "no trainable parameters",
            "model.state_dict()",
            "model.named_parameters()",
            "at least one trainable parameter",
        ],
    ),
    "parameters": (
        lambda: small_model().parameters(),
        TypeError,
        ["item of type Parameter", "model.parameters()", "do not tell which layers", PASS],
    ),
    "frozen parameters": (lambda: frozen(small_model()).parameters(), TypeError, ["no trainable parameters", PASS]),
    "frozen model": (
        lambda: frozen(small_model()),
        ValueError,
        ["no trainable parameters", "at least one trainable parameter", "all 6 are frozen", "include_frozen=True"],
    ),
    "no parameters": (
        nn.Tanh,
        ValueError,
        ["no trainable parameters", "at least one trainable parameter", "none at all"],
    ),
    "used up": (
        lambda: iter([]),
        ValueError,
        ["at least one trainable parameter", "can be used only once"],
    ),
    "buffers": (lambda: normed().buffers(), TypeError, ["no trainable parameters", "model.buffers()", PASS]),
    "named buffers": (
        lambda: normed().named_buffers(),
        ValueError,
        ["no trainable parameters", "model.named_buffers()"],
    ),
    "tensors": (lambda: [torch.zeros(2)], TypeError, ["no trainable parameters", "item of type Tensor", PASS]),
    "string": (lambda: "model.pt", TypeError, ["got str 'model.pt'", PASS]),
    "nothing": (lambda: None, TypeError, ["got NoneType", PASS]),
    "dict of parameters": (
        lambda: dict(small_model().named_parameters()),
        TypeError,
        ["got dict of parameters by name", PASS, "the dict's .items()"],
    ),
    "dict of other things": (lambda: {"lr": 0.1}, TypeError, ["got dict", PASS]),
    "class": (lambda: nn.Linear, TypeError, ["Linear is a class", "Linear(...)"]),
    "method": (lambda: small_model().named_parameters, TypeError, ["a function that was not called", PASS]),
    "modules": (lambda: small_model().children(), TypeError, ["item of type Linear", "nn.ModuleList([...])"]),
    "named modules": (
        lambda: small_model().named_children(),
        TypeError,
        ["with a module in it", "nn.ModuleList([...])"],
    ),
    "numbers": (lambda: [1.0], TypeError, ["item of type float", "The item is 1.0", PASS]),
}


@pytest.mark.parametrize("build", [STAC, partition_trainable_layers])
@pytest.mark.parametrize(("given", "error", "words"), NO_MODEL.values(), ids=NO_MODEL)
def test_what_is_no_model_is_told_with_what_to_pass(
    build: Callable[[Any], Any], given: Callable[[], Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error, match=r"^model") as raised:
        build(given())
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


def test_one_group_is_to_be_put_into_a_list() -> None:
    with pytest.raises(TypeError, match=r"one group dict: put it in a list, \[group\]"):
        STAC({"params": list(small_model().parameters()), "stac_role": "cap"})  # type: ignore[arg-type]


# What stands in place of a selector, and what is to be written.
NO_SELECTOR: dict[str, tuple[Any, str]] = {
    "name": ("lm_head", "for layers of this name write named('lm_head')"),
    "class": (nn.LayerNorm, "for layers of this class write of_type(LayerNorm)"),
    "module": (nn.Tanh(), "by its name, named(...), or by its class, of_type(Tanh)"),
    "number": (2, "for the last layers write last_layers(2)"),
    "uncalled": (embeddings, "embeddings must be called: embeddings(...)"),
    "function": (lambda layer: True, "a function of layers goes into where(...)"),
    "list": ([norms(), embeddings()], "join them: norms() | embeddings()"),
}
SIGNS: dict[str, Callable[[Any, Any], Any]] = {"|": operator.or_, "&": operator.and_, "-": operator.sub}


@pytest.mark.parametrize(("given", "instead"), NO_SELECTOR.values(), ids=NO_SELECTOR)
def test_what_is_no_selector_is_told_with_what_to_write(given: Any, instead: str) -> None:
    with pytest.raises(TypeError, match=f"cap must be a selector.*{re.escape(instead)}"):
        STAC(small_model(), cap=given)
    with pytest.raises(TypeError, match=rf"overrides\[0\] must be a pair of a selector.*{re.escape(instead)}"):
        STAC(small_model(), overrides=[(given, {"lr": 0.1})])
    for sign, combine in SIGNS.items():
        expected = rf"^{re.escape(sign)} combines selectors, got .* beside last_layers\(1\); .*{re.escape(instead)}"
        with pytest.raises(TypeError, match=expected):
            combine(last_layers(1), given)
        with pytest.raises(TypeError, match=expected):
            combine(given, last_layers(1))


@pytest.mark.parametrize("given", [None, 0, True, 1.5])
def test_what_nothing_can_be_written_for_is_refused_alone(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"got {given!r} of type {type(given).__name__} beside norms\(\)$"):
        norms() | given


def _of_module(module: Any) -> bool:
    return bool(module.weight.ndim == 2)


def _of_pair(parameter: Any, name: Any) -> bool:
    return bool(parameter.ndim == 2)


@pytest.mark.parametrize(
    ("selector", "error", "words"),
    [
        (where(_of_module), AttributeError, "given a STACLayer .*not the module.*of_type"),
        (where(lambda layer: isinstance(layer, nn.Linear)), ValueError, "given a STACLayer .*not the module.*of_type"),
        (where(_of_pair), TypeError, "given a STACLayer"),  # type: ignore[arg-type]
        (parameters_where(_of_module), TypeError, "a parameter's full name and the parameter"),  # type: ignore[arg-type]
        (parameters_where(_of_pair), AttributeError, "full name and the parameter"),
        (parameters_where(lambda name, _: name == "x"), ValueError, "full name and the parameter"),
    ],
    ids=["attribute", "isinstance", "two arguments", "one argument", "swapped", "nothing"],
)
def test_function_that_takes_what_it_gets_for_something_else_is_told(
    selector: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        partition_trainable_layers(small_model(), cap=selector)


@pytest.mark.parametrize("selector", [embeddings(), norms(), embeddings() | norms()], ids=repr)
def test_selector_by_type_that_finds_nothing_is_to_be_left_out(selector: Any) -> None:
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="leave it out"):
        STAC(convolutional, cap=selector)
    with pytest.raises(ValueError, match="leave it out"):
        STAC(convolutional, overrides=[(selector, {"lr": 0.1})])
    assert STAC(convolutional, cap=selector | last_layers(1)).partition.cap_layer_names == ("2",)
