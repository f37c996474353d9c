"""What a step allocates beside weights, gradients and state: a few blocks, whatever the size of a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmark_memory import transient_bytes_of
from stac_optimizer import STAC
from stac_optimizer.optim import Lion

SHAPE = (8192, 2048)  # 64 MiB in float32, 32 MiB in bfloat16
MOST = 32 * 2**20

CASES = [
    pytest.param("trunk", torch.float32, {}, id="trunk"),
    pytest.param("trunk", torch.float32, {"foreach": True}, id="trunk-foreach"),
    pytest.param("trunk", torch.float32, {"trunk_cautious": True}, id="trunk-cautious"),
    pytest.param("trunk", torch.float32, {"trunk_state_dtype": torch.int8}, id="trunk-int8"),
    pytest.param("trunk", torch.bfloat16, {"stochastic_rounding": True}, id="trunk-rounding"),
    pytest.param("trunk", torch.float32, {"trunk_optimizer": Lion}, id="lion"),
    pytest.param("trunk", torch.bfloat16, {"trunk_optimizer": Lion, "stochastic_rounding": True}, id="lion-rounding"),
    pytest.param("cap", torch.float32, {}, id="cap"),
    pytest.param("cap", torch.bfloat16, {"stochastic_rounding": True}, id="cap-rounding"),
    pytest.param("cap", torch.float32, {"foreach": True}, id="cap-foreach"),
    pytest.param("cap", torch.float32, {"fused": True}, id="cap-fused"),
    pytest.param("trunk", torch.float32, {"fused": True}, id="trunk-fused"),
]


@pytest.mark.parametrize(("role", "dtype", "arguments"), CASES)
def test_step_on_a_large_tensor_holds_little_at_a_time(
    role: str, dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    weight = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = STAC([{"params": [("w", weight)], "stac_role": role}], lr=0.125, **arguments)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    peak = transient_bytes_of(optimizer.step, torch.device("cpu"))
    # A fused kernel writes in place, so it may hold next to nothing.
    assert peak > 0 or arguments.get("fused")
    assert peak <= MOST, f"{peak / 2**20:.1f} MiB"
    # AdamW's averages are rounded as well, so its step is not exactly lr.
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.75), rtol=0, atol=2.0**-8)


def test_codes_that_kernels_cannot_walk_hold_little_under_fused() -> None:
    weight = nn.Parameter(torch.ones(1600, 8192, dtype=torch.bfloat16).t())
    groups = [{"params": [("w", weight)], "stac_role": "trunk"}]
    optimizer = STAC(groups, fused=True, trunk_state_dtype=torch.int8, stochastic_rounding=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert transient_bytes_of(optimizer.step, torch.device("cpu")) <= MOST


@pytest.mark.parametrize("role", ["trunk", "cap"])
def test_scaled_gradients_are_not_copied_whole(role: str) -> None:
    """As a GradScaler leaves them to a fused step. Cut in blocks, as torch's fused AdamW writes unscaled ones back."""
    weight = nn.Parameter(torch.ones(SHAPE))
    optimizer = STAC([{"params": [("w", weight)], "stac_role": role}], lr=0.125, fused=True)
    weight.grad = torch.full_like(weight, 1024.0)

    def step() -> None:
        vars(optimizer).update(grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
        optimizer.step()

    step()
    assert transient_bytes_of(step, torch.device("cpu")) <= MOST
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.75), rtol=0, atol=2.0**-8)
    assert (weight.grad == 1024.0).all()
