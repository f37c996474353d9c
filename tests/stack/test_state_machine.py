"""Everything that users do to an optimizer, in any order: after each action it must be what its twins say.

Actions are drawn by hypothesis, from a fixed seed in the ordinary suite. For a long run with new seeds, on failure
printed with the seed:

    STAC_MACHINE_MINUTES=60 python -m pytest -s tests/stack/test_state_machine.py -k long

The twins (``twins.py``): the float64 reference for the rules of this package, ``torch.optim.AdamW`` itself for the
cap, and for guests their class alone; the latter two to the bit. The reference tells signs only of what is farther from
zero than its rounding; what that leaves out is counted, and must stay rare.
"""

from __future__ import annotations

import copy
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.amp import GradScaler

from tests.stack.machine import MOST_LAYERS, NAMES, Addition, Checkpoint, Config, World
from tests.stack.twins import Tally
from tests.support import assert_same_bits, set_units, snapshot

# Warnings have tests of their own; in a mix of everything they come by the way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:all groups have the learning rate:UserWarning"),
    pytest.mark.filterwarnings("ignore:none of the optimizer's parameters has had a gradient:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Detected call of|Seems like):UserWarning"),
]

BOUNDED = settings(
    max_examples=4,
    stateful_step_count=30,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
ROUND = settings(BOUNDED, max_examples=20, stateful_step_count=60, print_blob=True)

# hypothesis prefers few values, and repeats itself; all combinations shall come.
CHOICES: Mapping[str, Sequence[Any]] = {
    "path": ["single", "foreach", "fused"],
    "dtype": [torch.float32, torch.float32, torch.bfloat16],
    "lr": [2.0**-4, 2.0**-6],
    "is_tensor_lr": [False, True],
    "trunk": [*["signum"] * 6, "lion", "NAdam", "Adagrad"],
    "cap": [*["adamw"] * 6, "lion", "SGD"],
    "momentum": [0.5, 0.9, 0.0],
    "cautious": [False, False, True],
    "state_dtype": [None, None, torch.bfloat16, torch.int8],
    "weight_decay": [0.0, 0.125],
    "maximize": [False, True],
    "amsgrad": [False, True],
    "error_if_nonfinite": [False, False, False, True],
    "by_chance": [False, True],
    "has_overrides": [False, True],
}
SEEDS = st.integers(0, 2**16)
SOME = st.sets(st.sampled_from(NAMES), max_size=4)
# The share of weights whose signs the reference may be unable to tell.
LEFT_OUT = 1e-3
RATES = st.sampled_from([0.0, 2.0**-3, 2.0**-5, 3 * 2.0**-6])


class Machine(RuleBasedStateMachine):
    """The actions."""

    config: Config
    tally: Tally

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: list[Checkpoint] = []
        self.left: Any = None
        self.loaded: Any = None

    @initialize()
    def build(self) -> None:
        note(str(self.config))
        self.world = World(self.config, self.tally)

    @property
    def optimizer(self) -> Any:
        return self.world.optimizer

    def gradients(self, number: int, absent: set[str], zero: set[str], size: float) -> dict[str, Tensor]:
        """Gradients of what trains: random ones, some absent, some zero."""
        generator = torch.Generator().manual_seed(number)
        grads = {}
        for name, param in self.world.trainable().items():
            grad = torch.randn(param.shape, generator=generator).mul_(0.0 if name in zero else size)
            if name not in absent:
                grads[name] = grad.to(param.dtype)
        return grads

    def only_makes_state(self, grads: dict[str, Tensor]) -> bool:
        """Whether the step would be taken for the one by which torch.distributed makes state."""
        rests = not any(group["lr"] for group in self.optimizer.param_groups)
        return rests and not self.optimizer.state and not any(grad.any() for grad in grads.values())

    # A rule is drawn as often as any other, and an optimizer steps oftener than anything else.
    @rule(number=SEEDS)
    def plain_step(self, number: int) -> None:
        self.step(number, set(), set(), 1.0, "set")

    @rule(numbers=st.lists(SEEDS, min_size=2, max_size=4))
    def several_steps(self, numbers: list[int]) -> None:
        for number in numbers:
            self.step(number, set(), set(), 1.0, "backward")
            self.world.check()

    @rule(
        number=SEEDS,
        absent=SOME,
        zero=SOME,
        size=st.sampled_from([1.0, 2.0**-20, 2.0**9]),
        way=st.sampled_from(["set", "closure", "backward"]),
    )
    def any_step(self, number: int, absent: set[str], zero: set[str], size: float, way: str) -> None:
        self.step(number, absent, zero, size, way)

    def step(self, number: int, absent: set[str], zero: set[str], size: float, way: str) -> None:
        grads = self.gradients(number, absent, zero, size)
        if self.only_makes_state(grads) or (self.world.release and not self.optimizer.state and self.rests()):
            return
        self.world.expect_step(grads)
        if self.world.release is not None:
            way = "backward"
        if way == "closure":
            assert self.optimizer.step(lambda: self.set_gradients(grads)) == 0.5
        elif way == "set":
            self.set_gradients(grads)
            self.optimizer.step()
        else:
            self.backward(grads)
            self.optimizer.step()
        for name, param in self.world.model.named_parameters():
            if name in grads and param.grad is not None:
                assert_same_bits(param.grad, grads[name], f"the gradient of {name}")
        self.optimizer.zero_grad()

    def rests(self) -> bool:
        return not any(group["lr"] for group in self.optimizer.param_groups)

    def set_gradients(self, grads: dict[str, Tensor]) -> float:
        for name, grad in grads.items():
            self.world.model.get_parameter(name).grad = grad.clone()
        return 0.5

    def backward(self, grads: dict[str, Tensor]) -> None:
        params = {name: self.world.model.get_parameter(name) for name in grads}
        if params:
            torch.stack([(params[name] * grad).sum() for name, grad in grads.items()]).sum().backward()

    @precondition(lambda self: self.world.release is None)
    @rule(number=SEEDS, absent=SOME, poisoned=st.none() | st.sampled_from(NAMES[:6]))
    def scaled_step(self, number: int, absent: set[str], poisoned: str | None) -> None:
        grads = self.gradients(number, absent, set(), 1.0)
        if not grads or self.only_makes_state(grads):
            return
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        self.set_gradients({name: grad * 4 for name, grad in grads.items()})
        if poisoned in grads:
            self.world.model.get_parameter(poisoned).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]  # is set
        else:
            self.world.expect_step(grads)
        scaler.step(self.optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0 if poisoned in grads else 4.0)
        self.optimizer.zero_grad()

    @rule(name=st.sampled_from(NAMES), trains=st.booleans())
    def freeze_or_thaw(self, name: str, trains: bool) -> None:
        if trains:
            self.world.model.requires_grad_(True)
        elif name in self.world.twins:
            self.world.model.get_parameter(name).requires_grad_(False)

    @rule(
        index=st.integers(0, 9),
        lr=RATES,
        way=st.sampled_from(["number", "tensor", "in place"]),
        all_of_them=st.booleans(),
    )
    def set_lr(self, index: int, lr: float, way: str, all_of_them: bool) -> None:
        groups = self.optimizer.param_groups
        for group in groups if all_of_them else [groups[index % len(groups)]]:
            if isinstance(group["lr"], Tensor) and way == "in place":
                group["lr"].fill_(lr)
            else:
                as_tensor = way == "tensor" and self.world.config.is_tensor_lr
                group["lr"] = torch.tensor(lr) if as_tensor else lr
            self.world.set_hyper(group["param_names"], lr=lr)

    @rule(
        index=st.integers(0, 9),
        values=st.fixed_dictionaries(
            {},
            optional={
                "weight_decay": st.sampled_from([0.0, 0.125, 0.5]),
                "momentum": st.sampled_from([0.0, 0.5, 0.75]),
                "betas": st.sampled_from([(0.5, 0.9375), (0.875, 0.75)]),
                "cautious": st.booleans(),
                "maximize": st.booleans(),
            },
        ),
    )
    def set_values(self, index: int, values: dict[str, Any]) -> None:
        groups = self.optimizer.param_groups
        group = groups[index % len(groups)]
        is_guest = group["rule"].startswith("torch.")
        known = {"weight_decay"} if is_guest else self.world.twins[group["param_names"][0]].hyper.keys()
        chosen = {key: value for key, value in values.items() if key in known}
        group.update(chosen)
        self.world.set_hyper(group["param_names"], **chosen)
        self.world.is_as_built &= "momentum" not in chosen

    @rule()
    def schedule(self) -> None:
        if self.world.scheduler is None:
            self.world.schedule()
        else:
            self.world.advance()

    @precondition(lambda self: len(self.world.additions) + 4 < MOST_LAYERS)
    @rule(role=st.sampled_from(["trunk", "cap"]), decay=st.none() | st.just(0.25))
    def add_group(self, role: str, decay: float | None) -> None:
        if not self.world.can_add(role):
            return
        self.world.end_schedule()
        self.world.add(Addition(str(4 + len(self.world.additions)), role, decay))

    @precondition(lambda self: not self.world.lacks_averages())
    @rule(kind=st.sampled_from(["nested", "flat", "memory", "file"]))
    def save(self, kind: str) -> None:
        self.checkpoints.append(self.world.save(kind if self.world.can_save(kind) else "file"))

    @precondition(lambda self: self.checkpoints)
    @rule(index=st.integers(0, 9), into_new=st.booleans())
    def restore(self, index: int, into_new: bool) -> None:
        checkpoint = self.checkpoints[index % len(self.checkpoints)]
        self.loaded = checkpoint.saved, copy.deepcopy(checkpoint.saved)
        self.world.restore(checkpoint, into_new=into_new)

    @rule(what=st.sampled_from(["NaN", "sparse", "role", "twice", "groups", "layer_names", "shape"]), number=SEEDS)
    def refused(self, what: str, number: int) -> None:
        """What must raise, and change nothing."""
        if what in ("NaN", "sparse"):
            self.refused_step(what, number)
        elif what in ("role", "twice"):
            self.refused_group(what)
        else:
            self.refused_load(what)

    def refused_step(self, what: str, number: int) -> None:
        grads = self.gradients(number, set(), set(), 1.0)
        is_refused = self.world.config.error_if_nonfinite if what == "NaN" else not self.world.config.has_guest
        if "3.weight" not in grads or not is_refused or self.world.release is not None:
            return
        if what == "NaN":
            grads["3.weight"][-1, -1] = torch.nan if number % 2 else torch.inf
        else:
            grads["3.weight"] = grads["3.weight"].to_sparse()
        self.set_gradients(grads)
        with pytest.raises(RuntimeError, match="non-finite" if what == "NaN" else "sparse"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def refused_group(self, what: str) -> None:
        has_role = what == "twice"
        param = self.world.model.get_parameter("0.weight") if has_role else nn.Parameter(torch.ones(2))
        group = {"params": [("other", param)], **({"stac_role": "trunk"} if has_role else {})}
        with pytest.raises(ValueError if has_role else RuntimeError):
            self.optimizer.add_param_group(group)

    def refused_load(self, what: str) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        if what == "groups":
            saved["param_groups"].pop()
        elif what == "layer_names":
            saved["param_groups"][-1]["layer_names"] = ("elsewhere",)
        else:
            # What momentum 0 has left nothing reads, and guests may have no average.
            held = [] if not self.world.is_as_built or self.world.config.has_guest else saved["state"].values()
            averages = [state for state in held if "exp_avg" in state]
            if not averages:
                return
            averages[-1]["exp_avg"] = torch.zeros(7)
        with pytest.raises(ValueError, match=r"checkpoint"):
            self.optimizer.load_state_dict(saved)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), goes_on=st.booleans())
    def copy_all(self, how: str, goes_on: bool) -> None:
        run = self.world.run
        other = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
        left = run if goes_on else other
        if goes_on:
            self.world.adopt(other)
        self.left = left, snapshot(*left[:2])

    @precondition(lambda self: not (self.world.config.has_guest or self.world.config.error_if_nonfinite))
    @rule()
    def release(self) -> None:
        if self.world.release is None:
            self.world.release = self.optimizer.release_gradients(self.world.model)
        else:
            self.world.release.remove()
            self.world.release = None

    @invariant()
    def equals_its_twins(self) -> None:
        self.world.check()

    @invariant()
    def what_was_left_stays_as_it_is(self) -> None:
        if self.left is not None:
            (model, optimizer, _), before = self.left
            assert_same_bits(snapshot(model, optimizer), before, "the copy that was left")
        if self.loaded is not None:
            held, before = self.loaded
            assert_same_bits(held, before, "the checkpoint that was loaded")


def run(some: settings, number: int, configs: int) -> None:
    """Run machines of so many configurations, which a number chooses, as all else."""
    tally, random = Tally(), Random(number)
    for index in range(configs):
        config = Config(**{name: random.choice(choices) for name, choices in CHOICES.items()}).settled()
        machines: Any = type("Machine", (Machine,), {"config": config, "tally": tally})
        run_state_machine_as_test(seed(1000 * number + index)(machines), settings=some)
    assert tally.left_out <= LEFT_OUT * tally.compared, tally


def test_any_order_of_actions() -> None:
    run(BOUNDED, 0, configs=40)


MINUTES = float(os.environ.get("STAC_MACHINE_MINUTES", "0"))


@pytest.mark.skipif(not MINUTES, reason="a long run, for as many minutes as STAC_MACHINE_MINUTES says")
def test_any_order_of_actions_for_long() -> None:
    begin, number = time.monotonic(), int(time.time())
    while time.monotonic() - begin < 60 * MINUTES:
        number += 1
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes, seed {number}", flush=True)
        with pytest.MonkeyPatch.context() as patch:
            if number % 2:
                set_units(
                    patch
                )  # fused=True then runs its compiled kernels on these small tensors, which are not packed
            run(ROUND, number, configs=10)
