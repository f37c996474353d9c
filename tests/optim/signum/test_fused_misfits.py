"""What the kernel of ``fused=True`` must not walk, or not in any order: the outcome of the default path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer.optim import Signum
from tests.support import assert_same_bits


def held_by(optimizer: Signum, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in optimizer.state[param].items() if not tensor.is_meta}


# What a user may do to a parameter of 8 x 128, or to its state, between two steps.
MISFITS: dict[str, tuple[dict[str, Any], Callable[[nn.Parameter, dict[str, Tensor]], Any]]] = {
    "larger-weight": ({}, lambda param, _: replace(param, torch.ones(99, 128))),
    "other-shape": ({}, lambda param, _: replace(param, torch.ones(128, 8))),
    "smaller-average": ({}, lambda _, state: state.update(exp_avg=torch.zeros(3))),
    "average-elsewhere": ({}, lambda _, state: state.update(exp_avg=state["exp_avg"].to("meta"))),
    "larger-weight-int8": ({"state_dtype": "int8"}, lambda param, _: replace(param, torch.ones(99, 128))),
    "fewer-scales": ({"state_dtype": "int8"}, lambda _, state: state.update(exp_avg_scale=torch.ones(1, 1))),
    "more-scales": ({"state_dtype": "int8"}, lambda _, state: state.update(exp_avg_scale=torch.ones(80, 10))),
    "scales-elsewhere": (
        {"state_dtype": "int8"},
        lambda _, state: state.update(exp_avg_scale=state["exp_avg_scale"].to("meta")),
    ),
    "scales-in-bfloat16": (
        {"state_dtype": "int8"},
        lambda _, state: state.update(exp_avg_scale=state["exp_avg_scale"].bfloat16()),
    ),
    "codes-for-doubles": ({"state_dtype": "int8"}, lambda param, _: replace(param, torch.ones(8, 128).double())),
    "codes-without-scales": ({"state_dtype": "int8"}, lambda _, state: state.pop("exp_avg_scale")),
    "gradient-without-memory": ({}, lambda param, _: setattr(param, "grad", torch._efficientzerotensor((8, 128)))),
    "average-without-memory": ({}, lambda _, state: state.update(exp_avg=torch._efficientzerotensor((8, 128)))),
}


def replace(param: nn.Parameter, value: Tensor) -> None:
    param.grad = None
    param.data = value
    param.grad = torch.ones_like(value)


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_belong_together_is_not_walked(name: str) -> None:
    """A kernel would read and write beside it. The default path refuses it, or makes the best of it."""
    arguments, change = MISFITS[name]
    outcomes: list[tuple[type[Exception] | None, Tensor, dict[str, Tensor]]] = []
    for fused in (None, True):
        param = nn.Parameter(torch.linspace(-1, 1, 1024).view(8, 128))
        optimizer = Signum([param], lr=0.1, fused=fused, **arguments)
        param.grad = torch.linspace(2, -1, 1024).view(8, 128)
        optimizer.step()
        change(param, optimizer.state[param])
        if name == "codes-without-scales":
            optimizer.param_groups[0]["state_dtype"] = None
        raised: type[Exception] | None = None
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError) as error:
            raised = type(error)
        outcomes.append((raised, param.detach(), held_by(optimizer, param)))
    default, kernel = outcomes
    assert kernel[0] is default[0]
    assert_same_bits(kernel[1:], default[1:])


def test_scales_that_a_checkpoint_brings_in_another_dtype() -> None:
    steps = []
    for fused in (None, True):
        param = nn.Parameter(torch.linspace(-1, 1, 512).view(4, 128))
        optimizer = Signum([param], lr=0.1, state_dtype="int8", fused=fused)
        param.grad = torch.linspace(2, -1, 512).view(4, 128)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["exp_avg_scale"] = saved["state"][0]["exp_avg_scale"].bfloat16()
        optimizer.load_state_dict(saved)
        for _ in range(3):
            optimizer.step()
        steps.append((param.detach(), held_by(optimizer, param)))
    assert_same_bits(steps[1], steps[0])


SHARING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "all": lambda buffer: [buffer, buffer],
    "part": lambda buffer: [buffer[:8], buffer[4:]],
    "one-in-another": lambda buffer: [buffer, buffer[1:2], buffer[5:6]],
    "some-that-no-kernel-fits": lambda buffer: [buffer, buffer[:, ::2]],
}


@pytest.mark.parametrize("columns", [20, 2000])
@pytest.mark.parametrize("name", SHARING)
def test_parameters_that_share_memory_step_one_after_the_other(name: str, columns: int) -> None:
    flags: tuple[dict[str, Any], ...] = ({}, {"fused": True})
    buffers = [torch.linspace(-1, 1, 10 * columns).view(10, columns) for _ in flags]
    for buffer, arguments in zip(buffers, flags, strict=True):
        params = [nn.Parameter(part) for part in SHARING[name](buffer)]
        optimizer = Signum(params, lr=1.0, weight_decay=0.3, **arguments)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert_same_bits(buffers[1], buffers[0])
