"""A guest that keeps its state in objects of its own, of every kind that such objects hold; torchzero's are like it."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections import ChainMap, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from stac_optimizer import STAC, biases
from stac_optimizer.roles.guests.object_graph import GraphReader, GraphWriter

from ..support import assert_same_bits, set_gradients, through_file
from .guests import LR, decaying, hosted, one_cycle, trajectory, two_layers


class _Pair(NamedTuple):
    first: Tensor
    second: float


class _Module:
    """An average of gradients, with noise; settings of a parameter fall back on the module's by a closure."""

    def __init__(self, momentum: float = 0.9, lr: float = 0.02) -> None:
        self.defaults = {"momentum": momentum, "lr": lr}
        self.settings: Any = defaultdict(lambda: ChainMap({}, self.defaults))
        self.state: Any = defaultdict(dict)
        self.itself = self
        self.generator = torch.Generator().manual_seed(0)
        self.dice = random.Random(0)
        self.last: deque[Any] = deque([0.0], maxlen=2)
        self.seen: set[int] = set()
        self.counts = np.zeros(2)
        self.scale = np.float64(1.0)
        self.kind = torch.float32, frozenset({"a"}), torch.nn.functional
        self.shift: Callable[..., Any] = functools.partial(torch.add, alpha=1.0)
        self.noise = self.draw
        self.local = _made()
        self.mine: list[float] = []
        self.others = self.mine  # parted by the first step

    def draw(self, tensor: Tensor) -> Tensor:
        noise: Tensor = torch.randn(tensor.shape, generator=self.generator) * self.dice.random()
        return noise.to(tensor.device)

    def update(self, param: Tensor, grad: Tensor) -> Tensor:
        state = self.state[param]
        if not state:  # what stepping brings: built anew in a fresh optimizer
            state.update(pair=_Pair(torch.zeros_like(param), 0.5), inner=_Module.__new__(_Module), flat=param.view(-1))
            state["inner"].average = torch.zeros_like(param)
            self.mine.append(0.5)
            self.others = [1.5]
        average = state["inner"].average
        settings = self.settings[param]
        average.lerp_(grad, 1 - settings["momentum"])
        state["pair"].first.add_(average)
        self.counts[0] += 1
        self.scale = self.scale + 0.5
        self.last.append(float(average.sum()))
        self.seen.add(int(self.counts[0]))
        count = float(self.scale + self.counts.sum() + len(self.seen) + sum(self.last) + sum(self.mine)) * 1e-3
        shifted: Tensor = self.shift(self.local(average), self.noise(param) * count)
        kept: Tensor = state["pair"].first * state["pair"].second * self.others[0]
        assert settings.get("name", "chain") == "chain", "a key of the host reaches the modules"
        step: Tensor = (shifted + kept) * settings["lr"]
        return step


def _made() -> Callable[[Any], Any]:
    def local(value: Any) -> Any:
        return value * 2

    return local


class _Chain(optim.Optimizer):
    """Groups are layered over defaults, and its own ``state_dict`` is of no use."""

    def __init__(self, params: Any, *modules: _Module) -> None:
        self.modules = modules
        merged = {key: value for module in modules for key, value in module.defaults.items()}
        super().__init__(params, {**merged, "name": "chain", "modules": modules})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group: Any = ChainMap(dict(param_group), self.defaults)
        self.param_groups.append(group)
        self.layers = [module.settings[param].maps[1] for module in self.modules for param in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("never asked")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups: Any = self.param_groups
        for group in groups:
            for param in group["params"]:
                update = torch.zeros_like(param) if param.grad is None else param.grad
                for module in self.modules:
                    written = {key: value for key, value in group.maps[0].items() if key != "params"}
                    module.settings[param].maps[0].update(written)
                    update = module.update(param, update)
                param.sub_(update)


def _chain(groups: Any) -> _Chain:
    return _Chain(groups, _Module(0.5, 0.1), _Module(0.9))


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_it_steps_as_alone_over_checkpoints_and_copies(role: str) -> None:
    model = two_layers()
    trunk, cap = list(model[0].parameters()), list(model[2].parameters())
    schedule = one_cycle if role == "trunk" else decaying
    native = optim.AdamW(cap, LR, weight_decay=0.0) if role == "trunk" else STAC(model[0], 0.75 * LR, last_n_layers=0)
    optimizers = [_chain([{"params": trunk if role == "trunk" else cap}]), native]
    expected = trajectory(model, optimizers, [schedule(optimizer) for optimizer in optimizers])

    def build(model: nn.Module) -> STAC:
        given: Any = {f"{role}_optimizer": _chain}
        return STAC(model, LR, **given)

    for name, path in hosted(two_layers(), build, schedule).items():
        assert_same_bits(path, expected, name)


def test_overrides_and_added_groups_reach_it_and_its_copies() -> None:
    def build(model: nn.Module) -> STAC:
        layers = [(name, param) for name, param in model.named_parameters() if name.startswith("0")]
        overrides = [(biases(), {"momentum": 0.9, "lr_ratio": 0.5})]
        optimizer = STAC(layers, last_n_layers=0, trunk_optimizer=_chain, overrides=overrides)
        named = [(name, param) for name, param in model.named_parameters() if name.startswith("2")]
        optimizer.add_param_group({"params": named, "stac_role": "trunk", "lr": 0.03})
        assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk_1", "trunk_2"]
        return optimizer

    model = two_layers()
    groups = [
        {"params": [model[0].weight]},
        {"params": [model[0].bias], "momentum": 0.9, "lr": 0.01},
        {"params": [*model[2].parameters()], "lr": 0.03},
    ]
    alone = _chain(groups)
    expected = trajectory(model, [alone], [decaying(alone)])
    for name, path in hosted(two_layers(), build, decaying).items():
        assert_same_bits(path, expected, name)
    model = two_layers()
    copied, optimizer = copy.deepcopy((model, build(model)))  # before any step: of what the function was given
    assert_same_bits(trajectory(copied, [optimizer], [decaying(optimizer)]), expected)


def test_a_rollback_takes_back_what_groups_have_handed_over() -> None:
    """The two averages keep their own momenta as long as nobody writes one for both."""
    model = two_layers()
    optimizer = STAC(model, last_n_layers=0, trunk_optimizer=_chain)
    begin = through_file([model.state_dict(), optimizer.state_dict()])
    expected = trajectory(model, [optimizer])
    optimizer.param_groups[0].update(momentum=0.1, lr=torch.tensor(0.3))
    assert not all(map(torch.equal, trajectory(model, [optimizer])[0], expected[0]))
    model.load_state_dict(begin[0])
    optimizer.load_state_dict(begin[1])
    assert_same_bits(trajectory(model, [optimizer]), expected)


def test_bytes_are_counted_before_a_step_and_by_layer() -> None:
    """Two averages and a sum each, a view that takes no memory of its own, and what modules keep for all."""
    model = two_layers()
    optimizer = STAC(model, trunk_optimizer=lambda groups: _Chain(groups, _Module()))
    foreseen = optimizer.state_bytes()
    set_gradients(model, 0)
    optimizer.step()
    trunk = optimizer.partition.trunk_layers[0]
    assert optimizer.state_bytes() == foreseen == (trunk.state_bytes or 0) + 2 * 4 * 18 + 2 * 4
    assert trunk.state_bytes == 3 * 4 * 25  # average, sum, and the view, which holds the weight


def _stepped(function: Any) -> STAC:
    model = two_layers()
    optimizer = STAC(model, last_n_layers=0, trunk_optimizer=function)
    set_gradients(model, 0)
    optimizer.step()
    return optimizer


def _refused(optimizer: STAC, state_dict: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same_bits(optimizer.state_dict(), before)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes() -> None:
    optimizer, other = _stepped(_chain), _stepped(lambda groups: _Chain(groups, _Module()))
    good = optimizer.state_dict()
    _refused(other, good, r"tests\._Chain \(trunk\) has other parts")
    _refused(optimizer, {key: good[key] for key in ("state", "param_groups")}, "keeps in objects of its own")
    for key, value, message in (("shapes", [(1,)], "other shapes"), ("written", [[], []], "has 2 groups")):
        bad = copy.deepcopy(good)
        bad["guests"]["trunk"][key] = value
        _refused(optimizer, bad, message)
    for node in (
        {"code": ["os:system", None]},
        {"code": [f"{__name__}:np.load", None]},
        {"code": ["nowhere:nothing", None]},
        {"class": "tempfile:_TemporaryFileCloser", "attributes": []},
    ):
        bad = copy.deepcopy(good)
        nodes = bad["guests"]["trunk"]["nodes"]
        nodes[0]["attributes"].append(["other", {"node": len(nodes)}])
        nodes.append(node)
        _refused(optimizer, bad, "which a checkpoint brings only where")
    plain = STAC(two_layers(), last_n_layers=0, trunk_optimizer=optim.SGD)
    _refused(plain, {**plain.state_dict(), "guests": good["guests"]}, "has state of its own for the trunk")


def test_a_function_that_does_not_make_its_modules_anew_cannot_be_copied() -> None:
    module = _Module()
    optimizer = _stepped(lambda groups: _Chain(groups, module))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="modules that were made outside of it, so a copy would share them"):
        copy.deepcopy(optimizer)
    assert_same_bits(optimizer.state_dict(), before)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(optimizer)
    untouched = STAC(two_layers(), last_n_layers=0, trunk_optimizer=lambda groups: _Chain(groups, module))
    assert untouched.state_bytes() >= 0
    assert module.counts[0] == 4, "a twin has stepped modules that are in use"


def test_functions_are_found_again_by_name_and_none_that_closes_over_something() -> None:
    """Local ones too, by their place in the function that makes them; what runs no code finds them."""

    def closing() -> Any:
        return result

    writer = GraphWriter([])
    data = writer.write([_made(), functools.partial(_made(), 1), through_file, _Module.draw])
    reader = GraphReader([], through_file(writer.nodes), lambda _: True)
    result = reader.read(data)
    reader.commit()
    assert [result[0](3), result[1](), *result[2:]] == [6, 2, through_file, _Module.draw]
    writer = GraphWriter([])
    data = writer.write([closing])
    with pytest.raises(ValueError, match="closing"):
        GraphReader([], writer.nodes, lambda _: True).read(data)
