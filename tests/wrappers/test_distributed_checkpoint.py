"""``torch.distributed.checkpoint`` of wrapped optimizers without ranks: its state dicts resume to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support import assert_same_bits
from tests.wrappers.support import WRAPPERS, Run, assert_go_on_alike, built, stepped

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full-cpu-offload": {"full_state_dict": True, "cpu_offload": True},
}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_base = pytest.mark.parametrize("base", ["STAC", "SGD", "Adagrad"])


def _run(wrapper: str, base: str, steps: int, seed: int = 0) -> Run:
    run = stepped(built(wrapper, base, seed=seed), range(steps))
    run[1].zero_grad()
    return run


@each_wrapper
@each_base
@pytest.mark.parametrize(
    ("options", "steps"),
    [*((options, 0) for options in OPTIONS.values()), (OPTIONS["plain"], 2)],
    ids=[*OPTIONS, "plain-stepped"],
)
def test_state_dicts_resume(options: dict[str, Any], steps: int, base: str, wrapper: str) -> None:
    source, target = _run(wrapper, base, 4), _run(wrapper, base, steps, seed=1)
    before = copy.deepcopy([model.state_dict() for model, _ in (source, target)])
    kind = StateDictOptions(**options)
    # A copy, for torch's own optimizers take over the tensors that they load.
    saved = copy.deepcopy(get_optimizer_state_dict(*source, options=kind))
    set_optimizer_state_dict(*target, saved, options=kind)
    assert_same_bits([model.state_dict() for model, _ in (source, target)], before)
    target[0].load_state_dict(source[0].state_dict())
    assert_go_on_alike(target, source)


@each_wrapper
@each_base
@pytest.mark.filterwarnings("ignore:(torch.distributed is|TypedStorage is deprecated):UserWarning")
def test_files_resume_in_a_fresh_optimizer(base: str, wrapper: str, tmp_path: Path) -> None:
    def both(run: Run) -> dict[str, Any]:
        weights, state = get_state_dict(*run)
        return {"model": weights, "optimizer": state}

    source, target = _run(wrapper, base, 4), _run(wrapper, base, 0, seed=1)
    save(both(source), checkpoint_id=tmp_path)
    held = both(target)
    load(held, checkpoint_id=tmp_path)
    set_state_dict(*target, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    assert_go_on_alike(target, source)


@each_wrapper
def test_asking_for_state_before_the_first_step_changes_nothing_later(wrapper: str) -> None:
    asked, other = _run(wrapper, "STAC", 0), _run(wrapper, "STAC", 0)
    before = copy.deepcopy(asked[0].state_dict())
    get_optimizer_state_dict(*asked)
    assert_same_bits(asked[0].state_dict(), before)
    for run in (asked, other):
        stepped(run, range(7))
    assert_same_bits(asked[0].state_dict(), other[0].state_dict())
    assert torch.equal(*[run[0].get_parameter("0.weight") for run in (asked, other)])
