"""The relatives of Adam against their authors' implementations: packages where there are any, else recorded numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer.optim import AdaBelief, AdamP, Adan, AdEMAMix, TAdam
from stac_optimizer.optimizer import RuleOptimizer

LR_AND_DECAY: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}


def gradient(step: int) -> Tensor:
    places = torch.arange(1, 7, dtype=torch.float64)
    return (torch.sin(places * (step + 1)) * (1 + places / 4)).view(2, 3)


# The weight after six steps of each authors' code on the CPU, in float64, from linspace(-1, 1, 6):
# https://github.com/apple/ml-ademamix (c3d73c0), https://github.com/sail-sg/Adan (2c65bea, foreach=False) and
# https://github.com/Mahoumaru/TAdam (5387e5c, optimizers/tadam.py).
RECORDED = [
    pytest.param(
        AdEMAMix,
        {"betas": (0.9, 0.99, 0.999), "alpha": 3.0},
        [-1.111905082389, -0.6387388571, -0.233062285069, 0.250750805185, 0.695205129515, 1.263803852124],
        1e-11,
        id="ademamix",
    ),
    pytest.param(  # alpha_warmup=4, beta3_warmup=4
        AdEMAMix,
        {"betas": (0.9, 0.99, 0.999), "alpha": 3.0, "t_alpha_beta3": 4},
        [-1.114471140893, -0.640243859015, -0.233486979943, 0.251890079199, 0.697624123236, 1.265063171335],
        1e-7,  # theirs adds 1e-8 to the betas while they warm up
        id="ademamix-warm-up",
    ),
    pytest.param(
        Adan,
        {},
        [-1.06031056369, -0.591057829373, -0.215914034511, 0.215385615632, 0.643719359185, 1.249940310592],
        1e-11,
        id="adan",
    ),
    pytest.param(  # k_dof=0.5, of six elements
        TAdam,
        {"eps": 0.1, "dof": 3.0},
        [-1.013852660114, -0.602099766954, -0.204949466729, 0.206346920068, 0.609543930088, 1.035049830659],
        1e-8,  # theirs holds W in float32
        id="tadam",
    ),
    pytest.param(
        TAdam,
        {"eps": 0.1, "amsgrad": True},
        [-1.017712982744, -0.602825991549, -0.206194068194, 0.20807890326, 0.612393954071, 1.044726426203],
        1e-8,
        id="tadam-amsgrad",
    ),
]


@pytest.mark.parametrize(("kind", "arguments", "expected", "tolerance"), RECORDED)
def test_weights_are_those_of_the_authors_code(
    kind: Callable[..., RuleOptimizer], arguments: dict[str, Any], expected: list[float], tolerance: float
) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
    optimizer = kind([weight], **LR_AND_DECAY, **arguments)
    for step in range(6):
        weight.grad = gradient(step)
        optimizer.step()
    torch.testing.assert_close(weight.flatten().tolist(), expected, rtol=0, atol=tolerance)


def models() -> list[nn.Parameter]:
    """A matrix, a convolution and a vector."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        for shape in ((4, 6), (3, 2, 3, 3), (5,))
    ]


def assert_steps_agree(ours: RuleOptimizer, theirs: torch.optim.Optimizer, *, turns: bool) -> None:
    """For twenty steps, whose gradients are nearly orthogonal to weights every other time, where they turn."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(*(optimizer.param_groups[0]["params"] for optimizer in (ours, theirs)), strict=True)
        for param, other in pairs:
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            if turns and seed % 2 and param.ndim > 1:
                of_rows = seed % 4 == 1
                rows, grads = (t.detach().reshape(len(t) if of_rows else 1, -1) for t in (param, grad))
                share = (rows * grads).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True)
                grad = (grads - 0.999 * share * rows).view_as(grad)
            param.grad, other.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        for param, other in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
            torch.testing.assert_close(param, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_steps_as_the_authors_package(nesterov: bool) -> None:
    package = pytest.importorskip("adamp")
    arguments: dict[str, Any] = {**LR_AND_DECAY, "nesterov": nesterov}
    assert_steps_agree(AdamP(models(), **arguments), package.AdamP(models(), **arguments), turns=True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adabelief_steps_as_the_authors_package(amsgrad: bool) -> None:
    """Without its default, a rectified step, which the paper has not."""
    pytest.importorskip("adabelief_pytorch")
    package = importlib.import_module("adabelief_pytorch")
    arguments: dict[str, Any] = {**LR_AND_DECAY, "amsgrad": amsgrad, "eps": 1e-8}
    theirs = package.AdaBelief(models(), **arguments, rectify=False, print_change_log=False)
    assert_steps_agree(AdaBelief(models(), **arguments), theirs, turns=False)
