"""A physics-informed network for the wave equation, as the ladam package poses it.

u_tt = u_xx on [0, 1] x [0, 1], with u(0, t) = u(1, t) = 0, u(x, 0) = sin(pi x), u_t(x, 0) = 0; the answer is
sin(pi x) cos(pi t). As in the script of ladam 0.4.1: five linear layers with 128 tanh units between them; 500 points
inside, 50 on each edge, 100 at the start, drawn once a seed and all in every step; edges and start weigh ten times.
Not as there: clipping, a schedule, and an error relative to the size of the answer, twice the one of that script.

The table of ladam 0.3.0 says 0.0310 for Adam and 0.0172 for LAdam after 5,000 steps, and not whether they are relative.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor, nn

from quality.task import Problem, Task

__all__ = ["WAVE_PINN", "WAVE_PINN_5000"]

WIDTH = 128
INSIDE, EDGE, START = 500, 50, 100
WEIGHT = 10.0


def derivative(values: Tensor, places: Tensor) -> Tensor:
    """Return the derivatives of each value by its own place, (points, coordinates), fit to derive again."""
    (result,) = torch.autograd.grad(values.sum(), places, create_graph=True)
    return result


def begin(seed: int) -> Problem:
    """Return a network with the first weights of the seed, and points of the same seed."""
    torch.manual_seed(seed)
    sides = [2, *[WIDTH] * 4, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sides):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])

    inside = torch.rand(INSIDE, 2).requires_grad_()
    times = torch.rand(EDGE, 1)
    edges = torch.cat([torch.cat([torch.full_like(times, side), times], dim=1) for side in (0, 1)])
    start = torch.cat([torch.rand(START, 1), torch.zeros(START, 1)], dim=1).requires_grad_()
    first = torch.sin(math.pi * start[:, :1].detach())
    ticks = torch.linspace(0, 1, 50)
    grid = torch.cartesian_prod(ticks, ticks)
    answer = torch.sin(math.pi * grid[:, :1]) * torch.cos(math.pi * grid[:, 1:])

    def loss(_: torch.Generator) -> Tensor:
        by_x, by_t = derivative(model(inside), inside).unbind(1)
        residual = derivative(by_t, inside)[:, 1] - derivative(by_x, inside)[:, 0]
        begun = model(start)
        speed = derivative(begun, start)[:, 1]
        # Each edge is a mean of its own, so both together count twice the mean over all their points.
        at_edges = 2 * model(edges).square().mean()
        at_start = (begun - first).square().mean() + speed.square().mean()
        total: Tensor = residual.square().mean() + WEIGHT * (at_edges + at_start)
        return total

    def validate() -> float:
        return float((model(grid) - answer).norm() / answer.norm())

    return Problem(model=model, loss=loss, validate=validate)


WAVE_PINN = Task(
    name="wave-pinn",
    kind="PINN of the wave equation, tanh, 128 wide",
    metric="relative L2 error",
    steps=1500,
    recipe="pinn",
    begin=begin,
)
WAVE_PINN_5000 = dataclasses.replace(WAVE_PINN, name="wave-pinn-5000", steps=5000)
