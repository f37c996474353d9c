"""Checkpoints that do not fit: refused with the way out, and the optimizer left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import assert_same_bits, snapshot
from tests.wrappers.support import WRAPPERS, built, stepped

SLOW = {"Lookahead": "lookahead_slow", "Scout": "scout_slow"}


def _first(saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = saved["state"][0]
    return state


def _own(saved: dict[str, Any], ending: str) -> str:
    found = [key for key in _first(saved) if key.startswith(("look", "scout", "mech")) and key.endswith(ending)]
    return found[0]


def _with_other_shape(saved: dict[str, Any]) -> None:
    key = next(key for key in _first(saved) if key.endswith(("_slow", "_delta")))
    _first(saved)[key] = torch.zeros(3, 3)


def _with_integers(saved: dict[str, Any]) -> None:
    key = next(key for key in _first(saved) if key.endswith(("_slow", "_delta")))
    _first(saved)[key] = _first(saved)[key].long()


def _with_two_counts(saved: dict[str, Any]) -> None:
    key = next(key for key in _first(saved) if key.endswith(("_step", "_numbers")) and "_" in key)
    _first(saved)[key] = _first(saved)[key] + 1


def _with_no_tensor(saved: dict[str, Any]) -> None:
    key = next(key for key in _first(saved) if key.endswith(("_step", "_numbers")) and "_" in key)
    _first(saved)[key] = 3


def _with_a_bad_value(saved: dict[str, Any]) -> None:
    group = saved["param_groups"][-1]
    key = next(key for key in group if key in ("sync_rate", "s_decay"))
    group[key] = -1.0


def _with_less_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "shape": (_with_other_shape, r"has shape \(3, 3\)"),
    "integers": (_with_integers, "int64"),
    "counts": (_with_two_counts, "all have one"),
    "no-tensor": (_with_no_tensor, "must be a tensor, got int"),
    "value": (_with_a_bad_value, "checkpoint group"),
    "groups": (_with_less_groups, "group"),
}


@pytest.mark.parametrize("wrapper", ["Lookahead", "Scout", "mechanize"])
@pytest.mark.parametrize("base", ["STAC", "Adam"])
@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_is_refused(name: str, base: str, wrapper: str) -> None:
    spoil, message = SPOILED[name]
    saved = copy.deepcopy(stepped(built(wrapper, base), range(4))[1].state_dict())
    spoil(saved)
    target = stepped(built(wrapper, base, seed=1), range(2))
    before = snapshot(*target)
    with pytest.raises(ValueError, match=message):
        target[1].load_state_dict(saved)
    assert_same_bits(snapshot(*target), before)


@pytest.mark.parametrize("base", ["STAC", "Adam"])
def test_the_state_of_other_wrappers_is_refused(base: str) -> None:
    saved = {wrapper: stepped(built(wrapper, base), range(3))[1].state_dict() for wrapper in WRAPPERS}
    for wrapper, target in (
        ("Lookahead", "Scout"),
        ("Scout", "mechanize"),
        ("mechanize", "Lookahead"),
        ("Lookahead-mechanize", "mechanize"),
        ("Lookahead-mechanize", "Lookahead"),
    ):
        run = stepped(built(target, base), range(2))
        before = snapshot(*run)
        with pytest.raises(ValueError, match="wrap it as it was then"):
            run[1].load_state_dict(saved[wrapper])
        assert_same_bits(snapshot(*run), before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_optimizer_of_ours_without_wrapper_refuses_a_wrapped_checkpoint(wrapper: str) -> None:
    saved = stepped(built(wrapper, "STAC"), range(3))[1].state_dict()
    other, optimizer = built("Lookahead", "STAC")
    plain = (other, optimizer.base)
    stepped(plain, range(2))
    before = snapshot(*plain)
    with pytest.raises(ValueError, match=r"(lookahead|scout|mechanic)_\w+' of '0.weight' is no state of the rule"):
        plain[1].load_state_dict(saved)
    assert_same_bits(snapshot(*plain), before)


def test_other_things_than_state_dicts_are_refused() -> None:
    model, optimizer = built("Lookahead", "Adam")
    with pytest.raises(ValueError, match="it is a model's"):
        optimizer.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict([])


def test_betas_and_numbers_must_fit() -> None:
    saved = copy.deepcopy(stepped(built("mechanize", "Adam"), range(3))[1].state_dict())
    saved["param_groups"][0]["s_betas"] = (0.9,)
    target = built("mechanize", "Adam")
    with pytest.raises(ValueError, match=r"want \(4, 1\)"):
        target[1].load_state_dict(saved)
