"""A step in which any operation may fail: nothing has changed then, or the error says what has.

One operation after the other raises, until a step passes without: memory that runs out, or a user's interrupt.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stac_optimizer import STAC
from stac_optimizer.optim import AdamW, Lion, Muon, Signum
from tests.support import assert_same_bits, set_gradients, set_units

# What allocates nothing and writes nothing.
QUERIES = re.compile(
    r"__get__|is_\w+|numel|size|stride|dim|promote_types|data_ptr|view\w*|detach|split|flatten|unbind|_set_grad_enabled"
)


class Countdown:
    """Raises at the call of this number."""

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class FailsAt(Countdown, TorchFunctionMode):
    """The operation of this number raises instead of being done."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not QUERIES.fullmatch(function.__name__):
            self.count()
        return function(*args, **(kwargs or {}))


class FailsAtDispatch(Countdown, TorchDispatchMode):
    """The same one level deeper, where torch does not count the writes of operations on lists."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count()
        return function(*args, **(kwargs or {}))


class Run(NamedTuple):
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Any

    def held(self) -> dict[str, Any]:
        """By name of a parameter copies of it and of its state."""
        state = self.optimizer.state
        return copy.deepcopy(
            {name: (param.detach(), dict(state.get(param, {}))) for name, param in self.model.named_parameters()}
        )

    def hold(self, held: dict[str, Any]) -> None:
        """Go back to what was held."""
        for name, param in self.model.named_parameters():
            value, state = copy.deepcopy(held[name])
            with torch.no_grad():
                param.copy_(value)
            self.optimizer.state.pop(param, None)
            if state:
                self.optimizer.state[param] = state

    def step(self, failing: Any) -> None:
        """A step within which an operation fails; what torch does around it is not ours."""
        update = self.optimizer._update

        def failing_update(*args: Any, **kwargs: Any) -> None:
            with failing:
                update(*args, **kwargs)

        self.optimizer._update = failing_update
        try:
            self.optimizer.step()
        finally:
            del self.optimizer._update

    def groups(self) -> list[dict[str, Any]]:
        """What groups hold besides parameters."""
        return [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]


def model_of(dtype: torch.dtype) -> nn.Module:
    """A layer for each group; matrices whose averages 8-bit codes can hold."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 2, bias=index in (0, 3), dtype=dtype) for index in range(4)])


def stac(model: nn.Module, **arguments: Any) -> STAC:
    """Two groups for each role."""
    groups = [
        {"params": list(layer.named_parameters(prefix=str(index))), "stac_role": role, "weight_decay": index / 10}
        for index, (role, layer) in enumerate(zip(("trunk", "trunk", "cap", "cap"), model.children(), strict=True))
    ]
    return STAC(groups, lr=0.01, **arguments)


def mixed(model: nn.Module, **arguments: Any) -> STAC:
    """Of the model itself, whose vectors a trunk of matrices leaves to the cap."""
    return STAC(model, lr=0.01, last_n_layers=2, **arguments)


def alone(model: nn.Module, kind: Any, **arguments: Any) -> Any:
    """A class alone, with a group for each layer."""
    groups = [
        {"params": list(layer.named_parameters(prefix=str(index)))} for index, layer in enumerate(model.children())
    ]
    return kind(groups, lr=0.01, **arguments)


FLOAT, HALF, COMPLEX = torch.float32, torch.bfloat16, torch.complex64
CASES: Mapping[str, tuple[torch.dtype, Callable[[nn.Module], Any]]] = {
    "single": (FLOAT, partial(stac, foreach=False)),
    "foreach": (FLOAT, partial(stac, foreach=True)),
    "fused": (FLOAT, partial(stac, fused=True)),
    "cautious": (FLOAT, partial(stac, trunk_cautious=True)),
    "int8": (FLOAT, partial(stac, trunk_state_dtype=torch.int8)),
    "bfloat16-state": (FLOAT, partial(stac, trunk_state_dtype=torch.bfloat16)),
    "low-precision": (HALF, partial(stac, amsgrad=True)),
    "rounding": (HALF, partial(stac, stochastic_rounding=True, foreach=False)),
    "rounding-fused": (HALF, partial(stac, stochastic_rounding=True, fused=True)),
    "checks": (FLOAT, partial(stac, error_if_nonfinite=True, trunk_momentum=0.0)),
    "complex": (COMPLEX, stac),
    "lion": (FLOAT, partial(stac, trunk_optimizer=partial(Lion, cautious=True))),
    "lion-rounding": (HALF, partial(alone, kind=Lion, stochastic_rounding=True, foreach=True)),
    "muon": (FLOAT, partial(mixed, trunk_optimizer=partial(Muon, cautious=True))),
    "muon-int8": (
        HALF,
        partial(mixed, trunk_optimizer=partial(Muon, state_dtype="int8", ns_steps=1), stochastic_rounding=True),
    ),
    "signum-alone": (FLOAT, partial(alone, kind=Signum, maximize=True)),
    "adamw-alone": (FLOAT, partial(alone, kind=AdamW, amsgrad=True, foreach=True)),
    "guest-in-trunk": (FLOAT, partial(stac, trunk_optimizer=torch.optim.NAdam)),
    "guest-in-cap": (FLOAT, partial(stac, cap_optimizer=partial(torch.optim.SGD, momentum=0.9))),
    "guests": (FLOAT, partial(stac, trunk_optimizer=torch.optim.RMSprop, cap_optimizer=torch.optim.Adam)),
}


def begun(case: str, steps: int = 0) -> Run:
    """A run before the step that is to fail."""
    dtype, build = CASES[case]
    model = model_of(dtype)
    run = Run(model, build(model))
    for seed in range(steps):
        set_gradients(model, seed)
        run.optimizer.step()
    set_gradients(model, 9, skip={"3.bias"})
    return run


def told_by(error: BaseException) -> dict[str, set[str]] | None:
    """By what an error says of them, the names of parameters; None where it says that nothing was changed."""
    message = str(error)
    if message.endswith("Nothing was changed"):
        return None
    found = {}
    for what in ("updated", "perhaps in part", "as before"):
        names = re.search(rf"{what}: ((?:'[^']+'(?:, )?)+)", message)
        found[what] = set(re.findall("'([^']+)'", names[1])) if names else set()
    assert any(found.values()), message
    return found


def check_told(run: Run, before: dict[str, Any], after: dict[str, Any], error: BaseException) -> bool:
    """Assert that an error tells the truth; whether nothing has changed."""
    told, now = told_by(error), run.held()
    if told is None:
        assert_same_bits(now, before)
        return True
    have_gradient = {name for name, param in run.model.named_parameters() if param.grad is not None}
    assert have_gradient == set().union(*told.values())
    for name in now.keys() - told["updated"] - told["perhaps in part"]:
        assert_same_bits(now[name], before[name], f"{name} after {error}")
    for name in told["updated"]:
        assert_same_bits(now[name], after[name], f"{name} after {error}")
    return False


def fail_everywhere(run: Run, twin: Run, failing: Callable[[int, BaseException], Any], stride: int = 1) -> list[bool]:
    """Let each operation of a step fail once, and check what is told; whether nothing had changed, one by one.

    Args:
        run: the run.
        twin: one like it, which takes the step at once.
        failing: makes the context in which the operation of a number raises an error.
        stride: of how many operations one fails.
    """
    before, groups = run.held(), run.groups()
    twin.optimizer.step()
    after = twin.held()
    are_unchanged: list[bool] = []
    for number in itertools.count(1, stride):
        error = KeyboardInterrupt() if number % 2 else torch.OutOfMemoryError("tried to allocate more than there is")
        raised: BaseException | None = None
        try:
            run.step(failing(number, error))
        except (KeyboardInterrupt, torch.OutOfMemoryError) as caught:
            raised = caught
        if raised is None:
            break
        assert raised is error
        assert run.groups() == groups
        are_unchanged.append(check_told(run, before, after, error))
        # A step that changed nothing is tried again as it is.
        if not are_unchanged[-1]:
            run.hold(before)
    assert_same_bits(run.held(), after)
    return are_unchanged


STEPPED = ("foreach", "int8", "guest-in-trunk", "guest-in-cap")
IN_BLOCKS = ("single", "adamw-alone", "complex")


@pytest.mark.parametrize(("case", "steps"), [(case, 0) for case in CASES] + [(case, 1) for case in STEPPED])
def test_failing_operation_changes_nothing_or_tells_what(
    case: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case in IN_BLOCKS:
        set_units(monkeypatch, block=100, pack=80)
    # A hash is many operations, all alike.
    are_unchanged = fail_everywhere(begun(case, steps), begun(case, steps), FailsAt, 5 if "rounding" in case else 1)
    assert len(are_unchanged) > 10
    assert any(are_unchanged) or "guest" in case


@pytest.mark.parametrize("case", ["foreach", "lion", "fused"])
def test_where_writes_leave_no_trace_more_is_told_than_was_changed(case: str) -> None:
    are_unchanged = fail_everywhere(begun(case, 1), begun(case, 1), FailsAtDispatch)
    assert not all(are_unchanged)


def test_failing_scaled_step_is_told_and_leaves_nothing_of_the_scaler() -> None:
    run = begun("fused")
    before = run.held()
    vars(run.optimizer).update(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0))
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt, match="Nothing was changed"):
        run.step(FailsAt(1, error))
    assert_same_bits(run.held(), before)
    assert not {"grad_scale", "found_inf"} & set(vars(run.optimizer))


def test_failing_release_tells_of_its_parameter_and_may_be_tried_again() -> None:
    run, twin = begun("single", 1), begun("single", 1)
    for each in (run, twin):
        each.optimizer.zero_grad()
    inputs = torch.ones(1, 64)

    def backward(each: Run) -> None:
        sum(layer(inputs).sum() for layer in each.model.children()).backward()

    with twin.optimizer.release_gradients(twin.model):
        backward(twin)
    update = run.optimizer._update

    def failing_update(*args: Any) -> None:
        with FailsAt(4, torch.OutOfMemoryError("too much")):
            update(*args)

    before = run.held()
    handle = run.optimizer.release_gradients(run.model)
    run.optimizer._update = failing_update
    with pytest.raises(torch.OutOfMemoryError, match="Nothing was changed but what this backward had reached before"):
        backward(run)
    assert_same_bits(run.held(), before)
    del run.optimizer._update
    run.optimizer.zero_grad()
    with handle:
        backward(run)
    assert_same_bits(run.held(), twin.held())


def test_error_that_words_its_arguments_keeps_them() -> None:
    run = begun("single")
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left on device") as raised:
        run.step(FailsAt(1, error))
    assert raised.value.errno == 28
    notes = [*getattr(raised.value, "__notes__", ()), *map(str, raised.value.args)]
    assert any("Nothing was changed" in note for note in notes)


def test_counters_that_do_not_tell_are_not_put_back() -> None:
    """From 2^24 on float32 does not tell whether one was added; what is counted for is told then."""
    run = begun("foreach", 1)
    for state in run.optimizer.state.values():
        state["step"].fill_(2.0**24)
    before = run.held()
    error = KeyboardInterrupt()
    for number in range(1, 9):
        error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run.step(FailsAt(number, error))
        if "Nothing" not in str(error):
            break
    assert told_by(error) == {
        "updated": set(),
        "perhaps in part": {"0.weight", "0.bias"},
        "as before": {"1.weight", "2.weight", "3.weight"},
    }
    assert_same_bits(run.held(), before)
