"""Every class of torch.optim that takes dense gradients, and lion-pytorch's, in either role: as the class alone."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LRScheduler

from stac_optimizer import STAC, biases, named
from stac_optimizer.optim import Signum

from ..support import assert_same_bits, set_gradients, through_file
from .guests import LR, Function, completed, decaying, hosted, one_cycle, trajectory, two_layers

CLASSES: dict[str, Function] = {
    "Adadelta": optim.Adadelta,
    "Adafactor": optim.Adafactor,
    "Adagrad": partial(optim.Adagrad, initial_accumulator_value=0.1),
    "Adam": partial(optim.Adam, amsgrad=True),
    "AdamW": partial(optim.AdamW, weight_decay=0.1),
    "Adamax": optim.Adamax,
    "ASGD": partial(optim.ASGD, lr=0.01, t0=2),
    "NAdam": partial(optim.NAdam, momentum_decay=4e-3),
    "RAdam": optim.RAdam,
    "RMSprop": partial(optim.RMSprop, momentum=0.9, centered=True),
    "Rprop": optim.Rprop,
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Lion": partial(lion_pytorch.Lion, betas=(0.9, 0.98)),
}
if hasattr(optim, "Muon"):  # since torch 2.9
    CLASSES["Muon"] = optim.Muon
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


@pytest.mark.parametrize("name", CLASSES)
def test_state_bytes_before_a_step_are_those_after_it(name: str) -> None:
    """In the table too."""
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=CLASSES[name])
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


@pytest.mark.parametrize("name", CLASSES)
def test_a_group_is_added_to_a_guest(name: str) -> None:
    """It begins with STAC's lr where the function has written none, and its checkpoint loads into the like."""
    function = CLASSES[name]

    def build(model: nn.Sequential) -> STAC:
        optimizer = STAC(model[:3], lr=LR, last_n_layers=0, trunk_optimizer=function)
        named = [(f"3.{name}", param) for name, param in model[3].named_parameters() if optimizer_takes(param)]
        optimizer.add_param_group({"params": named, "stac_role": "trunk"})
        return optimizer

    def optimizer_takes(param: torch.Tensor) -> bool:
        return param.ndim == 2 or name != "Muon"

    def model_of(seed: int) -> nn.Sequential:
        return nn.Sequential(*two_layers(seed, bias=name != "Muon"), nn.Linear(3, 2))

    model = model_of(0)
    alone = completed(function, lr=LR, weight_decay=0.0)([*model[:3].parameters()])
    alone.add_param_group({"params": [p for p in model[3].parameters() if optimizer_takes(p)], **_shared_of(alone)})
    expected = trajectory(model, [alone])
    model = model_of(0)
    optimizer = build(model)
    assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk_1"]
    path = trajectory(model, [optimizer], seeds=range(3))
    other = model_of(1)
    other.load_state_dict(model.state_dict())
    resumed = build(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_bits(path + trajectory(other, [resumed], seeds=range(3, 6)), expected)


def _shared_of(alone: optim.Optimizer) -> dict[str, Any]:
    return {key: alone.param_groups[0][key] for key in ("lr", "weight_decay") if key in alone.param_groups[0]}


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_vectors_go_to_the_cap_where_muon_has_the_trunk() -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=optim.Muon)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight"],
        ["0.bias", "2.weight", "2.bias"],
    ]
    assert "'0.bias'" in str(optimizer.partition).splitlines()[-1]
    with pytest.raises(ValueError, match=r"'new' \(trunk\) has 1 dimensions, and torch\.Muon takes matrices alone"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))], "stac_role": "trunk"})


def test_overrides_reach_a_guest() -> None:
    """Keys of its class, and a ratio of what the function has written."""
    overrides = [(biases(), {"weight_decay": 0.0, "momentum": 0.5}), (named("2"), {"lr_ratio": 0.1})]
    changed = {"weight_decay": 0.0, "momentum": 0.5}
    model = two_layers()
    groups: list[dict[str, Any]] = [
        {"params": [model[0].weight]},
        {"params": [model[0].bias], **changed},
        {"params": [model[2].weight], "lr": 0.2 * 0.1},
        {"params": [model[2].bias], **changed, "lr": 0.2 * 0.1},
    ]
    expected = trajectory(model, [optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=0.1)])
    function = partial(optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.1)
    other = two_layers()
    optimizer = STAC(other, last_n_layers=0, trunk_optimizer=function, overrides=overrides)
    assert_same_bits(trajectory(other, [optimizer]), expected)
    with pytest.raises(ValueError, match="'dampenin'; did you mean 'dampening'"):
        STAC(two_layers(), trunk_optimizer=function, overrides=[(named("0"), {"dampenin": 0.1})])
    with pytest.raises(ValueError, match="'eps' is no hyper-parameter of SGD, which has dampening,"):
        STAC(two_layers(), trunk_optimizer=function, overrides=[(named("0"), {"eps": 0.1})])


def _rates(**given: Any) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in STAC(two_layers(), **given).param_groups]


def test_what_is_not_written_comes_from_the_arguments() -> None:
    adam: Any = optim.Adam
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=adam) == [(0.1, 0.2), (0.1, 0.2)]
    given = {"trunk_lr": 0.3, "trunk_weight_decay": 0.4}
    assert _rates(lr=0.1, trunk_optimizer=adam, **given) == [(0.3, 0.4), (0.1, 0.0)]
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=partial(adam, lr=0.5)) == [(0.5, 0.2), (0.1, 0.2)]
    written = lambda params: adam(params, lr=0.7)  # noqa: E731
    assert _rates(lr=0.1, weight_decay=0.2, trunk_optimizer=written) == [(0.7, 0.0), (0.1, 0.2)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"trunk_lr": 0.1, "trunk_optimizer": partial(optim.Adam, lr=0.2)}, ValueError, "trunk_lr is given beside"),
        (
            {"trunk_lr": 0.1, "trunk_optimizer": lambda params: optim.Adam(list(params))},
            ValueError,
            "does not take lr from here",
        ),
        (
            {"cap_weight_decay": 0.1, "cap_optimizer": optim.Rprop},
            ValueError,
            r"\(Rprop\).* does not take weight_decay",
        ),
        ({"trunk_optimizer": list}, TypeError, "must return an optimizer, got list"),
        ({"trunk_optimizer": optim.Adam([torch.ones(1)])}, TypeError, "must be a function of parameters"),
        ({"trunk_optimizer": lambda _: optim.SGD([torch.ones(1)])}, ValueError, "holds other parameters"),
        ({"trunk_optimizer": partial(optim.SGD, maximize=True)}, ValueError, "the roles disagree on maximize"),
        ({"trunk_optimizer": optim.SGD, "last_n_layers": 0, "maximize": True}, ValueError, "disagree on maximize"),
        ({"trunk_momentum": 0.5, "trunk_optimizer": optim.SGD}, ValueError, "trunk_momentum is for the trunk's own"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        STAC(two_layers(), **given)


def test_gradients_are_not_released_for_a_guest() -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=optim.Adam)
    with pytest.raises(
        RuntimeError, match=r"torch\.Adam \(trunk\) is a foreign optimizer, which may need all gradients"
    ):
        optimizer.release_gradients(model)


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
