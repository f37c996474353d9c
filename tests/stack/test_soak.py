"""The program ``tests/soak.py``, shortened: some thousand steps beside the reference, and memory that stays flat."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests import soak
from tests.optim.comparisons import as_array
from tests.stack import soak_cases
from tests.stack.twins import Reference

BY_NAME = {case.name: case for case in soak.CASES}
# As many steps as half a second allows.
STEPS = {
    "single": 800,
    "foreach": 800,
    "fused": 800,
    "fused int8 averages": 400,
    "single bfloat16 averages": 600,
    "single int8 averages": 400,
    "single cautious": 300,
    "single momentum 0": 300,
    "single by chance": 100,
    "triton": 10,
    "triton int8 averages": 10,
}
# To compile takes ten seconds; the others are for the long form.
COMPILED = "compiled int8 averages"


@pytest.fixture(autouse=True)
def _nothing_from_before() -> Iterator[None]:
    """Nothing that another test has compiled, and none of its objects to be looked through again and again."""
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_run_stays_within_the_rounding_of_the_reference_and_holds_no_more(name: str) -> None:
    if BY_NAME[name].way == "triton":
        pytest.importorskip("triton")
    row = soak.soak(BY_NAME[name], STEPS[name])
    assert row.tally.compared >= 5 * 262  # weights of five steps
    assert row.tally.left_out <= 1e-3 * row.tally.compared


@pytest.mark.slow
def test_compiled_run_does_too() -> None:
    soak.soak(BY_NAME[COMPILED], 200)


@pytest.mark.parametrize("share", [1e-3, -1e-3], ids=["more", "less"])
def test_drift_that_single_steps_hide_is_found(share: float) -> None:
    run = soak.Run(BY_NAME["single"])
    run.steps_to(20, every=1)
    for _ in range(200):
        run.step()
        with torch.no_grad():
            run.params["0.weight"].mul_(1 + share * soak_cases.LR)
    trunk = run.params["0.weight"]
    with pytest.raises(AssertionError, match="weights are off"):
        run.bounded.check(trunk, run.optimizer.state[trunk])


def test_counter_that_misses_a_step_is_found() -> None:
    run = soak.Run(BY_NAME["single"])
    run.steps_to(5, every=1)
    run.optimizer.state[run.params["1.bias"]]["step"].sub_(1)
    with pytest.raises(AssertionError, match=r"1\.bias: counter"):
        run.step(is_compared=True)


def test_what_every_step_leaves_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[torch.Tensor] = []
    step = soak.Run.step

    def leaking_step(run: soak.Run, *, is_compared: bool = False) -> None:
        step(run, is_compared=is_compared)
        left.append(torch.zeros(1))

    monkeypatch.setattr(soak.Run, "step", leaking_step)
    with pytest.raises(AssertionError, match="tensors have grown"):
        soak.soak(BY_NAME["single"], 100)


def test_bounds_leave_no_sign_in_doubt_where_averages_are_exact() -> None:
    run = soak.Run(BY_NAME["single momentum 0"])
    run.steps_to(30, every=1)
    assert run.bounded.doubts == 0
    assert isinstance(run.twins["0.weight"], Reference)
    assert abs(as_array(run.params["0.weight"]) - run.bounded.p).max() < 1e-5
