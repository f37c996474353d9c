"""LARS, LAMB and RaLars on parameters cut over ranks: as whole ones to rounding, with one collective for all norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from tests.optim.layerwise.cases import LAYERWISE
from tests.ranks import run_ranks
from tests.sharded import distributed, full, sharded_as

# Alike, uneven, one row for two ranks, none, and so large on one rank alone that it is no part of a pack.
SHAPES = {"even": (4, 3), "uneven": (5, 2), "row": (1, 6), "empty": (0, 3), "vector": (7,), "large": (3, 12_000)}


def stepped(case: Any, *, cut: bool) -> tuple[dict[str, Tensor], list[int]]:
    """Whole weights after three steps, and how many collectives each took."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    params, counts = {}, []
    for name, shape in SHAPES.items():
        whole = torch.randn(shape, generator=generator)
        params[name] = nn.Parameter(distributed(whole, mesh, [Shard(0)]) if cut else whole)
    optimizer = case.optimizer(params, "foreach")
    for _ in range(3):
        for param in params.values():
            whole = torch.randn(param.shape, generator=generator)
            is_cut = isinstance(param, DTensor)
            param.grad = sharded_as(param, distributed(whole, mesh, [Shard(0)]).to_local()) if is_cut else whole
        with CommDebugMode() as seen:
            optimizer.step()
        counts.append(sum(seen.get_comm_counts().values()))
    return {name: full(param.detach()) for name, param in params.items()}, counts


def assert_shards_step_as_whole() -> None:
    """On one rank."""
    for case in LAYERWISE:
        (actual, counts), (expected, _) = stepped(case, cut=True), stepped(case, cut=False)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=case.name)
        assert counts[1:] == [1, 1], (case.name, counts)


def test_shards_step_as_whole_ones_with_one_collective() -> None:
    run_ranks(assert_shards_step_as_whole, 2, timeout=120.0)
