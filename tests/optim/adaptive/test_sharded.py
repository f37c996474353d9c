"""TAdam and AdamP sum up over whole parameters, and over rows: shards of either dimension step as wholes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from stac_optimizer.optim import AdamP, TAdam
from stac_optimizer.optimizer import RuleOptimizer
from tests.ranks import run_ranks
from tests.sharded import Gradients, distributed, full

# With so large a bound of cosines some steps take the view of channels, some that of the layer, some neither.
CASES: list[tuple[Callable[..., RuleOptimizer], dict[str, Any]]] = [
    (TAdam, {"eps": 0.1, "amsgrad": True}),
    (AdamP, {"delta": 1.5}),
    (AdamP, {"delta": 1.5, "foreach": True, "nesterov": True}),
]
SHAPES = {"rows": (5, 6), "columns": (4, 7), "images": (6, 2, 3, 3), "uneven": (1, 4), "vector": (5,)}
DIMS = {"rows": 0, "columns": 1, "images": 0, "uneven": 0, "vector": 0}


def model_of(*, is_sharded: bool) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name, shape in SHAPES.items():
        values: Any = torch.randn(shape, generator=generator)
        if is_sharded:
            values = distributed(values, init_device_mesh("cpu", (2,)), [Shard(DIMS[name])])
        model.register_parameter(name, nn.Parameter(values))
    return model


def trained(kind: Callable[..., RuleOptimizer], arguments: dict[str, Any], *, is_sharded: bool) -> dict[str, Tensor]:
    """Whole weights, and numbers of state, after ten steps."""
    model = model_of(is_sharded=is_sharded)
    gradients, optimizer = Gradients(model), kind(model.named_parameters(), lr=0.01, weight_decay=0.1, **arguments)
    for seed in range(10):
        gradients.set(seed)
        optimizer.step()
    weights = {name: full(param.detach()) for name, param in model.named_parameters()}
    numbers = {
        f"{name} {key}": value
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if not value.ndim
    }
    return {**weights, **numbers}


def shards_and_wholes() -> list[dict[str, Tensor]]:
    """On one rank: what shards are trained to, of each case, after checking it against wholes."""
    results = []
    for kind, arguments in CASES:
        shards = trained(kind, arguments, is_sharded=True)
        # Sums over ranks are added up in another order.
        torch.testing.assert_close(shards, trained(kind, arguments, is_sharded=False), rtol=1e-5, atol=1e-6)
        results.append(shards)
    return results


def test_shards_step_as_whole_parameters_and_alike_on_all_ranks() -> None:
    first, second = run_ranks(shards_and_wholes, 2, timeout=120.0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
