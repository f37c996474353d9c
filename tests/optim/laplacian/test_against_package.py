"""Steps of the package ladam 0.2.0, where it is installed, and where ours differ from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stac_optimizer import optim
from stac_optimizer.optim.laplacian import stencil, suggest_c2

ladam = pytest.importorskip("ladam")
pytestmark = pytest.mark.skipif(ladam.__version__ != "0.2.0", reason="another version, whose decay is decoupled")

SHAPES = ((6, 10), (7,), (40,), (2, 3, 4, 5), (4, 3, 2), (3, 20), (2, 50), (30, 9))


def largest_difference(name: str, scale: float = 1.0, **arguments: Any) -> float:
    """Of weights after some steps of both classes of this name, by lr."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    runs = [[nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    kinds: list[Callable[..., torch.optim.Optimizer]] = [getattr(module, name) for module in (optim, ladam)]
    optimizers = [kind(run, lr=0.01, **arguments) for kind, run in zip(kinds, runs, strict=True)]
    for _ in range(5):
        for param, other in zip(*runs, strict=True):
            param.grad = scale * torch.randn(param.shape, generator=generator, dtype=param.dtype)
            other.grad = param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return max(float((param - other).detach().abs().max()) for param, other in zip(*runs, strict=True)) / 0.01


@pytest.mark.parametrize("points", ["9point", "5point"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("LAdam", {"mode": mode}) for mode in ("variance_lap", "update_lap", "weight_lap")),
        ("WaveAdam", {"min_spatial_size": 4}),
        ("LAdaGrad", {"lr_decay": 0.1}),
        ("LRMSProp", {"momentum": 0.9}),
        ("LRMSProp", {}),
    ],
)
def test_steps_are_the_packages_to_rounding(
    name: str, arguments: dict[str, Any], points: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stencil, "ROWS_NUMEL", 30)  # some rows at once
    assert largest_difference(name, c2=0.05, stencil=points, weight_decay=0.1, **arguments) < 1e-12


def test_small_second_moments_alone_differ() -> None:
    """The package floors them at eps where they diffuse, so its steps are too short."""
    assert largest_difference("LAdam", 1e-6, mode="update_lap") < 1e-9
    assert largest_difference("LAdam", 1e-6, c2=0.0) < 1e-9
    assert largest_difference("LAdam", 1e-6) > 0.9
    for name in ("LAdaGrad", "LRMSProp"):
        assert largest_difference(name, 1e-6) < 1e-8


def test_advice_is_the_packages() -> None:
    for architecture in ("auto", "cnn", "mlp", "pinn", "transformer", "PINN"):
        assert suggest_c2(architecture) == ladam.suggest_c2(architecture)
