"""What a vote cannot serve is refused, on every rank alike, and leaves weights and state as they were."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC, MajorityVote
from stac_optimizer.distributed import vote
from stac_optimizer.optim import Signum
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.support import assert_same_bits, seeded_loss, set_gradients, small_model, snapshot
from tests.voting import seed_of


def message_of(error: type[Exception], action: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(error) as caught:
        action(*arguments, **keywords)
    return str(caught.value)


def bad_gradient(kind: str, flags: dict[str, Any]) -> str:
    """Rank 1 has a gradient that nobody can use; all must hear of it, and none may have moved."""
    model = small_model()
    optimizer = STAC(model, vote=MajorityVote(), **flags)
    for step in range(2):
        set_gradients(model, seed_of(step))
        optimizer.step()
    before = snapshot(model, optimizer)
    weight = model.get_parameter("0.weight")
    set_gradients(model, 9)
    if dist.get_rank() == 1:
        assert weight.grad is not None
        if kind == "sparse":
            weight.grad = weight.grad.to_sparse()
        else:
            weight.grad[0, 0] = torch.nan if kind == "nan" else torch.inf
    message = message_of(RuntimeError, optimizer.step)
    assert_same_bits(snapshot(model, optimizer), before)
    set_gradients(model, 10)
    optimizer.step()
    return message


@pytest.mark.parametrize("flags", [{}, {"error_if_nonfinite": True}], ids=["default", "error_if_nonfinite"])
@pytest.mark.parametrize("kind", ["nan", "infinity", "sparse"])
def test_gradient_of_one_rank_that_cannot_be_used_stops_all(kind: str, flags: dict[str, Any]) -> None:
    messages = run_ranks(bad_gradient, 2, kind, flags)
    assert messages[0] == messages[1]
    expected = "sparse_coo" if kind == "sparse" else "NaN or infinity"
    assert messages[0].startswith("no rank can step: rank 1: ")
    assert "'0.weight' (trunk)" in messages[0]
    assert expected in messages[0]


def bad_gradient_over_a_sharded_cap(kind: str) -> str:
    """One rank alone has a bad gradient, and gradients of other parameters than the rest."""
    model = small_model()
    ignored = {param for name, param in model.named_parameters() if not name.startswith("3.")}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=ignored)
    optimizer = STAC(model, vote=MajorityVote())
    seeded_loss(model, dist.get_rank()).backward()
    if dist.get_rank() == 1:
        weight, bias = model.get_parameter("0.weight"), model.get_parameter("0.bias")
        assert weight.grad is not None
        weight.grad = weight.grad.fill_(torch.nan) if kind == "nan" else weight.grad.to_sparse()
        bias.grad = None
    return message_of(RuntimeError, optimizer.step)


@pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters, reason="this torch shards all parameters or none"
)
@pytest.mark.parametrize("kind", ["nan", "sparse"])
def test_bad_gradient_beside_a_sharded_cap_stops_all(kind: str) -> None:
    for message in run_ranks(bad_gradient_over_a_sharded_cap, 2, kind, timeout=20):
        assert message.startswith("no rank can step: rank 1: ")
        assert "'0.weight' (trunk)" in message


def one_loaded() -> str:
    """One rank alone has state."""
    optimizer = STAC(small_model(), vote=MajorityVote())
    if dist.get_rank() == 0:
        model = small_model()
        other = STAC(model)
        set_gradients(model, 0)
        other.step()
        optimizer.load_state_dict(other.state_dict())
    return message_of(RuntimeError, optimizer.average_trunk_state)


def test_average_of_states_that_some_ranks_lack_is_refused() -> None:
    assert all("nothing was averaged" in message for message in run_ranks(one_loaded, 2, timeout=20))


def other_ranks() -> str:
    groups = [dist.new_group([rank]) for rank in range(2)]
    ddp = DistributedDataParallel(small_model())
    return message_of(ValueError, STAC, ddp, vote=MajorityVote(groups[dist.get_rank()]))


def test_votes_and_averages_of_different_ranks_are_refused() -> None:
    assert all("must be of the same ranks" in message for message in run_ranks(other_ranks, 2, timeout=20))


def scaled() -> str:
    model = small_model()
    optimizer = STAC(model, vote=MajorityVote())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(seeded_loss(model, 0)).backward()
    before = snapshot(model, optimizer)
    message = message_of(RuntimeError, scaler.step, optimizer)
    assert_same_bits(snapshot(model, optimizer), before)
    return message


def test_grad_scaler_is_refused() -> None:
    assert "GradScaler's scale" in run_ranks(scaled, 2)[0]


def joined() -> str:
    ddp = DistributedDataParallel(small_model())
    optimizer = STAC(ddp, vote=MajorityVote())
    with Join([ddp]):
        message = message_of(RuntimeError, seeded_loss(ddp, 0).backward)
        assert message_of(RuntimeError, optimizer.step).startswith(message)
        return message


def test_join_is_refused() -> None:
    assert all("not join()" in message for message in run_ranks(joined, 2))


def hooked_twice() -> str:
    ddp = DistributedDataParallel(small_model())
    STAC(ddp, vote=MajorityVote())
    return message_of(RuntimeError, STAC, ddp, vote=MajorityVote())


def test_second_hook_on_a_model_is_refused() -> None:
    assert all("register_comm_hook" in message for message in run_ranks(hooked_twice, 2))


def sharded() -> str:
    model = small_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return message_of(ValueError, STAC, model, vote=MajorityVote())


def test_sharded_trunk_is_refused() -> None:
    assert all("ignored_params" in message for message in run_ranks(sharded, 2))


def bereaved(constructed: bool) -> str:
    """A rank that ends leaves the others with an error, not with a wait for ever."""
    model = small_model()
    set_gradients(model, 0)
    optimizer = STAC(model, vote=MajorityVote()) if constructed else None
    if dist.get_rank() == 1:
        os._exit(1)
    if optimizer is None:
        optimizer = STAC(model, vote=MajorityVote())
    return message_of(RuntimeError, optimizer.step)


@pytest.mark.parametrize("constructed", [True, False], ids=["before-a-step", "before-construction"])
def test_rank_that_dies_is_an_error_on_the_others(constructed: bool) -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(bereaved, 3, constructed, timeout=20)
    lines = str(caught.value)
    assert "rank 1: died without a word" in lines
    assert "not done after" not in lines


@pytest.mark.parametrize(
    ("arguments", "other"),
    [
        ({"trunk_cautious": True}, "cautious"),
        ({"capturable": True}, "capturable"),
        ({"differentiable": True}, "differentiable"),
    ],
)
def test_flags_that_a_vote_excludes(tmp_path: Path, arguments: dict[str, Any], other: str) -> None:
    with process_group(tmp_path), pytest.raises(ValueError, match=f"vote and {other} exclude each other"):
        STAC(small_model(), vote=MajorityVote(), **arguments)


def test_vote_without_process_group_is_refused() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        STAC(small_model(), vote=MajorityVote())


@pytest.mark.parametrize("value", ["ternary", True, MajorityVote])
def test_vote_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="vote must be a MajorityVote or None"):
        STAC(small_model(), vote=value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"encoding": "unary"}, ValueError, "encoding must be one of .*'ternary', 'binary', 'int8'"),
        ({"encoding": 2}, (TypeError, ValueError), "encoding must be"),
        ({"process_group": "world"}, TypeError, "process_group must be a ProcessGroup or None, got str"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        MajorityVote(**arguments)


def test_groups_cannot_vote_by_themselves(tmp_path: Path) -> None:
    groups = [{"params": list(small_model().parameters()), "stac_role": "trunk", "vote": "binary"}]
    with pytest.raises(ValueError, match=r"group 0: vote is 'binary', .* it is None"):
        STAC(groups)
    with pytest.raises(ValueError, match=r"group 0: vote is 'binary', .* it is None"):
        Signum([{"params": groups[0]["params"], "vote": "binary"}])
    with process_group(tmp_path), pytest.raises(ValueError, match=r"it is 'ternary'"):
        STAC(groups, vote=MajorityVote())


def test_sum_of_more_votes_than_a_byte_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote, "MOST_INT8_VOTERS", 0)
    with process_group(tmp_path), pytest.raises(ValueError, match="sums at most 0 votes, got 1 ranks"):
        STAC(small_model(), vote=MajorityVote(encoding="int8"))


def test_released_gradients_and_votes_exclude_each_other(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = small_model()
        optimizer = STAC(model, vote=MajorityVote())
        with pytest.raises(RuntimeError, match="vote='ternary'"):
            optimizer.release_gradients(model)


def test_averages_are_those_of_a_vote_alone() -> None:
    with pytest.raises(RuntimeError, match="average_trunk_state is for optimizers with a vote"):
        STAC(small_model()).average_trunk_state()


def grouped() -> str:
    own = dist.new_group([0, 1])
    optimizer = STAC(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), vote=MajorityVote(own))
    assert copy.deepcopy(optimizer)._voters is not None
    return message_of(TypeError, pickle.dumps, optimizer)


def test_process_group_of_its_own_keeps_an_optimizer_from_being_pickled() -> None:
    assert all("cannot be pickled" in message for message in run_ranks(grouped, 2))


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "encoding": (
        {"vote": MajorityVote(encoding="binary")},
        "vote of group 0 (trunk) is 'ternary' on rank 0; 'binary'",
    ),
    "no-vote": ({"vote": None}, "vote of group 0 (trunk) is 'ternary' on rank 0; None on rank 1"),
    "layers": ({"last_n_layers": 2}, "parameter 2 is '1.weight' (trunk) on rank 0; '1.weight' (cap) on rank 1"),
    "momentum": ({"trunk_momentum": 0.5}, "momentum of group 0 (trunk) is 0.9 on rank 0; 0.5 on rank 1"),
}


def differing(kind: str) -> str:
    ddp = DistributedDataParallel(small_model())
    arguments, _ = DIFFERENCES[kind]
    return message_of(ValueError, STAC, ddp, **{"vote": MajorityVote(), **(arguments if dist.get_rank() else {})})


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_ranks_that_differ_are_told_what_differs(kind: str) -> None:
    for message in run_ranks(differing, 2, kind, timeout=20):
        assert DIFFERENCES[kind][1] in message
