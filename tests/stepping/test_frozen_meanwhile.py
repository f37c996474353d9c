"""An optimizer all of whose parameters were frozen after it was built says so, once: something else trains."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from stac_optimizer import STAC
from tests.support import seeded_loss, set_gradients, small_model, take_steps

STOPPED = "all of the optimizer's parameters are frozen by now"


def test_another_adapter_that_trains_in_the_place_of_the_first_is_told_of() -> None:
    model = small_model()
    optimizer = STAC(model)
    take_steps(model, optimizer, range(2))
    model.requires_grad_(False)
    model.add_module("4", nn.Linear(3, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            optimizer.zero_grad()
            seeded_loss(model, step).backward()
            optimizer.step()
    (message,) = [str(warning.message) for warning in caught]
    assert STOPPED in message
    assert "add_param_group" in message


@pytest.mark.parametrize("kind", ["some", "not-yet", "without-gradients"])
def test_optimizer_of_which_something_trains_is_quiet(kind: str) -> None:
    model = small_model()
    optimizer = STAC(model, include_frozen=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_gradients(model, 0)
        optimizer.step()
        for step in range(1, 9):
            model[0].requires_grad_(kind == "without-gradients")
            model[1:].requires_grad_(kind != "not-yet" or step % 3 == 0)
            optimizer.zero_grad()
            if kind != "without-gradients":
                set_gradients(model, step)
            optimizer.step()
