"""torchzero's chains in a role: state in objects of their own, groups that are no dicts. As torchzero alone."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from stac_optimizer import STAC, biases

from ..support import assert_same_bits, set_gradients, through_file
from .guests import LR, decaying, hosted, one_cycle, trajectory, two_layers

tz = pytest.importorskip("torchzero", reason="torchzero is of the extra 'bench'")
m: Any = tz.m


def _adam() -> list[Any]:
    return [m.Adam(), m.LR(0.1)]


def _lion() -> list[Any]:
    return [m.Lion(), m.LR(0.01)]


def _soap() -> list[Any]:
    return [m.SOAP(), m.LR(0.1)]


def _shampoo() -> list[Any]:
    return [m.Shampoo(), m.LR(0.1)]


def _clipped() -> list[Any]:
    return [m.ClipNorm(1.0), m.Adam(), m.WeightDecay(0.1), m.LR(0.1)]


def _two_averages() -> list[Any]:
    return [m.EMA(0.5), m.EMA(0.9), m.LR(0.1)]


def _sam() -> list[Any]:
    return [m.SAM(), m.Adam(), m.LR(0.1)]


def _searched() -> list[Any]:
    return [m.Adam(), m.Backtracking()]


def _lbfgs() -> list[Any]:
    return [m.LBFGS(), m.StrongWolfe()]


def _chain(modules: Any, groups: Any) -> optim.Optimizer:
    optimizer: optim.Optimizer = tz.Optimizer(groups, *modules())
    return optimizer


CHAINS = [_adam, _lion, _soap, _shampoo, _clipped, _two_averages]


@pytest.mark.parametrize("modules", CHAINS)
@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_a_chain_is_torchzero_alone_over_checkpoints_and_copies(role: str, modules: Any) -> None:
    """A chain takes absent gradients for zeros; STAC's own rules skip them."""
    function = partial(_chain, modules)
    model = two_layers()
    trunk, cap = list(model[0].parameters()), list(model[2].parameters())
    schedule = one_cycle if role == "trunk" else decaying
    native = (
        optim.AdamW(cap, lr=LR, weight_decay=0.0) if role == "trunk" else STAC(model[0], LR * 0.75, last_n_layers=0)
    )
    optimizers = [function([{"params": trunk if role == "trunk" else cap}]), native]
    expected = trajectory(model, optimizers, [schedule(optimizer) for optimizer in optimizers])

    def build(model: nn.Module) -> STAC:
        given: Any = {f"{role}_optimizer": function}
        return STAC(model, lr=LR, **given)

    for name, path in hosted(two_layers(), build, schedule).items():
        assert_same_bits(path, expected, name)


def _fit(model: nn.Module, optimizer: Any, seeds: range) -> list[Any]:
    result: list[Any] = []
    for seed in seeds:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

        def closure(backward: bool = True, inputs: Tensor = inputs) -> Tensor:
            with torch.enable_grad():
                loss: Tensor = (model(inputs) - 1).square().mean()
            if backward:
                optimizer.zero_grad()
                loss.backward()
            return loss

        loss = optimizer.step(closure)
        result.append([loss.detach(), *(param.detach().clone() for param in model.parameters())])
    return result


@pytest.mark.parametrize("modules", [_sam, _searched, _lbfgs])
def test_a_chain_that_owns_the_model_gets_the_closure_itself(modules: Any) -> None:
    """Closures that are called without backward, too; a chain without an LR shows none."""
    function = partial(_chain, modules)
    model = two_layers()
    expected = _fit(model, function(model.parameters()), range(5))

    def build(model: nn.Module) -> STAC:
        return STAC(model, last_n_layers=0, trunk_optimizer=function)

    model, other = two_layers(), two_layers(1)
    optimizer, resumed = build(model), build(other)
    assert ("lr" in optimizer.param_groups[0]) == (modules is _sam)
    path = _fit(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    runs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for some_model, some_optimizer in [*runs, (model, optimizer), (other, resumed)]:
        assert_same_bits(path + _fit(some_model, some_optimizer, range(3, 5)), expected)


def test_what_changes_in_groups_reaches_the_chain_and_a_rollback_takes_it_back() -> None:
    """The two averages of the chain keep their own momenta as long as nobody writes one for both."""
    model = two_layers()
    optimizer = STAC(model, last_n_layers=0, trunk_optimizer=partial(_chain, _two_averages))
    begin = through_file([model.state_dict(), optimizer.state_dict()])
    expected = trajectory(model, [optimizer])
    group = optimizer.param_groups[0]
    group["momentum"], group["lr"] = 0.1, 0.3
    trajectory(model, [optimizer])
    written = [module.settings[group["params"][0]]["momentum"] for module in _modules(optimizer)[:2]]
    assert written == [0.1, 0.1]
    model.load_state_dict(begin[0])
    optimizer.load_state_dict(begin[1])
    assert_same_bits(trajectory(model, [optimizer]), expected)


def _modules(optimizer: STAC) -> Any:
    guest: Any = optimizer._guests["trunk"].optimizer
    return guest.modules


def test_overrides_and_added_groups_reach_a_chain() -> None:
    function = partial(_chain, _clipped)
    overrides = [(biases(), {"weight_decay": 0.0, "lr_ratio": 0.5})]

    def build(model: nn.Sequential) -> STAC:
        layers = [(f"0.{name}", param) for name, param in model[0].named_parameters()]
        optimizer = STAC(layers, last_n_layers=0, trunk_optimizer=function, overrides=overrides)
        named = [(f"2.{name}", param) for name, param in model[2].named_parameters()]
        optimizer.add_param_group({"params": named, "stac_role": "trunk", "lr": 0.02})
        return optimizer

    model = two_layers()
    alone = function(
        [
            {"params": [model[0].weight]},
            {"params": [model[0].bias], "weight_decay": 0.0, "lr": 0.05},
            {"params": [*model[2].parameters()], "lr": 0.02},
        ]
    )
    expected = trajectory(model, [alone], [decaying(alone)])
    for name, path in hosted(two_layers(), build, decaying).items():  # type: ignore[arg-type]  # the very model
        assert_same_bits(path, expected, name)


@pytest.mark.parametrize("modules", CHAINS)
def test_state_bytes_before_a_step_are_those_after_it(modules: Any) -> None:
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=partial(_chain, modules))
    foreseen, table = optimizer.state_bytes(), str(optimizer.partition)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    assert optimizer.state_bytes() == foreseen > 2 * 18 * 4
    assert str(optimizer.partition) == table


def _refused(optimizer: STAC, state_dict: dict[str, Any], message: str) -> None:
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert pickle.dumps(optimizer.state_dict()) == before


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes() -> None:
    adam, lion, other = (
        STAC(two_layers(seed), last_n_layers=0, trunk_optimizer=partial(_chain, modules))
        for seed, modules in enumerate((_adam, _lion, _adam))
    )
    for optimizer in (adam, lion, other):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
    good = adam.state_dict()
    _refused(lion, good, r"torchzero\.Optimizer \(trunk\) has other parts")
    _refused(other, {key: good[key] for key in ("state", "param_groups")}, "lacks the state that it keeps in objects")
    for path in ("os:system", "torchzero.core.modular:warnings.warn"):
        bad = copy.deepcopy(good)
        nodes = bad["guests"]["trunk"]["nodes"]
        nodes[0]["attributes"].append(["step", {"node": len(nodes)}])
        nodes.append({"code": [path, None]})
        _refused(other, bad, f"holds '{path}', which a checkpoint brings only where")
    nodes[-1] = {"class": "tempfile:_TemporaryFileCloser", "attributes": []}
    _refused(other, bad, "_TemporaryFileCloser")
    other.load_state_dict(good)


def test_a_function_that_cannot_make_its_modules_anew_cannot_be_copied() -> None:
    modules = _adam()
    optimizer = STAC(two_layers(), trunk_optimizer=lambda groups: tz.Optimizer(groups, *modules))
    before = pickle.dumps(optimizer.state_dict())
    assert optimizer.state_bytes() == 152, "of the cap alone, for a twin would step modules that are in use"
    with pytest.raises(ValueError, match="modules that were made outside of it, so a copy would share them"):
        copy.deepcopy(optimizer)
    assert pickle.dumps(optimizer.state_dict()) == before
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(optimizer)
    copy.deepcopy(STAC(two_layers(), trunk_optimizer=lambda groups: tz.Optimizer(groups, m.Adam(), m.LR(0.1)))).step()


def test_what_a_chain_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trunk: Optimizer has no lr for lr_ratio to multiply"):
        STAC(
            two_layers(),
            last_n_layers=0,
            trunk_optimizer=partial(_chain, _searched),
            overrides=[(biases(), {"lr_ratio": 0.1})],
        )
    with pytest.raises(ValueError, match="trunk_lr is given beside trunk_optimizer"):
        STAC(two_layers(), trunk_lr=0.1, trunk_optimizer=partial(_chain, _adam))
