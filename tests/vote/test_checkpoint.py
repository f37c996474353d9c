"""Checkpoints and copies of optimizers that vote: each rank's own, and one for any number of ranks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from stac_optimizer import STAC
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, wide_model
from tests.voting import seed_of, voting

Weights = dict[str, Tensor]


def resumed(folder: str, how: str, first_step: int) -> tuple[Weights, Any]:
    """Two steps after loading what :func:`saved` wrote, then all it has."""
    model = wide_model(seed=1)
    optimizer = voting(model)
    name = f"{dist.get_rank()}.pt" if how == "own" else "0.pt"
    weights, state = torch.load(Path(folder) / name, weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return stepped(model, optimizer, range(first_step, first_step + 2))


def stepped(model: nn.Module, optimizer: STAC, steps: range) -> tuple[Weights, Any]:
    for step in steps:
        set_gradients(model, seed_of(step))
        optimizer.step()
    return snapshot(model, optimizer)  # type: ignore[no-any-return]


def saved(folder: str, averages: bool, dtype: str | None = None) -> tuple[Any, tuple[Weights, Any]]:
    """What each rank saved after three steps, and has after two more."""
    model = wide_model()
    optimizer = voting(model, trunk_state_dtype=dtype)
    stepped(model, optimizer, range(3))
    if averages:
        optimizer.average_trunk_state()
    state = snapshot(model, optimizer)
    torch.save(state, Path(folder) / f"{dist.get_rank()}.pt")
    return state, stepped(model, optimizer, range(3, 5))


def test_each_ranks_own_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    expected = [after for _, after in run_ranks(saved, 2, str(tmp_path), False)]
    assert_same_bits(run_ranks(resumed, 2, str(tmp_path), "own", 3), expected)


def test_averaged_state_is_one_for_all_and_resumes_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    (first, after), (second, _) = run_ranks(saved, 2, str(tmp_path), True)
    assert_same_bits(first, second)
    assert_same_bits(run_ranks(resumed, 2, str(tmp_path), "any", 3)[0], after)
    for ranks in (1, 4):
        results = run_ranks(resumed, ranks, str(tmp_path), "any", 3)
        for weights, _ in results:
            assert_same_bits(weights, results[0][0])


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_average_of_states_is_their_mean(tmp_path: Path, dtype: str | None) -> None:
    own = [state for (_, state), _ in run_ranks(saved, 2, str(tmp_path), False, dtype)]
    ((_, mean), _), _ = run_ranks(saved, 2, str(tmp_path), True, dtype)
    for number, state in mean["state"].items():
        if "exp_avg" in state and "exp_avg_sq" not in state and state["exp_avg"].dtype != torch.int8:
            expected = sum(one["state"][number]["exp_avg"].float() for one in own) / 2
            assert_same_bits(state["exp_avg"], expected.to(state["exp_avg"].dtype))
    if dtype == "int8":
        scales = [torch.stack([one["state"][0]["exp_avg_scale"] for one in own]), mean["state"][0]["exp_avg_scale"]]
        assert (scales[1] <= scales[0].amax(0)).all()
        assert (scales[1] > 0).all()


def hidden_step() -> tuple[bool, Any]:
    """What torch's own helpers save and load, whose first step must be a step of no rank."""
    model, target = small_model(), small_model()
    optimizer, fresh = voting(model), voting(target)
    stepped(model, optimizer, range(2))
    before = copy.deepcopy(target.state_dict())
    optimizer.zero_grad()
    set_optimizer_state_dict(target, fresh, get_optimizer_state_dict(model, optimizer))
    assert_same_bits(target.state_dict(), before)
    target.load_state_dict(model.state_dict())
    assert_same_bits(stepped(model, optimizer, range(2, 4)), stepped(target, fresh, range(2, 4)))
    return True, None


def test_state_dict_helpers_of_torch() -> None:
    run_ranks(hidden_step, 2)


def copied() -> bool:
    model = small_model()
    optimizer = voting(model)
    stepped(model, optimizer, range(2))
    pair = (model, optimizer)
    for twin, twin_optimizer in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        expected = stepped(*copy.deepcopy((model, optimizer)), range(2, 4))
        assert_same_bits(stepped(twin, twin_optimizer, range(2, 4)), expected)
    return True


def test_copies_vote_too() -> None:
    run_ranks(copied, 2)


def test_checkpoint_goes_between_voting_and_averaging(tmp_path: Path) -> None:
    model = small_model()
    plain = STAC(model, lr=1e-2)
    with process_group(tmp_path):
        other = small_model()
        voter = voting(other)
        voter.load_state_dict(plain.state_dict())
        assert voter.param_groups[0]["vote"] == "ternary"
        plain.load_state_dict(voter.state_dict())
    assert plain.param_groups[0]["vote"] is None
