"""Whose hooks a release's are: they go with their optimizer, and another that steps in its place is told of them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from tests.support import assert_same_bits, names_of_gradients, seeded_loss, small_model

Build = Callable[[nn.Module], Any]
BUILDS: dict[str, Build] = {
    "STAC": STAC,
    "fused": partial(STAC, fused=True),
    "Signum": lambda model: Signum(model.named_parameters()),
    "AdamW": lambda model: AdamW(model.named_parameters()),
    "Lion": lambda model: Lion(model.named_parameters()),
    "Muon": partial(STAC, trunk_optimizer=Muon),
}
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """What is gone is gone by itself."""
    SGD([nn.Parameter(torch.zeros(1))])  # the first of all, which the frames of torch's late imports hold for a while
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are on parameters."""
    return sum(len(param._post_accumulate_grad_hooks or {}) for param in model.parameters())


def train(model: nn.Module, optimizer: Optimizer) -> None:
    for seed in range(3):
        optimizer.zero_grad()
        seeded_loss(model, seed).backward()
        optimizer.step()


def assert_trains_as_alone(model: nn.Module) -> None:
    """Another optimizer trains the model as it would a copy that never had a release."""
    alone = small_model()
    alone.load_state_dict(model.state_dict())
    for each in (model, alone):
        train(each, SGD(each.parameters(), lr=0.1))
    assert_same_bits(model.state_dict(), alone.state_dict())


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("is_held", [False, True], ids=["no-handle", "handle"])
@each_build
def test_hooks_go_with_the_last_reference_to_their_optimizer(build: Build, is_held: bool) -> None:
    model = small_model()
    before = hooks_of(model)
    optimizer = build(model)
    released = optimizer.release_gradients(model)
    if not is_held:
        del released
    train(model, optimizer)
    seeded_loss(model, 3).backward()  # and between backward and step
    assert names_of_gradients(model) == []
    weak = weakref.ref(optimizer)
    del optimizer
    assert weak() is None
    assert hooks_of(model) == before
    assert_trains_as_alone(model)
    if is_held:
        released.remove()


@pytest.mark.usefixtures("_no_collection")
def test_scheduler_and_group_keep_no_more_than_they_hold() -> None:
    """A scheduler holds its optimizer; what is left of it without one holds nothing."""
    model = small_model()
    optimizer = STAC(model)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    optimizer.release_gradients(model)
    groups = optimizer.param_groups
    train(model, optimizer)
    weak = weakref.ref(optimizer)
    del optimizer
    seeded_loss(model, 3).backward()
    assert weak() is not None
    assert names_of_gradients(model) == []
    del schedule
    assert weak() is None
    assert groups
    assert_trains_as_alone(model)


@each_build
def test_release_goes_on_without_its_handle(build: Build) -> None:
    released, ordinary = ((model, build(model)) for model in (small_model(), small_model()))
    released[1].release_gradients(released[0])
    gc.collect()
    for run in (released, ordinary):
        train(*run)
    assert names_of_gradients(released[0]) == []
    assert_same_bits(released[0].state_dict(), ordinary[0].state_dict())


def test_variable_that_gets_another_optimizer_inside_the_context() -> None:
    model = small_model()
    before = hooks_of(model)
    optimizer: Optimizer = STAC(model)
    with optimizer.release_gradients(model):  # type: ignore[attr-defined]  # of what it is now
        train(model, optimizer)
        optimizer = SGD(model.parameters(), lr=0.1)
        assert hooks_of(model) == before
        assert_trains_as_alone(model)
    assert hooks_of(model) == before


def test_context_of_an_optimizer_that_nobody_keeps_is_refused() -> None:
    model = small_model()
    before = hooks_of(model)
    with (
        pytest.raises(RuntimeError, match=r"gone.*keep the optimizer in a variable"),
        STAC(model).release_gradients(model),
    ):
        pass
    assert hooks_of(model) == before


@pytest.mark.parametrize("end", [lambda run: run.remove(), lambda run: run.__exit__(ValueError, None, None)])
def test_end_of_a_release_takes_all_its_hooks_away(end: Callable[[Any], None]) -> None:
    model = small_model()
    before = hooks_of(model)
    optimizer = STAC(model)
    released = optimizer.release_gradients(model)
    assert hooks_of(model) > before
    end(released)
    assert hooks_of(model) == before
    optimizer.release_gradients(model)
    released.remove()
    assert hooks_of(model) > before


OTHERS: dict[str, Build] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "STAC": STAC,
    "in-part": lambda model: SGD([nn.Parameter(torch.zeros(2)), model.get_parameter("3.bias")], lr=0.1),
}


# Each build beside one other, and one build beside each.
PAIRS = [(name, "SGD") for name in BUILDS] + [(next(iter(BUILDS)), name) for name in OTHERS if name != "SGD"]


@pytest.mark.parametrize(("build", "other"), [(BUILDS[b], OTHERS[o]) for b, o in PAIRS], ids=map("-".join, PAIRS))
def test_step_of_another_in_the_place_of_the_one_that_releases_is_refused(build: Build, other: Build) -> None:
    model = small_model()
    optimizer = build(model)
    released = optimizer.release_gradients(model)
    train(model, optimizer)
    another = other(model)
    seeded_loss(model, 3).backward()
    with pytest.raises(
        RuntimeError, match=rf"^{type(another).__name__} has found no gradient of '[03].*remove\(\)"
    ) as error:
        another.step()
    optimizer.step()
    released.remove()
    seeded_loss(model, 4).backward()
    another.step()
    weak = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert weak() is None, error  # which may live on, as in a notebook


class Around(Optimizer):
    """A wrapper over the groups of another optimizer, whose step it calls."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch declares two
        self.inner.step()


def test_wrappers_and_optimizers_of_other_parameters_may_step() -> None:
    model, rest = small_model(), nn.Linear(2, 2)
    optimizer = STAC(model)
    other = SGD(rest.parameters(), lr=0.1)
    wrapper = Around(optimizer)
    optimizer.release_gradients(model)
    for seed in range(3):
        (seeded_loss(model, seed) + rest(torch.ones(1, 2)).sum()).backward()
        other.step()
        wrapper.step()


def through_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": through_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_of_the_model_alone_is_without_hooks(copied: Callable[[Any], Any]) -> None:
    model = small_model()
    optimizer = STAC(model)
    with optimizer.release_gradients(model):
        train(model, optimizer)
        twin = copied(model)
        assert_trains_as_alone(twin)
        seeded_loss(twin, 0).backward()
        assert len(names_of_gradients(twin)) == 6


def test_weight_in_several_reentrant_checkpoints_is_refused_with_the_way_out() -> None:
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])
    optimizer = STAC(model)

    def loss(*, use_reentrant: bool) -> torch.Tensor:
        hidden = torch.ones(2, 6, requires_grad=True)
        for _ in range(2):
            hidden = checkpoint(lambda x: model[0](x).tanh(), hidden, use_reentrant=use_reentrant)
        result: torch.Tensor = model[1](hidden).sum()
        return result

    with optimizer.release_gradients(model):
        with pytest.raises(RuntimeError, match=r"'0.bias' has a second gradient.*reentrant.*use_reentrant=False"):
            loss(use_reentrant=True).backward()
        optimizer.zero_grad()
        optimizer.step()
        loss(use_reentrant=False).backward()
        optimizer.step()


def test_step_of_a_release_is_compiled_with_its_hooks() -> None:
    model = small_model()
    optimizer = STAC(model)
    step = torch.compile(optimizer.step, backend="eager")
    with optimizer.release_gradients(model):
        for seed in range(3):
            seeded_loss(model, seed).backward()
            step()
    seeded_loss(model, 3).backward()
    step()


def test_release_that_ends_in_the_middle_of_other_steps() -> None:
    """As where the garbage collector finds its optimizer just then: torch goes through its hooks one by one."""
    model = small_model()
    held = [STAC(model)]
    held[0].release_gradients(model)
    handle = register_optimizer_step_post_hook(lambda *_: held.clear())
    after = register_optimizer_step_post_hook(lambda *_: None)
    try:
        other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        other.step()
    finally:
        handle.remove()
        after.remove()
    assert not held


def test_handle_of_a_release_that_has_ended_keeps_no_parameter() -> None:
    """Between backward and step it holds those that are updated."""
    model = small_model()
    optimizer = STAC(model)
    handle = optimizer.release_gradients(model)
    seeded_loss(model, 0).backward()
    handle.remove()
    weight = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None
