"""The checkers: what each returns, what each refuses, the arguments that they guard, and where a warning points."""

from __future__ import annotations

import copy
import linecache
import math
import re
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stac_optimizer import STAC, partition_trainable_layers, validation
from stac_optimizer.optim import AdamW, Lion, Signum
from stac_optimizer.rule import COMMON_HYPERPARAMETERS
from stac_optimizer.validation import (
    Checker,
    boolean,
    count,
    learning_rate,
    mapping,
    non_negative,
    optional_boolean,
    pair_of_fractions,
    unit_fraction,
)
from tests.roles.support import group_of
from tests.support import small_model

FINITE = "a finite number in [0, inf)"
FRACTION = "a number in [0, 1)"
PAIR = "a tuple of two numbers in [0, 1)"
COUNT = "an integer in [0, inf)"

# Checker, a good value, and the plain Python value that it returns.
GOOD: list[tuple[Checker, Any, Any]] = [
    *((checker, 0, 0.0) for checker in (non_negative, unit_fraction, learning_rate)),
    *((checker, 0.25, 0.25) for checker in (non_negative, unit_fraction, learning_rate)),
    *((checker, np.float32(0.25), 0.25) for checker in (non_negative, unit_fraction, learning_rate)),
    *((checker, np.float64(0.1), 0.1) for checker in (non_negative, unit_fraction, learning_rate)),
    *((checker, Fraction(1, 4), 0.25) for checker in (non_negative, unit_fraction, learning_rate)),
    (non_negative, np.int64(3), 3.0),
    (non_negative, sys.float_info.max, sys.float_info.max),
    (learning_rate, np.int64(3), 3.0),
    (unit_fraction, math.nextafter(1.0, 0.0), math.nextafter(1.0, 0.0)),
    (pair_of_fractions, (0, 0.5), (0.0, 0.5)),
    (pair_of_fractions, [0.9, 0.999], (0.9, 0.999)),
    (pair_of_fractions, (np.float32(0.5), np.float64(0.1)), (0.5, 0.1)),
    *((checker, value, value) for checker in (boolean, optional_boolean) for value in (True, False)),
    (optional_boolean, None, None),
    (count, 0, 0),
    (count, 10**30, 10**30),
    (count, np.int8(3), 3),
    (count, np.uint64(3), 3),
]

NOT_REAL = [True, False, np.bool_(True), "0.1", None, 1j, Decimal("0.1"), [0.1], object]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]
NEGATIVE = [-1, -math.ulp(0.0), np.float32(-0.5), np.int64(-1), Fraction(-1, 4)]
TOO_LARGE = [10**400, Fraction(10**400)]  # no float holds them

# Checker, a bad value, the error, and what the message says is allowed.
BAD: list[tuple[Checker, Any, type[Exception], str]] = [
    *((non_negative, value, TypeError, FINITE) for value in (*NOT_REAL, torch.tensor(0.1))),
    *((non_negative, value, ValueError, FINITE) for value in (*NOT_FINITE, *NEGATIVE, *TOO_LARGE)),
    *((learning_rate, value, TypeError, FINITE) for value in NOT_REAL),
    *((learning_rate, value, ValueError, FINITE) for value in (*NOT_FINITE, *NEGATIVE, *TOO_LARGE)),
    *((unit_fraction, value, TypeError, FRACTION) for value in (*NOT_REAL, torch.tensor(0.1))),
    *((unit_fraction, value, ValueError, FRACTION) for value in (*NOT_FINITE, *NEGATIVE, *TOO_LARGE, 1, 1.0)),
    *((pair_of_fractions, value, TypeError, PAIR) for value in (0.9, "ab", None, {0.1, 0.2}, torch.zeros(2))),
    *((pair_of_fractions, value, ValueError, PAIR) for value in ((), (0.9,), (0.1, 0.2, 0.3))),
    *((boolean, value, TypeError, "True or False") for value in (0, 1, None, "True", np.bool_(True))),
    *((optional_boolean, value, TypeError, "True, False or None") for value in (0, 1, "None", np.bool_(True))),
    *((count, value, TypeError, COUNT) for value in (True, 1.0, "1", None, Fraction(1), np.bool_(True))),
    *((count, value, ValueError, COUNT) for value in (-1, np.int64(-1))),
]

# An element of a pair that is wrong, its name and the error.
BAD_ELEMENTS: list[tuple[Any, str, Any, type[Exception]]] = [
    ((1.0, 0.5), "x[0]", 1.0, ValueError),
    ((0.5, -0.1), "x[1]", -0.1, ValueError),
    ((0.5, math.nan), "x[1]", math.nan, ValueError),
    (("a", 0.5), "x[0]", "a", TypeError),
    ([0.5, True], "x[1]", True, TypeError),
]

# A tensor that is no learning rate, the error, and what the message shows besides the name.
BAD_TENSORS: list[tuple[Tensor, type[Exception], tuple[str, ...]]] = [
    (torch.zeros(2), ValueError, ("one element", "(2,)")),
    (torch.zeros(0), ValueError, ("one element", "(0,)")),
    (torch.tensor(1), TypeError, ("floating-point", "torch.int64")),
    (torch.tensor(True), TypeError, ("floating-point", "torch.bool")),
    (torch.tensor(1j), TypeError, ("floating-point", "torch.complex64")),
    (torch.tensor(math.nan), ValueError, (FINITE, "nan")),
    (torch.tensor([math.inf]), ValueError, (FINITE, "inf")),
    (torch.tensor(-0.5), ValueError, (FINITE, "-0.5")),
]


def case_id(case: tuple[Any, ...]) -> str:
    """The checker's name and the value, as in ``count-np.int8(3)``; the value alone where there is no checker."""
    value = case[1] if callable(case[0]) else case[0]
    number = "10**400" if isinstance(value, (int, Fraction)) and value >= 10**400 else repr(value)
    return f"{case[0].__name__}-{type(value).__name__}-{number}" if callable(case[0]) else number


def types(value: Any) -> Any:
    return tuple(map(types, value)) if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize(("checker", "value", "expected"), [pytest.param(*case, id=case_id(case)) for case in GOOD])
def test_good_value_returned_as_plain_python(checker: Checker, value: Any, expected: Any) -> None:
    result = checker("x", value)
    assert result == expected
    assert types(result) == types(expected)


@pytest.mark.parametrize(
    ("checker", "value", "error", "allowed"), [pytest.param(*case, id=case_id(case)) for case in BAD]
)
def test_bad_value_raises_with_name_value_and_allowed(
    checker: Checker, value: Any, error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error) as caught:
        checker("weight_decay", value)
    message = str(caught.value)
    assert message.startswith(f"weight_decay must be {allowed}, got {value!r}")
    assert (f"of type {type(value).__name__}" in message) is (error is TypeError)


@pytest.mark.parametrize(
    ("pair", "name", "value", "error"), [pytest.param(*case, id=case_id(case)) for case in BAD_ELEMENTS]
)
def test_bad_element_of_pair_raises_with_its_position(pair: Any, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        pair_of_fractions("x", pair)
    assert str(caught.value).startswith(f"{name} must be {FRACTION}, got {value!r}")


@given(st.floats())
def test_any_float_checked_by_its_bounds(value: float) -> None:
    for checker, is_good in ((non_negative, 0 <= value < math.inf), (unit_fraction, 0 <= value < 1)):
        if is_good:
            assert checker("x", value) == value
        else:
            with pytest.raises(ValueError, match=r"x must be .* number in \[0"):
                checker("x", value)


@pytest.mark.parametrize("least", [0, 1, 5])
def test_count_starts_at_least(least: int) -> None:
    assert count("n", least, least=least) == least
    with pytest.raises(ValueError, match=rf"n must be an integer in \[{least}, inf\), got {least - 1}"):
        count("n", least - 1, least=least)


def test_mapping_returned_as_it_is() -> None:
    value = MappingProxyType({"a": 1})
    assert mapping("x", value) is value


@pytest.mark.parametrize("value", [None, 1, [("a", 1)], {"a"}], ids=repr)
def test_no_mapping_raises_with_name_and_type(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^state_dict must be a dict, got {type(value).__name__}$"):
        mapping("state_dict", value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_learning_rate_returned_as_it_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.full(shape, 0.25, dtype=dtype)
    assert learning_rate("lr", value) is value


@pytest.mark.parametrize(("value", "error", "parts"), [pytest.param(*case, id=case_id(case)) for case in BAD_TENSORS])
def test_bad_tensor_learning_rate_raises(value: Tensor, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=r"^lr ") as caught:
        learning_rate("lr", value)
    assert all(part in str(caught.value) for part in parts)


# Arguments of one kind, what their message says is allowed, values of a wrong type, and values out of range.
KINDS: list[tuple[list[str], str, list[Any], list[Any]]] = [
    (["lr"], FINITE, ["1e-3", True, None], [-1, math.nan, math.inf]),
    (["trunk_lr", "cap_lr"], FINITE, ["1e-3", True], [-1.0, math.nan, math.inf]),
    (["weight_decay"], FINITE, ["0", False, None, torch.tensor(0.1)], [-0.1, math.nan, math.inf]),
    (["trunk_weight_decay", "cap_weight_decay"], FINITE, ["0", False], [-0.1, math.nan, math.inf]),
    (["eps"], FINITE, ["0", True, None], [-1e-9, math.nan, math.inf]),
    (["trunk_momentum"], FRACTION, ["0.9", True, None], [-0.1, 1, 1.5, math.nan]),
    (["betas"], PAIR, [0.9, None, "ab"], [(), (0.9,), (0.9, 0.9, 0.9)]),
    (
        ["trunk_cautious", "amsgrad", "maximize", "error_if_nonfinite", "capturable", "differentiable"],
        "True or False",
        [1, None, "True", np.True_],
        [],
    ),
    (["foreach", "fused"], "True, False or None", [0, "True"], []),
    (["last_n_layers"], COUNT, [1.0, True, None, "1"], [-1]),
    (["cap"], "a selector, such as named('lm_head'), or None", ["3", bool, -1], []),
]
WRONG = [
    pytest.param(name, value, error, allowed, id=f"{name}={value}")
    for names, allowed, wrong_type, out_of_range in KINDS
    for error, values in ((TypeError, wrong_type), (ValueError, out_of_range))
    for name in names
    for value in values
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG)
def test_wrong_argument_raises_with_name_value_and_allowed(
    name: str, value: Any, error: type[Exception], allowed: str
) -> None:
    message = f"^{re.escape(f'{name} must be {allowed}, got {value!r}')}"
    with pytest.raises(error, match=message):
        STAC(small_model(), **{name: value})
    key, kind = (name.removeprefix("trunk_"), Signum) if name.startswith("trunk_") else (name, AdamW)
    if key in kind.rule.hyperparameters or name in COMMON_HYPERPARAMETERS:
        message = f"^group 1: {re.escape(f'{key} must be {allowed}, got {value!r}')}"
        group = group_of("trunk" if kind is Signum else "cap", "3", **{key: value})
        with pytest.raises(error, match=message):
            STAC([group_of("trunk", "0"), group])
        arguments: dict[str, Any] = {key: value}
        with pytest.raises(error, match=message.replace("group 1: ", "")):
            kind([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("name", ["lr", "trunk_lr", "cap_lr"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(torch.zeros(2), ValueError, r"must have one element, got shape \(2,\)", id="two-elements"),
        pytest.param(torch.tensor(1), TypeError, "must be of a floating-point dtype, got torch.int64", id="integer"),
        pytest.param(torch.tensor(math.nan), ValueError, r"must be a finite number in \[0, inf\), got nan", id="nan"),
    ],
)
def test_wrong_tensor_learning_rate_raises(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(error, match=f"^{name} .*{message}"):
        STAC(small_model(), **arguments)


@pytest.mark.parametrize("betas", [(1.0, 0.5), (0.5, -0.1), (0.5, math.nan)], ids=str)
def test_beta_out_of_range_raises_with_its_position(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^betas\[[01]\] must be a number in \[0, 1\)"):
        STAC(small_model(), betas=betas)


LR = torch.tensor(1e-3)
# Arguments that exclude each other, and the message.
EXCLUDED: dict[str, tuple[dict[str, Any], str]] = {
    "fused-foreach": ({"fused": True, "foreach": True}, "fused and .*foreach exclude each other"),
    "fused-differentiable": ({"fused": True, "differentiable": True}, "fused and .*differentiable exclude each other"),
    "rounding-differentiable": (
        {"stochastic_rounding": True, "differentiable": True},
        "stochastic_rounding and .*differentiable exclude",
    ),
    "foreach-differentiable": ({"foreach": True, "differentiable": True}, "foreach and .*differentiable exclude"),
    "foreach-tensor-lr": ({"foreach": True, "lr": LR}, "lr as a tensor .*foreach=True needs .*capturable=True"),
    "foreach-tensor-cap_lr": ({"foreach": True, "cap_lr": LR}, "lr as a tensor .*foreach=True needs .*capturable"),
}


@pytest.mark.parametrize(("arguments", "message"), EXCLUDED.values(), ids=EXCLUDED)
def test_arguments_that_exclude_each_other_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STAC(small_model(), **arguments)
    if "cap_lr" not in arguments:
        with pytest.raises(ValueError, match=f"^group 0: .*{message}"):
            STAC([group_of("trunk", "0", **arguments)])


def test_tensor_lr_with_capturable_foreach_is_allowed() -> None:
    groups = STAC(small_model(), lr=LR, foreach=True, capturable=True).param_groups
    assert [group["foreach"] for group in groups] == [True, True]


def called_through(*modules: str) -> Callable[[], None]:
    """A function of the first of these modules that calls one of the next, and so on; the last one warns."""
    call: Callable[[], None] = partial(validation.warn, "x")
    for name in reversed(modules):
        namespace: dict[str, Any] = {"__name__": name, "call": call}
        exec(compile("def f():\n    call()\n", f"<{name}>", "exec"), namespace)
        call = namespace["f"]
    return call


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param(("their_code",), "their_code", id="directly"),
        pytest.param(("their_code", "stac_optimizer.stac"), "their_code", id="through-one-module"),
        pytest.param(
            ("their_code", "stac_optimizer.stac", "stac_optimizer.groups.keys", "stac_optimizer.model.selectors"),
            "their_code",
            id="through-several-modules",
        ),
        pytest.param(("outer", "their_code", "stac_optimizer"), "their_code", id="nearest-caller"),
        pytest.param(
            ("outer", "stac_optimizer_extras", "stac_optimizer.stac"), "stac_optimizer_extras", id="like-name"
        ),
    ],
)
def test_warning_points_at_line_outside_package(modules: tuple[str, ...], expected: str) -> None:
    with pytest.warns(UserWarning, match="^x$") as caught:
        called_through(*modules)()
    assert (caught[0].filename, caught[0].lineno) == (f"<{expected}>", 2)


def test_warning_of_public_calls_points_at_their_line() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False))
    untied = copy.deepcopy(model)
    model[2].weight = model[0].weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition_trainable_layers(model)
        STAC(model)
        STAC(untied)
        Lion([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], lr=1e-5)
        Signum([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], lr=1e-5)
    lines = [linecache.getline(warning.filename, warning.lineno).strip() for warning in caught]
    assert lines == [
        "partition_trainable_layers(model)",
        "STAC(model)",
        "STAC(untied)",
        "Lion([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], lr=1e-5)",
        "Signum([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))], lr=1e-5)",
    ]
