"""The comparison of quality: all on equal terms, nothing lost by a kill, and figures that are what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmark_quality
from quality.contestants import ADAMW, CAP, CONTESTANTS, Contestant
from quality.results import difference, share_to_reach, verdict
from quality.search import Choice, Rate, draw
from quality.task import Problem, Task
from quality.tasks import TASKS
from quality.tournament import Plan
from quality.training import Run, train
from stac_optimizer import partition_trainable_layers

NEEDS_EXTRA = {"cnn": "mlxtend", "vit": "mlxtend", "tabular": "mlxtend", "schedule-free AdamW": "schedulefree"}


def begin(seed: int) -> Problem:
    """A regression of a few numbers, in which every kind of parameter has a place."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    places = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    answers = places.prod(dim=1, keepdim=True)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(64, (16,), generator=generator)
        total: torch.Tensor = (model(places[chosen]) - answers[chosen]).square().mean()
        return total

    def validate() -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return float((model(places) - answers).square().mean())

    return Problem(model=model, loss=loss, validate=validate)


TINY = Task(name="tiny", kind="MLP", metric="MSE", steps=12, recipe="mlp", begin=begin, points=4)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Runs set the threads of their process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return TINY


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes most of the time of so small a run."""
    monkeypatch.setattr(benchmark_quality, "draw", lambda *_: None)


def run_tiny(folder: Path, *more: str) -> Any:
    """The whole benchmark, on the tiny task."""
    few = ["--tasks", "tiny", "--contestants", ADAMW, "STAC cautious", "--trials", "2", "--seeds", "2"]
    return benchmark_quality.main([*few, "--out", str(folder), *more])


def without_clock(folder: Path) -> Any:
    """The results file without what no two runs share."""
    report = json.loads((folder / "results.json").read_text())
    clock = ("step_ms", "iteration_ms")
    return [{key: value for key, value in each.items() if key not in clock} for each in report["results"]]


def test_writes_the_whole_report(tiny: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adamw, stac = run_tiny(tmp_path / "new")
    written = {path.name for path in (tmp_path / "new").iterdir()}
    pictures = {f"tiny-{name}.png" for name in ("curves", "sensitivity", "memory")}
    assert written == {"runs.jsonl", "results.json", "results.md", *pictures}
    markdown = (tmp_path / "new" / "results.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| STAC cautious | trunk_lr" in markdown
    assert adamw.to_adamw == 0
    assert adamw.state_share == 1
    assert stac.state_share < 0.9
    assert list(stac.curve) == [0, 3, 6, 9, 12]
    assert len(stac.trials) == 2


def test_killed_run_goes_on_to_the_same_results(tiny: Task, undrawn: None, tmp_path: Path) -> None:
    run_tiny(tmp_path / "whole")
    lines = (tmp_path / "whole" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    # Killed in the middle of a line.
    (tmp_path / "killed" / "runs.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    run_tiny(tmp_path / "killed", "--resume")
    resumed = (tmp_path / "killed" / "runs.jsonl").read_text().splitlines(keepends=True)
    assert resumed[:3] == lines[:3]
    assert len(resumed) == len(lines)
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "whole")


def test_resume_adds_seeds_to_what_is_there(tiny: Task, undrawn: None, tmp_path: Path) -> None:
    run_tiny(tmp_path)
    before = (tmp_path / "runs.jsonl").read_text()
    run_tiny(tmp_path, "--resume", "--seeds", "3")
    after = (tmp_path / "runs.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 2


@pytest.mark.slow
def test_workers_know_the_plugin(undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from quality.contestants import CONTESTANTS
CONTESTANTS["another"] = CONTESTANTS["AdamW"]
"""
    (tmp_path / "quality_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    few = ["--tasks", "photo", "--steps", "3", "--contestants", ADAMW, "another", "--trials", "1", "--seeds", "1"]
    try:
        results = benchmark_quality.main([*few, "--plugin", "quality_plugin", "--jobs", "2", "--out", str(tmp_path)])
    finally:
        CONTESTANTS.pop("another", None)
        sys.modules.pop("quality_plugin", None)
    assert [result.contestant for result in results] == [ADAMW, "another"]
    assert results[0].curve == results[1].curve


SLIPS = [
    ("--tasks abacus", "argument --tasks: 'abacus' is none of 'char-lm', "),
    ("--contestants Adma", "argument --contestants: 'Adma' is none of 'AdamW', "),
    ("--trials 0", "--trials: must be a whole number of at least 1, got '0'"),
    ("--seeds 1001", "--seeds: must be a whole number from 1 to 1000, got '1001'"),
    ("--jobs none", "--jobs: must be a whole number of at least 1, got 'none'"),
    ("--plugin no_such_module", "argument --plugin: No module named 'no_such_module'"),
    ("--out a_file", "nothing can be written to 'a_file'"),
    ("--out earlier", "runs.jsonl holds the runs of an earlier comparison: go on with --resume, or name another --out"),
    ("--out earlier --resume", "runs.jsonl is no run of this benchmark"),
]


@pytest.mark.parametrize(("arguments", "told"), SLIPS, ids=[arguments for arguments, _ in SLIPS])
def test_slip_ends_in_one_line(
    arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    Path("earlier").mkdir()
    Path("earlier/runs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        benchmark_quality.main(arguments.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
    assert len(list(tmp_path.rglob("*"))) == 3


def test_search_is_as_wide_for_all() -> None:
    for contestant in CONTESTANTS.values():
        rates = [each for each in contestant.space.values() if isinstance(each, Rate)]
        choices = [each for each in contestant.space.values() if isinstance(each, Choice)]
        assert len(rates) in (1, 2)
        assert all(math.isclose(math.log10(rate.high / rate.low), 1.5) for rate in rates)
        assert [len(set(choice.options)) for choice in choices] == [3]
        assert draw(contestant.space, 8)[:4] == draw(contestant.space, 4)
        for values in draw(contestant.space, 8):
            assert all(
                rate.low <= values[name] <= rate.high for name, rate in contestant.space.items() if rate in rates
            )


def test_no_seed_is_tuned_on_and_judged_on() -> None:
    plan = Plan(tasks=["photo"], contestants=[ADAMW], trials=1, tuning_seeds=30, seeds=1000, steps=None)
    tuned = {run.seed for run in plan.tuning_runs("photo", ADAMW)}
    judged = {run.seed for run in plan.final_runs("photo", ADAMW, {"lr": 1.0})}
    assert len(tuned) == 30
    assert len(judged) == 1000
    assert not tuned & judged


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_contestant_trains(contestant: str, tiny: Task) -> None:
    if contestant in NEEDS_EXTRA:
        pytest.importorskip(NEEDS_EXTRA[contestant])
    if contestant == "torch Muon + AdamW" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    values = draw(CONTESTANTS[contestant].space, 1)[0]
    record = train(Run(task="tiny", contestant=contestant, values=values, seed=0, steps=12))
    first, *_, last = record.curve.values()
    assert last < first
    assert not record.failed
    assert record.state_bytes > 0


@pytest.mark.parametrize("name", TASKS)
def test_task_trains(name: str) -> None:
    if name in NEEDS_EXTRA:
        pytest.importorskip(NEEDS_EXTRA[name])
    problem = TASKS[name].begin(0)
    partition = partition_trainable_layers(problem.model, cap=CAP)
    assert partition.trunk_parameters
    losses = [float(problem.loss(torch.Generator().manual_seed(1)).detach()) for _ in range(2)]
    assert losses[0] == losses[1]
    again = TASKS[name].begin(0).model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(problem.model.parameters(), again, strict=True))


def test_run_that_diverges_ends_early_and_counts_as_failed(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(model: nn.Module, values: dict[str, float], task: Task) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=values["lr"])

    monkeypatch.setitem(CONTESTANTS, "explosive", Contestant({"lr": Rate(1e30)}, explode))
    record = train(Run(task="tiny", contestant="explosive", values={"lr": 1e30}, seed=0, steps=12))
    assert record.failed
    assert record.final == math.inf
    assert max(record.curve) < 12
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))).final == math.inf


def test_what_cannot_run_is_left_out_with_the_reason(
    tiny: Task, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(model: nn.Module, values: dict[str, float], task: Task) -> torch.optim.Optimizer:
        raise ModuleNotFoundError("No module named 'elsewhere'")

    monkeypatch.setitem(CONTESTANTS, "missing", Contestant({"lr": Rate(1e-3)}, missing))
    names = ["--contestants", ADAMW, "missing"]
    results = benchmark_quality.main(
        ["--tasks", "tiny", *names, "--trials", "1", "--seeds", "1", "--out", str(tmp_path)]
    )
    assert [result.contestant for result in results] == [ADAMW]
    assert (
        "- missing on tiny: ModuleNotFoundError: No module named 'elsewhere'" in (tmp_path / "results.md").read_text()
    )


def test_figures_are_what_they_say() -> None:
    assert difference(1.0, 0.3, 2.0, 0.4) == pytest.approx(-2.0)
    assert difference(math.inf, math.nan, 2.0, 0.4) == math.inf
    assert difference(math.inf, math.nan, math.inf, math.nan) == 0
    assert [verdict(apart) for apart in (-2.1, -2.0, 2.0, 2.1, math.nan)] == ["won", "level", "level", "lost", "level"]
    curve = {0: (3.0, 0.1), 50: (2.0, 0.1), 100: (1.0, 0.1)}
    assert share_to_reach(curve, 1.5) == pytest.approx(0.75)
    assert share_to_reach(curve, 4.0) == 0
    assert share_to_reach(curve, 0.5) == math.inf
