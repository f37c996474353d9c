"""Every class of ``stac_optimizer.optim``: beside every other one in the roles, resumed, copied, sharded, released."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, last_layers, optim
from stac_optimizer.optimizer import RuleOptimizer
from tests.ranks import run_ranks
from tests.sharded import Gradients, full, shard_each
from tests.support import assert_same_bits, seeded_loss, set_gradients, small_model, snapshot, through_file

# An alias is the same class.
CLASSES: dict[str, type[RuleOptimizer]] = {kind.__name__: kind for kind in (getattr(optim, n) for n in optim.__all__)}
each_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=list(CLASSES))
SETTINGS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def matrices() -> nn.Sequential:
    """Two matrices, large enough for stencils; no vectors, which Muon does not take."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))


def takeable(kind: type[RuleOptimizer], model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a class can update."""
    return [param for param in model.parameters() if kind.rule.takes(param)]


def stepped_alone(kind: type[RuleOptimizer], name: str) -> Tensor:
    """One matrix after three steps of the class."""
    model = matrices()
    weight = model.get_parameter(name)
    build: Callable[..., RuleOptimizer] = kind
    optimizer = build([weight], **SETTINGS)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    return weight.detach()


@each_class
def test_roles_of_any_two_classes_step_as_each_alone(kind: type[RuleOptimizer]) -> None:
    trunk = stepped_alone(kind, "0.weight")
    for other in CLASSES.values():
        model = matrices()
        roles: dict[str, Any] = {role: partial(c, **SETTINGS) for role, c in (("trunk", kind), ("cap", other))}
        optimizer = STAC(model, cap=last_layers(1), trunk_optimizer=roles["trunk"], cap_optimizer=roles["cap"])
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
        assert_same_bits(model.get_parameter("0.weight").detach(), trunk, f"beside {other.__name__}")
        assert_same_bits(
            model.get_parameter("2.weight").detach(), stepped_alone(other, "2.weight"), f"cap {other.__name__}"
        )


@each_class
def test_resumed_copied_and_pickled_runs_end_as_one_that_was_left_alone(kind: type[RuleOptimizer]) -> None:
    def built(model: nn.Module) -> RuleOptimizer:
        build: Callable[..., RuleOptimizer] = kind
        return build(takeable(kind, model), **SETTINGS)

    model = small_model()
    optimizer = built(model)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    other = small_model(1)
    resumed = built(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    runs = [(model, optimizer), (other, resumed), copy.deepcopy((model, optimizer))]
    runs.append(pickle.loads(pickle.dumps((model, optimizer))))
    for run_model, run in runs:
        for seed in range(3, 6):
            set_gradients(run_model, seed)
            run.step()
        assert_same_bits(snapshot(run_model, run), snapshot(model, optimizer))


@each_class
def test_differentiated_steps_give_gradients_of_lr_weights_and_their_gradients(kind: type[RuleOptimizer]) -> None:
    """Against differences of two runs, where signs are no matter: in double precision, by a direction."""
    build: Callable[..., RuleOptimizer] = kind
    torch.manual_seed(0)
    start, push = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))

    def ended(lr: Tensor, weight: Tensor, grad: Tensor, *, differentiable: bool) -> Tensor:
        moved = weight.clone() if differentiable else nn.Parameter(weight.detach().clone())
        optimizer = build([moved], lr=lr, weight_decay=0.1, differentiable=differentiable)
        for factor in (1.0, 0.5, -0.25):
            moved.grad = factor * grad
            optimizer.step()
        return (moved * moved).sum()

    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    leaves = lr, start.clone().requires_grad_(), push.clone().requires_grad_()
    gradients = torch.autograd.grad(ended(*leaves, differentiable=True), leaves)
    for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction, step = torch.randn_like(leaf), 1e-6
        ends = [
            ended(
                *(v.detach() + (sign * step * direction if at == place else 0) for at, v in enumerate(leaves)),
                differentiable=False,
            )
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]).item() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@each_class
def test_released_gradients_step_as_kept_ones(kind: type[RuleOptimizer]) -> None:
    build: Callable[..., RuleOptimizer] = kind
    model, twin = small_model(), small_model()
    optimizer, other = build(takeable(kind, model), **SETTINGS), build(takeable(kind, twin), **SETTINGS)
    with optimizer.release_gradients(model):
        for seed in range(3):
            seeded_loss(model, seed).backward()
            optimizer.step()
            model.zero_grad()
    for seed in range(3):
        twin.zero_grad()
        seeded_loss(twin, seed).backward()
        other.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-6, atol=1e-7)


def stepped(kind: type[RuleOptimizer], model: nn.Module) -> dict[str, Tensor]:
    """Whole weights after three steps."""
    build: Callable[..., RuleOptimizer] = kind
    gradients, optimizer = Gradients(model), build(takeable(kind, model), **SETTINGS)
    for seed in range(3):
        gradients.set(seed)
        optimizer.step()
    return {name: full(param.detach()) for name, param in model.named_parameters()}


def assert_shards_step_as_whole() -> None:
    """On one rank, for every class."""
    for kind in CLASSES.values():
        model = small_model()
        shard_each(model)
        # Norms are sums over ranks, in another order.
        torch.testing.assert_close(stepped(kind, model), stepped(kind, small_model()), rtol=1e-5, atol=1e-6)


def test_shards_step_as_whole_ones() -> None:
    run_ranks(assert_shards_step_as_whole, 2, timeout=120.0)


SWITCHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LARS": ({"momentum": 0.0}, {"momentum": 0.9}),
    "LRMSProp": ({"momentum": 0.0}, {"momentum": 0.9}),
    "TAdam": ({"amsgrad": False}, {"amsgrad": True}),
    "AdaBelief": ({"amsgrad": False}, {"amsgrad": True}),
    "AdEMAMix": ({"betas": (0.0, 0.99, 0.999)}, {"betas": (0.9, 0.99, 0.999)}),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_run_resumes_where_some_have_not_stepped_since_a_state_was_switched_on(name: str) -> None:
    before, after = SWITCHED[name]

    def built(values: dict[str, Any]) -> tuple[nn.Module, RuleOptimizer]:
        build: Callable[..., RuleOptimizer] = CLASSES[name]
        model = small_model()
        return model, build(model.named_parameters(), **SETTINGS, **values)

    model, optimizer = built(before)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.param_groups[0].update(after)
    set_gradients(model, 1, skip={"0.weight"})
    optimizer.step()
    other, resumed = built(after)
    weights, saved = through_file((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for run_model, run in ((model, optimizer), (other, resumed)):
        set_gradients(run_model, 2)
        run.step()
    assert_same_bits(snapshot(other, resumed), snapshot(model, optimizer))
