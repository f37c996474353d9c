"""Voting as part of training: DistributedDataParallel, accumulation, clipping, checkpoints, traffic, and refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC, MajorityVote
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.support import assert_same_bits, seeded_loss, set_gradients, small_model, snapshot, wide_model

Weights = dict[str, Tensor]


def voting(model: nn.Module, **arguments: Any) -> STAC:
    return STAC(model, **{"lr": 1e-2, "weight_decay": 0.1, "vote": MajorityVote(), **arguments})


def seed_of(step: int, part: int = 0) -> int:
    return 1000 * step + 10 * part + dist.get_rank()


def train(strategy: str, steps: int) -> Weights:
    """Weights after training on batches of this rank's own, each in two parts."""
    model = small_model()
    ddp = DistributedDataParallel(model)
    optimizer = voting(model if strategy.startswith("plain") else ddp)
    for step in range(steps):
        optimizer.zero_grad()
        if strategy == "ddp":
            (seeded_loss(ddp, seed_of(step)) + seeded_loss(ddp, seed_of(step, 1))).div(2).backward()
        elif strategy == "ddp-accumulating":
            with ddp.no_sync():
                seeded_loss(ddp, seed_of(step)).div(2).backward()
            seeded_loss(ddp, seed_of(step, 1)).div(2).backward()
        else:  # the optimizer averages the cap
            with ddp.no_sync():
                for part in range(2):
                    seeded_loss(ddp, seed_of(step, part)).div(2).backward()
        nn.utils.clip_grad_norm_(optimizer.partition.trunk_parameters, 0.1)
        if strategy.startswith("ddp") and strategy != "ddp-no-sync":
            nn.utils.clip_grad_norm_(optimizer.partition.cap_parameters, 10.0)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", ["ddp", "ddp-accumulating", "ddp-no-sync", "plain-no-sync"])
def test_ranks_stay_bit_identical_over_200_steps(strategy: str, ranks: int) -> None:
    first, *others = run_ranks(train, ranks, strategy, 200)
    for weights in others:
        assert_same_bits(weights, first)
    assert not any(torch.equal(weight, small_model().state_dict()[name]) for name, weight in first.items())


def test_who_averages_the_cap_makes_no_difference() -> None:
    """Of two ranks, whose sums have one order."""
    expected = run_ranks(train, 2, "ddp-accumulating", 10)[0]
    for strategy in ("ddp-no-sync", "plain-no-sync"):
        assert_same_bits(run_ranks(train, 2, strategy, 10)[0], expected)


def wrapped_inside() -> Weights:
    """A trunk wrapped by itself within the model, and a trunk group whose rule is not a vote's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        DistributedDataParallel(nn.Linear(6, 5)), DistributedDataParallel(nn.Linear(5, 4)), nn.Linear(4, 3)
    )
    optimizer = voting(model)
    adamw = small_model()
    groups = [
        {"params": list(adamw[0].named_parameters("0")), "stac_role": "trunk"},
        {"params": list(adamw[1].named_parameters("1")), "stac_role": "trunk", "rule": "adamw"},
        {"params": list(adamw[3].named_parameters("3")), "stac_role": "cap"},
    ]
    explicit = STAC(groups, lr=1e-2, vote=MajorityVote())
    for step in range(4):
        for each, held in ((model, optimizer), (adamw, explicit)):
            held.zero_grad()
            seeded_loss(each, seed_of(step)).backward()
            held.step()
    return {**model.state_dict(), **{f"adamw.{name}": weight for name, weight in adamw.state_dict().items()}}


def test_parts_that_are_wrapped_by_themselves_and_rules_that_do_not_vote() -> None:
    first, second = run_ranks(wrapped_inside, 2)
    assert_same_bits(first, second)


class Branches(nn.Module):
    """Each rank uses a branch of its own; no rank the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 5) for _ in range(4))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = self.branches[dist.get_rank()]
        result: Tensor = self.head(chosen(inputs))
        return result


def unused(wrapped: bool) -> tuple[Weights, list[bool]]:
    model = Branches()
    used = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = voting(used)
    for step in range(5):
        optimizer.zero_grad()
        seeded_loss(used, seed_of(step)).backward()
        optimizer.step()
    return model.state_dict(), [branch.weight.grad is None for branch in model.branches]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
def test_parameters_unused_on_some_ranks_move_and_those_unused_on_all_stay(wrapped: bool) -> None:
    (first, absent), *others = run_ranks(unused, 3, wrapped)
    assert absent == [False, False, False, True]
    for weights, _ in others:
        assert_same_bits(weights, first)
    before = Branches().state_dict()
    assert [torch.equal(first[name], before[name]) for name in first if name.endswith("weight")] == [
        False,
        False,
        False,
        True,
        False,
    ]


def drift(encoding: str) -> float:
    """How far a weight moves whose gradients are all zero."""
    model = small_model()
    optimizer = voting(model, weight_decay=0.0, vote=MajorityVote(encoding=encoding))
    weight = model.get_parameter("0.weight").detach()
    before = weight.clone()
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    return float((weight - before).abs().max())


def test_only_binary_votes_drift_without_gradient() -> None:
    assert run_ranks(drift, 2, "ternary") == [0.0, 0.0]
    assert min(run_ranks(drift, 2, "binary")) > 0.03


def sharded_cap() -> tuple[Weights, bool]:
    """FSDP2 shards and averages the cap; the trunk, which it ignores, is voted on."""
    model = small_model()
    trunk = {param for name, param in model.named_parameters() if not name.startswith("3.")}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=trunk)
    optimizer = voting(model)
    for step in range(5):
        optimizer.zero_grad()
        seeded_loss(model, seed_of(step)).backward()
        optimizer.step()
    held: Any = model[3].weight
    return {name: weight for name, weight in model.state_dict().items() if name[0] in "01"}, hasattr(held, "to_local")


@pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters, reason="this torch shards all parameters or none"
)
def test_fsdp2_with_the_trunk_ignored() -> None:
    (first, is_sharded), (second, _) = run_ranks(sharded_cap, 2)
    assert is_sharded
    assert_same_bits(first, second)


# Checkpoints


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
        assert voter.param_groups[0]["trunk_vote"] == "ternary"
        plain.load_state_dict(voter.state_dict())
    assert plain.param_groups[0]["trunk_vote"] is None


# Traffic


def received() -> int:
    """Bytes that came over the loopback interface so far."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise AssertionError("no loopback interface")


def traffic(action: Callable[[], object]) -> int:
    """Bytes that all ranks receive meanwhile: none begins before all have looked, or goes on before."""
    dist.barrier()
    before = received()
    dist.barrier()
    action()
    dist.barrier()
    count = received() - before
    dist.barrier()
    return count


NUMEL = 1 << 20


def bytes_of(encoding: str) -> tuple[int, int]:
    """What all ranks receive for one all-reduce in float32, and for one step by vote."""
    param = nn.Parameter(torch.zeros(NUMEL))
    groups = [{"params": [("weight", param)], "stac_role": "trunk"}]
    optimizer = STAC(groups, vote=MajorityVote(encoding=encoding))
    param.grad = torch.randn(NUMEL)
    optimizer.step()
    return traffic(lambda: dist.all_reduce(torch.zeros(NUMEL))), traffic(optimizer.step)


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="counts bytes by Linux's /proc/net/dev")
@pytest.mark.parametrize(
    ("encoding", "ranks", "share"),
    [("ternary", 2, 1 / 16), ("binary", 2, 1 / 32), ("int8", 2, 1 / 4), ("ternary", 4, 1 / 16), ("binary", 4, 3 / 64)],
)
def test_share_of_the_traffic_of_averaging(encoding: str, ranks: int, share: float) -> None:
    """Other processes may send over loopback meanwhile: the least of several counts is meant."""
    counts = [run_ranks(bytes_of, ranks, encoding) for _ in range(3)]
    averaging, votes = (min(one[which] for count in counts for one in count) for which in (0, 1))
    assert averaging >= 2 * (ranks - 1) * 4 * NUMEL
    assert votes / averaging == pytest.approx(share, rel=0.05)
