"""Every class of torch.optim that takes dense gradients, and lion-pytorch's, in either role: as the class alone."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LRScheduler

from stac_optimizer import STAC
from stac_optimizer.optim import Signum

from ..support import assert_same_bits, set_gradients, through_file
from .guests import CLASSES, LR, Function, completed, decaying, hosted, one_cycle, trajectory, two_layers

FLAGS: tuple[dict[str, Any], ...] = ({"foreach": True}, {"fused": True}, {"maximize": True}, {"lr": torch.tensor(0.02)})


def _class(function: Function) -> Any:
    return function.func if isinstance(function, partial) else function


def _takes(function: Function, flag: str) -> bool:
    return flag in inspect.signature(_class(function)).parameters


def _cases() -> list[Any]:
    cases = [pytest.param(function, id=name) for name, function in CLASSES.items()]
    return cases + [
        pytest.param(partial(function, **flags), id=f"{name}-{flag}")
        for name, function in CLASSES.items()
        for flags in FLAGS
        for flag in flags
        if _takes(function, flag)
    ]


@pytest.mark.parametrize("function", _cases())
@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_a_guest_is_its_class_alone_over_checkpoints_and_copies(role: str, function: Function) -> None:
    """One group each, a schedule, and a step in which a gradient is absent."""
    flags = {"maximize": getattr(function, "keywords", {}).get("maximize", False)}
    bias = _class(function) is not CLASSES.get("Muon")
    decay = 0.01 if _takes(function, "weight_decay") else 0.0
    alone = completed(function, lr=LR, weight_decay=decay)
    model = two_layers(bias=bias)
    trunk, cap = model[0].parameters(), model[2].parameters()
    if role == "trunk":
        optimizers = [alone(trunk), optim.AdamW(cap, lr=LR, weight_decay=decay, **flags)]
        schedule = one_cycle
    else:
        optimizers = [Signum(trunk, lr=0.75 * LR, weight_decay=decay, **flags), alone(cap)]
        schedule = decaying
    expected = trajectory(model, optimizers, [schedule(optimizer) for optimizer in optimizers])

    def build(model: nn.Module) -> STAC:
        given: Any = {f"{role}_optimizer": function}
        return STAC(model, lr=LR, weight_decay=decay, **given, **flags)

    for name, path in hosted(two_layers(bias=bias), build, schedule).items():
        assert_same_bits(path, expected, name)


@pytest.mark.parametrize("function", [*CLASSES.values(), partial(optim.Adam, fused=True)])
def test_state_bytes_before_a_step_are_those_after_it(function: Function) -> None:
    """In the table too."""
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=function)
    foreseen, table = optimizer.state_bytes(), str(optimizer.partition)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    assert optimizer.state_bytes() == foreseen
    assert str(optimizer.partition) == table
    layers = [*optimizer.partition.trunk_layers, *optimizer.partition.cap_layers]
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(layer.state_bytes or 0 for layer in layers) == sum(value.nbytes for value in held) == foreseen


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lion"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_unscales_for_guests_and_skips_their_step(name: str, fused: bool) -> None:
    """As for the class alone, also where the class would unscale by itself."""
    if fused and not _takes(CLASSES[name], "fused"):
        pytest.skip("the class has no fused path")
    flags: dict[str, Any] = {"fused": True} if fused else {}
    function = partial(CLASSES[name], **flags)

    def run(model: nn.Sequential, optimizers: list[optim.Optimizer]) -> list[torch.Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for seed in range(4):
            set_gradients(model, seed)
            for param in model.parameters():
                assert param.grad is not None
                param.grad.mul_(scaler.get_scale() if seed != 2 else torch.inf)
            scaler.scale(torch.zeros(()))
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        return list(model.parameters())

    model, other = two_layers(), two_layers()
    alone = completed(function, lr=LR, weight_decay=0.0)
    cap = optim.AdamW(model[2].parameters(), lr=LR, weight_decay=0.0)
    expected = run(model, [alone(model[0].parameters()), cap])
    assert_same_bits(run(other, [STAC(other, lr=LR, trunk_optimizer=function)]), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_a_nonfinite_gradient_changes_nothing_of_a_guest(name: str) -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=CLASSES[name], error_if_nonfinite=True)
    set_gradients(model, 0)
    optimizer.step()
    before = [param.detach().clone() for param in model.parameters()]
    state = {key: dict(value) for key, value in optimizer.state_dict()["state"].items()}
    bad = model.get_parameter("2.weight").grad
    assert bad is not None
    bad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"non-finite gradients: that of '2\.weight' \(cap\)"):
        optimizer.step()
    assert_same_bits(list(model.parameters()), before)
    assert_same_bits(optimizer.state_dict()["state"], state)


def _fit(model: nn.Module, optimizer: optim.Optimizer, seeds: range) -> list[Any]:
    """Steps of a closure; its losses and the parameters."""
    result: list[Any] = []
    for seed in seeds:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

        def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = (model(inputs) - 1).square().mean()
            loss.backward()
            return loss

        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]  # a tensor is a loss
        result.append([loss.detach(), *(param.detach().clone() for param in model.parameters())])
    return result


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_a_guest_that_owns_the_model_gets_the_closure_itself(role: str, search: str | None) -> None:
    function = partial(optim.LBFGS, lr=0.5, max_iter=4, line_search_fn=search)
    model = two_layers()
    expected = _fit(model, function(model.parameters()), range(5))

    def build(model: nn.Module) -> STAC:
        given: Any = {f"{role}_optimizer": function}
        return STAC(model, last_n_layers=0 if role == "trunk" else 9, **given)

    model, other = two_layers(), two_layers(1)
    optimizer, resumed = build(model), build(other)
    path = _fit(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    for some_model, some_optimizer in ((model, optimizer), (other, resumed), (copied, copied_optimizer)):
        assert_same_bits(path + _fit(some_model, some_optimizer, range(3, 5)), expected)


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop"])
def test_momentum_is_cycled_in_a_guest_that_owns_the_model(name: str) -> None:
    """Under the key of its class, by OneCycleLR as it is called most."""
    function = CLASSES[name]

    def cycling(optimizer: optim.Optimizer) -> LRScheduler:
        return optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=9)

    alone = completed(function, lr=LR, weight_decay=0.0)
    model, other = two_layers(), two_layers()
    optimizer = alone(model.parameters())
    expected = trajectory(model, [optimizer], [cycling(optimizer)])
    hosting = STAC(other, lr=LR, last_n_layers=0, trunk_optimizer=function)
    assert_same_bits(trajectory(other, [hosting], [cycling(hosting)]), expected)


def test_a_closure_that_a_guest_gets_is_checked_for_nonfinite_gradients() -> None:
    model = two_layers()
    optimizer = STAC(model, last_n_layers=0, trunk_optimizer=optim.LBFGS, error_if_nonfinite=True)
    _fit(model, optimizer, range(1))

    def closure() -> float:
        loss = model(torch.full((1, 4), torch.nan)).sum()
        loss.backward()
        return float(loss.detach())

    with pytest.raises(RuntimeError, match=r"'0\.weight' \(trunk\) holds NaN or infinity\. The parameters are where"):
        optimizer.step(closure)


class _Counting(optim.Optimizer):
    """Keeps one counter of all steps in its state, as MADGRAD does, and a named tuple of each parameter."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.state["k"] = torch.tensor([0])  # type: ignore[index]  # a name is as good a key

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        count: Any = self.state["k"]  # type: ignore[index]
        count += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(param.grad, alpha=group["lr"] * float(count))


def test_state_that_is_of_no_parameter_is_saved_and_copied() -> None:
    model = two_layers()
    expected = trajectory(
        model, [_Counting(model[0].parameters()), optim.AdamW(model[2].parameters(), 1e-3, weight_decay=0)]
    )
    paths = hosted(two_layers(), lambda model: STAC(model, trunk_optimizer=_Counting), _constant)
    for name, path in paths.items():
        assert_same_bits(path, expected, name)


def _constant(optimizer: optim.Optimizer) -> LRScheduler:
    return optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
