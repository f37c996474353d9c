"""Gradient release: the ordinary trajectory by bits, with one gradient alive at a time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import checkpoint

from stac_optimizer import STAC
from tests.runs import Run, assert_equal_runs, stepped, train, twins
from tests.support import (
    assert_same_bits,
    names_of_gradients,
    parameter_state,
    seeded_loss,
    snapshot,
    through_file,
)

ARGUMENTS = [
    pytest.param({}, id="default"),
    pytest.param({"trunk_momentum": 0.0}, id="momentum-0"),
    pytest.param({"trunk_cautious": True}, id="cautious"),
    pytest.param({"weight_decay": 0.1, "amsgrad": True, "maximize": True}, id="decay-amsgrad-maximize"),
    pytest.param({"last_n_layers": 0}, id="all-trunk"),
    pytest.param({"last_n_layers": 9}, id="all-cap"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": True}, id="fused"),
    pytest.param({"lr": torch.tensor(1e-2)}, id="tensor-lr"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_released_run_equals_the_ordinary_one_and_goes_on_as_it(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    released, ordinary = twins(dtype, **arguments)
    with released[1].release_gradients(released[0]):
        for seed in range(6):
            for run in (released, ordinary):
                train(run, [seed])
            assert_same_bits(snapshot(*released), snapshot(*ordinary))
    for run in (released, ordinary):
        train(run, range(6, 9))
    assert_equal_runs(released, ordinary)


def test_backward_alone_updates_and_frees_and_step_finds_nothing_to_do() -> None:
    released, ordinary = twins()
    with released[1].release_gradients(released[0]):
        seeded_loss(released[0], 0).backward()
        assert names_of_gradients(released[0]) == []
        after_backward = snapshot(*released)
        assert released[1].step() is None
        released[1].zero_grad()
        released[1].zero_grad(set_to_none=False)
        assert_same_bits(snapshot(*released), after_backward)
    train(ordinary, range(1))
    assert_same_bits(after_backward, snapshot(*ordinary))


class Tied(nn.Module):
    """Weights used twice, and activations computed anew in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(2):
            inputs = checkpoint(lambda x: self.norm(self.shared(x)).tanh(), inputs, use_reentrant=False)
        head: Tensor = self.head(inputs @ self.shared.weight)
        return head


def test_shared_and_recomputed_weights_are_updated_once_their_gradient_is_whole() -> None:
    released, ordinary = ((model, STAC(model, lr=1e-2)) for model in (Tied(), Tied()))
    with released[1].release_gradients(released[0]):
        for run in (released, ordinary):
            train(run, range(5))
    assert_equal_runs(released, ordinary)


def test_absent_gradient_leaves_the_same_state_as_in_the_ordinary_loop() -> None:
    def of_the_first_layer(model: nn.Module, seed: int) -> Tensor:
        loss: Tensor = model.get_submodule("0")(torch.full((2, 6), 1.0 + seed)).square().mean()
        return loss

    released, ordinary = twins(weight_decay=0.1)
    with released[1].release_gradients(released[0]):
        for run in (released, ordinary):
            train(run, range(2), of_the_first_layer)
    assert parameter_state(released[1], released[0], "3.bias").keys() == {"step"}
    assert_equal_runs(released, ordinary)


def test_parameter_frozen_at_the_release_is_updated_once_it_thaws() -> None:
    released, ordinary = twins()
    for model, _ in (released, ordinary):
        model.get_parameter("0.weight").requires_grad_(False)
    with released[1].release_gradients(released[0]):
        assert not released[0].get_parameter("0.weight").requires_grad
        for run in (released, ordinary):
            train(run, range(2))
            run[0].get_parameter("0.weight").requires_grad_(True)
            run[0].get_parameter("3.bias").requires_grad_(False)
            train(run, range(2, 4))
            run[0].get_parameter("3.bias").requires_grad_(True)
        assert parameter_state(released[1], released[0], "0.weight")["step"] == 2
    assert_equal_runs(released, ordinary)


def test_gradient_set_by_hand_is_applied_by_step() -> None:
    released, ordinary = twins()
    with released[1].release_gradients(released[0]):
        for model, optimizer in (released, ordinary):
            model.get_parameter("1.bias").grad = torch.ones(5)
            optimizer.step()
    assert parameter_state(released[1], released[0], "1.bias")["step"] == 1
    released[1].zero_grad()
    assert_equal_runs(released, ordinary)


def test_first_step_at_lr_zero_counts_where_the_first_gradient_is_zero() -> None:
    def first_gradient_zero(model: nn.Module, seed: int) -> Tensor:
        loss: Tensor = 0 * seeded_loss(model, seed) + model.get_submodule("0")(torch.ones(2, 6)).square().mean()
        return loss

    released, ordinary = twins(lr=0.0)
    with released[1].release_gradients(released[0]):
        for run in (released, ordinary):
            train(run, range(2), first_gradient_zero)
    assert parameter_state(released[1], released[0], "3.bias")["step"] == 2
    assert_equal_runs(released, ordinary)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_scheduler_moves_the_rates_and_does_not_warn(scheduler_first: bool) -> None:
    def scheduler(optimizer: STAC) -> OneCycleLR:
        return OneCycleLR(optimizer, [0.1, 0.2], 6)

    released, ordinary = twins()
    schedulers = [scheduler(run[1]) for run in (ordinary, released)[: 1 + scheduler_first]]
    with released[1].release_gradients(released[0]):
        if not scheduler_first:
            schedulers.append(scheduler(released[1]))
        for seed in range(5):
            for run in (released, ordinary):
                train(run, [seed])
            for each in schedulers:
                each.step()
            assert_same_bits(snapshot(*released), snapshot(*ordinary))
    assert released[1].param_groups[1]["lr"] not in (0.2, 0.01)


def test_checkpoint_is_saved_and_loaded_during_release() -> None:
    released, ordinary = twins(weight_decay=0.1)
    resumed = stepped(2, seed=1, lr=0.5)
    resumed[1].zero_grad()
    with released[1].release_gradients(released[0]), resumed[1].release_gradients(resumed[0]):
        for run in (released, ordinary):
            train(run, range(3))
        seeded_loss(resumed[0], 0).backward()
        resumed[1].load_state_dict(through_file(released[1].state_dict()))
        resumed[0].load_state_dict(released[0].state_dict())
        resumed[1].step()
        for run in (released, ordinary, resumed):
            train(run, range(3, 6))
        assert_same_bits(snapshot(*resumed), snapshot(*ordinary))
    assert_equal_runs(released, resumed)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["deepcopy", "pickle"]
)
def test_copy_made_during_release_is_without_it(copied: Callable[[Run], Run]) -> None:
    released, _ = twins()
    with released[1].release_gradients(released[0]):
        train(released, range(2))
        model, optimizer = copied(released)
        before = snapshot(model, optimizer)
        seeded_loss(model, 2).backward()
        assert len(names_of_gradients(model)) == 6
        assert_same_bits(snapshot(model, optimizer), before)
        optimizer.step()
        train(released, range(2, 3))
    optimizer.zero_grad()
    assert_equal_runs(released, (model, optimizer))


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "stepped"])
def test_distributed_state_dict_makes_its_state_during_release(steps: int) -> None:
    released, ordinary = twins()
    with released[1].release_gradients(released[0]):
        for run in (released, ordinary):
            train(run, range(steps))
        saved = get_optimizer_state_dict(*released)
        if not steps:
            assert_same_bits(released[0].state_dict(), ordinary[0].state_dict())
            assert all(state["step"] == 0 and "exp_avg" in state for state in released[1].state.values())
        fresh = stepped(0, lr=0.5)
        fresh[0].load_state_dict(released[0].state_dict())
        with fresh[1].release_gradients(fresh[0]):
            set_optimizer_state_dict(*fresh, saved)
            for run in (released, ordinary, fresh):
                train(run, range(2, 5))
    assert_same_bits(snapshot(*fresh), snapshot(*ordinary))
    assert_equal_runs(released, ordinary)


def test_handle_removes_itself_once_and_no_other() -> None:
    (model, optimizer), _ = twins()
    first = optimizer.release_gradients(model)
    first.remove()
    second = optimizer.release_gradients(model)
    first.remove()
    train((model, optimizer), range(1))
    seeded_loss(model, 1).backward()
    assert names_of_gradients(model) == []
    second.remove()
    second.remove()
    seeded_loss(model, 2).backward()
    assert len(names_of_gradients(model)) == 6


def test_context_ends_the_release_where_an_error_leaves_it() -> None:
    (model, optimizer), _ = twins()
    with pytest.raises(ZeroDivisionError), optimizer.release_gradients(model):
        raise ZeroDivisionError
    seeded_loss(model, 0).backward()
    assert len(names_of_gradients(model)) == 6


def test_compiled_step_knows_of_the_release() -> None:
    released, ordinary = twins()
    step = torch.compile(released[1].step, backend="eager")
    with released[1].release_gradients(released[0]):
        for seed in range(3):
            seeded_loss(released[0], seed).backward()
            step()
        train(ordinary, range(3))
        assert_same_bits(snapshot(*released), snapshot(*ordinary))


@pytest.mark.parametrize("release", [False, True], ids=["ordinary", "released"])
def test_one_gradient_at_a_time_is_alive_in_backward(release: bool) -> None:
    """Counted as gradients in place, and as memory that is still held."""
    (model, optimizer), _ = twins()
    memory: list[StorageWeakRef] = []
    alive: list[tuple[int, int]] = []

    def count(param: Tensor) -> None:
        assert param.grad is not None
        memory.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append((len(names_of_gradients(model)), sum(not weak.expired() for weak in memory)))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    if release:
        optimizer.release_gradients(model)
    seeded_loss(model, 0).backward()
    assert alive == ([(1, 1)] * 6 if release else [(number, number) for number in range(1, 7)])
