"""The examples do what they say: published losses, accuracy, and a resumed run equal to an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmark_family
import benchmark_step
import digits
import low_precision
import rate_over_width
import toy_benchmark
import train_char_lm
from stac_optimizer import optim
from tests.support import assert_same_bits


@pytest.mark.slow
# On equal gradients all paths give the same bits, as a test below says; so one will do for the published losses.
@pytest.mark.parametrize("path", list(toy_benchmark.PATHS)[:1])
@pytest.mark.parametrize("contestant", toy_benchmark.CONTESTANTS, ids=lambda contestant: contestant.name)
def test_toy_benchmark_lands_in_its_band(contestant: toy_benchmark.Contestant, path: str) -> None:
    row = toy_benchmark.measure(contestant, path, seeds=5, steps=200, device="cpu")
    assert row.is_comparable
    assert abs(row.difference) <= contestant.band


def replayed(contestant: toy_benchmark.Contestant, path: str, gradients: list[list[Tensor]]) -> list[Tensor]:
    """The benchmark's weights after steps on given gradients."""
    model = toy_benchmark.make_model()
    optimizer = contestant.make(model, toy_benchmark.PATHS[path])
    for step in gradients:
        for param, gradient in zip(model.parameters(), step, strict=True):
            param.grad = gradient
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_toy_benchmark_is_the_same_to_the_bit_on_the_same_gradients() -> None:
    """What losses hide: they hang on the last bits of the processor's matrix products, which these gradients fix."""
    stac, signs, adamw = toy_benchmark.CONTESTANTS
    generator = torch.Generator().manual_seed(0)
    shapes = [param.shape for param in toy_benchmark.make_model().parameters()]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(30)]
    for path in toy_benchmark.PATHS:
        whole = replayed(adamw, path, gradients)
        for contestant in (stac, signs):
            weights = replayed(contestant, path, gradients)
            assert_same_bits(weights[:4], replayed(contestant, "foreach=False", gradients)[:4])
            assert_same_bits(weights[4:], whole[4:])


def test_toy_benchmark_prints_a_row_for_each_path(capsys: pytest.CaptureFixture[str]) -> None:
    rows = toy_benchmark.main(["--seeds", "1", "--steps", "2"])
    assert len(rows) == len(toy_benchmark.CONTESTANTS) * len(toy_benchmark.PATHS)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_digits_reaches_its_accuracy(tmp_path: Path) -> None:
    result = digits.main(["--out", str(tmp_path / "digits.pt")])
    assert result.accuracy >= 0.96
    assert (tmp_path / "digits.pt").exists()


def test_char_lm_resumes_exactly_and_learns(tmp_path: Path) -> None:
    small = ["--steps", "12", "--batch-size", "4", "--context", "16", "--width", "16", "--validate-every", "6"]
    straight, half, rest = (tmp_path / name for name in ("straight.pt", "half.pt", "rest.pt"))
    png = ["--out", str(tmp_path / "curves.png")]
    summaries = train_char_lm.main([*small, *png, "--save", str(straight)])
    train_char_lm.main([*small, *png, "--stop-at", "5", "--save", str(half)])
    train_char_lm.main([*png, "--resume", str(half), "--save", str(rest)])
    assert_same_bits(torch.load(rest, weights_only=True), torch.load(straight, weights_only=True))
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert summaries["STAC"].state_bytes < summaries["AdamW"].state_bytes
    for summary in summaries.values():
        assert summary.train_losses[-1] < summary.train_losses[0]


def test_char_lm_refuses_to_resume_under_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.pt"
    train_char_lm.main(["--steps", "2", "--stop-at", "1", "--save", str(saved), "--out", str(tmp_path / "c.png")])
    with pytest.raises(SystemExit):
        train_char_lm.main(["--steps", "3", "--resume", str(saved)])
    assert "steps = 3, but the checkpoint was made with steps = 2" in capsys.readouterr().err


def test_low_precision_compares_regimes(monkeypatch: pytest.MonkeyPatch) -> None:
    regimes = (low_precision.REGIMES[0], low_precision.REGIMES[-1])
    monkeypatch.setattr(low_precision, "REGIMES", regimes)
    full, small = (low_precision.main(["--steps", "3"])[regime.name][0] for regime in regimes)
    assert small.weight_bytes == full.weight_bytes / 2
    assert small.state_bytes < full.state_bytes / 2
    assert small.loss == pytest.approx(full.loss, rel=0.02)


def test_rate_over_width_draws_a_curve_for_each_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--widths", "8", "16", "--rates", "1e-3", "1e-1", "--steps", "6", "--out", str(tmp_path / "curves.png")]
    losses = rate_over_width.main(command)
    assert losses.keys() == {(8, 1e-3), (8, 1e-1), (16, 1e-3), (16, 1e-1)}
    assert losses[16, 1e-1] < losses[16, 1e-3] < 5
    assert "*" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_benchmark_times_muon_in_one_object_beside_the_pair_by_hand(tmp_path: Path) -> None:
    arguments = ["--shapes", "char-lm-wide", "--steps", "1", "--warmup", "0", "--contestants", "Muon"]
    report = benchmark_step.main([*arguments, "--out", str(tmp_path)])
    results = {result.name: result for result in report.results}
    assert {"AdamW", "STAC Muon"} <= results.keys()
    assert ("Muon + AdamW by hand" in results) == hasattr(torch.optim, "Muon")
    assert results["STAC Muon"].state_bytes_per_weight < 0.55 * results["AdamW"].state_bytes_per_weight


def test_family_has_every_class_that_comes_from_elsewhere_and_its_wrappers(tmp_path: Path) -> None:
    own = {"Signum", "AdamW", "Lion", "Muon", "WaveAdam"}  # Lion stands among the paths of STAC; the last is an alias
    assert set(benchmark_family.PEERS) == set(optim.__all__) - own
    arguments = ["--family", "--shapes", "char-lm-wide", "--steps", "1", "--warmup", "0"]
    report = benchmark_step.main([*arguments, "--out", str(tmp_path)])
    results = {result.name: result for result in report.results}
    assert {"AdamW", *benchmark_family.PEERS, "mechanize(SGD)", "Lookahead(SGD)", "Scout(SGD)"} <= results.keys()
    assert set(report.left_out) <= {contestant.name for contestant in benchmark_family.FAMILY if contestant.foreign}


@pytest.mark.slow
def test_benchmark_measures_every_contestant_beside_adamw(tmp_path: Path) -> None:
    arguments = ["--shapes", "many-tiny", "--steps", "1", "--warmup", "0", "--contestants", "STAC trunk", "SGD"]
    report = benchmark_step.main([*arguments, "--out", str(tmp_path)])
    results = {result.name: result for result in report.results}
    assert {"AdamW", "STAC trunk", "STAC trunk cautious", "SGD momentum fused"} <= results.keys()
    assert results["AdamW"].ratio == 1.0
    assert all(result.step_ms > 0 for result in report.results)
    for name, expected in (("AdamW", 8), ("STAC trunk", 4), ("STAC trunk momentum=0", 0)):
        assert round(results[name].state_bytes_per_weight) == expected
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
