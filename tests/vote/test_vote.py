"""Majority votes on real ranks: against the equations, by bits, for several ranks, encodings and kinds of state."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stac_optimizer import STAC, MajorityVote
from tests.ranks import run_ranks
from tests.runs import stepped
from tests.support import assert_same_bits, set_gradients, small_model, snapshot, wide_model

STEPS = 8
ENCODINGS = ("ternary", "binary", "int8")
Weights = dict[str, Tensor]

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay-maximize": {"weight_decay": 0.1, "maximize": True},
    "no-momentum": {"trunk_momentum": 0.0},
    "tensor-lr": {"lr": torch.tensor(1e-2)},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "bfloat16-state": {"trunk_state_dtype": "bfloat16"},
    "int8-state": {"trunk_state_dtype": "int8"},
}


def seed_of(step: int, rank: int) -> int:
    return 1000 * step + rank


def vote(encoding: str, arguments: dict[str, Any], steps: int = STEPS) -> Any:
    """What one rank has after some steps on gradients of its own."""
    model = wide_model()
    optimizer = STAC(model, **{"lr": 1e-2, **arguments}, vote=MajorityVote(encoding=encoding))
    for step in range(steps):
        set_gradients(model, seed_of(step, dist.get_rank()))
        optimizer.step()
    return snapshot(model, optimizer)


def voted_by_hand(ranks: int, encoding: str, lr: float, momentum: float, decay: float) -> Weights:
    """The trunk of the equations, one rank after the other."""
    models = [wide_model() for _ in range(ranks)]
    trunk = {name: param.detach() for name, param in models[0].named_parameters() if not name.startswith("3.")}
    averages = {name: [torch.zeros_like(param) for _ in range(ranks)] for name, param in trunk.items()}
    for step in range(STEPS):
        for rank, model in enumerate(models):
            set_gradients(model, seed_of(step, rank))
        for name, param in trunk.items():
            total = torch.zeros_like(param)
            for rank, model in enumerate(models):
                grad, average = model.get_parameter(name).grad, averages[name][rank]
                assert grad is not None
                average += (grad - average) * (1 - momentum)
                total += torch.where(average >= 0, 1.0, -1.0) if encoding == "binary" else average.sign()
            param.mul_(1 - lr * decay).sub_(total.sign() * lr)
    return trunk


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_trunk_moves_as_the_equations_say(ranks: int, encoding: str) -> None:
    arguments = {"trunk_lr": 1e-2, "weight_decay": 0.1, "trunk_momentum": 0.8}
    snapshots = run_ranks(vote, ranks, encoding, arguments)
    expected = voted_by_hand(ranks, encoding, 1e-2, 0.8, 0.1)
    for weights, _ in snapshots:
        assert_same_bits({name: weights[name] for name in expected}, expected)
        assert_same_bits(weights, snapshots[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_voter_steps_as_without_vote(kind: str) -> None:
    ((weights, saved),) = run_ranks(vote, 1, "ternary", KINDS[kind])
    model, optimizer = stepped(0, make=wide_model, **KINDS[kind])
    for step in range(STEPS):
        set_gradients(model, seed_of(step, 0))
        optimizer.step()
    expected_weights, expected = snapshot(model, optimizer)
    assert_same_bits(weights, expected_weights)
    assert_same_bits(saved["state"], expected["state"])


def recorded() -> list[Any]:
    """What votes left after steps as they stand, and after such that torch.compile recorded."""
    warnings.filterwarnings("ignore", "(Graph break|Dynamo)", UserWarning)
    left = []
    for is_recorded in (False, True):
        model = wide_model()
        model[0].weight = nn.Parameter(model[0].get_parameter("weight").contiguous(memory_format=torch.channels_last))
        optimizer = STAC(model, lr=1e-2, last_n_layers=0, trunk_state_dtype="int8", vote=MajorityVote())
        step = torch.compile(optimizer.step, backend="eager") if is_recorded else optimizer.step
        for seed in range(2):
            set_gradients(model, seed)
            step()
        left.append(snapshot(model, optimizer))
    return left


@pytest.mark.slow
def test_recorded_vote_steps_as_one_that_is_not() -> None:
    """Weights in channels last too, whose codes are worked on in copies."""
    ((plain, compiled),) = run_ranks(recorded, 1)
    assert_same_bits(compiled[0], plain[0])
    assert_same_bits(compiled[1]["state"], plain[1]["state"])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_the_same_weights_and_averages_of_their_own(kind: str) -> None:
    (weights, saved), (other_weights, other) = run_ranks(vote, 2, "ternary", KINDS[kind])
    assert_same_bits(weights, other_weights)
    if KINDS[kind].get("trunk_momentum", 0.9):
        assert not torch.equal(saved["state"][0]["exp_avg"], other["state"][0]["exp_avg"])
    last = max(saved["state"])
    assert_same_bits(saved["state"][last], other["state"][last])


def rounded(steps: int) -> Weights:
    model = small_model(dtype=torch.bfloat16)
    optimizer = STAC(model, lr=1e-4, stochastic_rounding=True, rounding_seed=3, vote=MajorityVote())
    for step in range(steps):
        set_gradients(model, seed_of(step, dist.get_rank()))
        optimizer.step()
    return model.state_dict()


def test_stochastic_rounding_keeps_ranks_together() -> None:
    first, *others = run_ranks(rounded, 3, 30)
    for weights in others:
        assert_same_bits(weights, first)
    assert any(
        not torch.equal(weight, small_model(dtype=torch.bfloat16).state_dict()[k]) for k, weight in first.items()
    )


def moved_by(values: list[list[float]], encoding: str) -> list[float]:
    """How far weights of 0 move in one step of lr 1 without momentum, from the gradients of this rank."""
    param = nn.Parameter(torch.zeros(len(values[0])))
    groups = [{"params": [("weight", param)], "stac_role": "trunk"}]
    optimizer = STAC(groups, lr=1.0, trunk_momentum=0.0, vote=MajorityVote(encoding=encoding))
    param.grad = torch.tensor(values[dist.get_rank()])
    optimizer.step()
    moves: list[float] = param.tolist()
    return moves


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ternary", [0.0, -1.0, -1.0, 0.0, 1.0]),
        ("int8", [0.0, -1.0, -1.0, 0.0, 1.0]),
        ("binary", [-1.0, -1.0, -1.0, 0.0, 0.0]),
    ],
)
def test_ties_stay_and_zeros_abstain_or_count_as_up(encoding: str, expected: list[float]) -> None:
    values = [[0.0, 0.0, 5.0, 2.0, 0.0], [0.0, 1e-30, 1.0, -1.0, -3.0]]
    assert run_ranks(moved_by, 2, values, encoding) == [expected] * 2


def test_majority_outvotes_a_large_gradient() -> None:
    assert run_ranks(moved_by, 3, [[-1e30], [1e-30], [1e-30]], "ternary") == [[-1.0]] * 3


def laid_out(encoding: str) -> list[Weights]:
    """Large and small weights in several layouts, on one rank with gradients in another layout than the weight's."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "image": randn(7, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        "transposed": randn(700, 500).t(),
        "sliced": randn(40, 80)[:, ::2],
        "scalar": randn(),
        "empty": randn(0, 3),
        "complex": torch.view_as_complex(randn(30, 2)),
    }
    params = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    groups = [{"params": list(params.items()), "stac_role": "trunk"}]
    optimizer = STAC(groups, lr=0.1, vote=MajorityVote(encoding=encoding))
    results = []
    for step in range(3):
        generator.manual_seed(seed_of(step, dist.get_rank()))
        for param in params.values():
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = grad if dist.get_rank() else torch.empty_like(param).copy_(grad)
        optimizer.step()
        results.append({name: param.detach().clone() for name, param in params.items()})
    return results


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_of_another_layout_on_one_rank_vote_on_the_same_weights(encoding: str) -> None:
    first, second = run_ranks(laid_out, 2, encoding)
    assert_same_bits(first, second)
    averages: dict[str, list[Tensor]] = {}
    for step, weights in enumerate(first):
        generators = [torch.Generator().manual_seed(seed_of(step, rank)) for rank in range(2)]
        for name, weight in weights.items():
            held = averages.setdefault(name, [torch.zeros(weight.shape, dtype=weight.dtype) for _ in range(2)])
            for average, generator in zip(held, generators, strict=True):
                grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                average.add_((grad - average) * (1 - 0.9))
            if step and weight.numel():
                views = [torch.view_as_real(t) if t.is_complex() else t for t in (*held, first[step - 1][name], weight)]
                signs = [torch.where(v >= 0, 1.0, -1.0) if encoding == "binary" else v.sign() for v in views[:2]]
                assert torch.equal(views[3], views[2] - (signs[0] + signs[1]).sign() * 0.1), name
