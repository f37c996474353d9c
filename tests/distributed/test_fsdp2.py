"""FSDP2: sharded weights are stepped as whole ones, to the bit, however they are cut and on every path."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from stac_optimizer import STAC
from stac_optimizer.optim import Lion
from stac_optimizer.tensors.units import cutting
from tests.ranks import run_ranks
from tests.sharded import Gradients, assert_shards_step_as_whole, distributed, full, shard_each, shard_in_part
from tests.support import assert_same_bits, wide_model

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "cautious": {"trunk_cautious": True},
    "momentum-0": {"trunk_momentum": 0.0},
    "momentum-0-cautious-foreach": {"trunk_momentum": 0.0, "trunk_cautious": True, "foreach": True},
    "decay-maximize-amsgrad": {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
    "error-if-nonfinite": {"error_if_nonfinite": True},
    "all-cap": {"last_n_layers": 9, "weight_decay": 0.1},
    "all-cap-foreach": {"last_n_layers": 9, "weight_decay": 0.1, "foreach": True},
    "all-cap-fused": {"last_n_layers": 9, "weight_decay": 0.1, "fused": True},
    "bfloat16-state": {"trunk_state_dtype": torch.bfloat16},
    "int8-state": {"trunk_state_dtype": torch.int8},
    "int8-state-cautious-fused": {"trunk_state_dtype": torch.int8, "trunk_cautious": True, "fused": True},
    "bfloat16": {"dtype": torch.bfloat16, "weight_decay": 0.1},
    "bfloat16-foreach": {"dtype": torch.bfloat16, "foreach": True},
    "rounding": {"dtype": torch.bfloat16, "stochastic_rounding": True},
    "rounding-all-cap": {"dtype": torch.bfloat16, "stochastic_rounding": True, "last_n_layers": 9, "amsgrad": True},
    "rounding-all-cap-fused": {
        "dtype": torch.bfloat16,
        "stochastic_rounding": True,
        "last_n_layers": 9,
        "fused": True,
    },
    "rounding-cautious-int8": {
        "dtype": torch.bfloat16,
        "stochastic_rounding": True,
        "trunk_cautious": True,
        "trunk_state_dtype": torch.int8,
    },
    "lion": {"trunk_optimizer": Lion, "weight_decay": 0.1},
    "lion-cautious-maximize": {"trunk_optimizer": partial(Lion, cautious=True), "maximize": True},
    "lion-cautious-rounding": {
        "dtype": torch.bfloat16,
        "stochastic_rounding": True,
        "trunk_optimizer": partial(Lion, cautious=True, foreach=False),
    },
}
# On other numbers of ranks and other meshes.
ON_MESHES = (
    "default",
    "cautious",
    "all-cap-fused",
    "int8-state",
    "rounding-cautious-int8",
    "rounding-all-cap",
    "lion-cautious-rounding",
)


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_uneven_shards_step_as_whole_ones(part: int, tmp_path: Path) -> None:
    assert_shards_step_as_whole(shard_each, 3, dict(list(ARGUMENTS.items())[part::2]), tmp_path)


@pytest.mark.slow
def test_more_shards_than_rows_step_as_whole_ones(tmp_path: Path) -> None:
    """More ranks than some parameters have rows; meshes of two dimensions, below, cut others evenly."""
    cases = {name: ARGUMENTS[name] for name in (*ON_MESHES, "momentum-0-cautious-foreach", "decay-maximize-amsgrad")}
    assert_shards_step_as_whole(shard_each, 4, cases, tmp_path)


def even_model(seed: int, dtype: torch.dtype) -> nn.Module:
    """What two ranks of tensor parallelism and two of FSDP2 share evenly, as FSDP2 wants it then."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype)


def shard_hybrid(model: nn.Module) -> None:
    """Replicas of shards."""
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older torch: of random operators, which nobody calls
        parallelize_module(model, mesh, plan)


def shard_beside_tensor_parallel(model: nn.Module) -> None:
    """Rows cut twice, strided, for the first layer; rows and columns for the last; rows once for the norm."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])


def shard_rows_twice(model: nn.Module) -> None:
    """Strided rows, alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])


def shard_by(model: nn.Module, mesh: DeviceMesh, placements: list[Placement]) -> None:
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            cuts = [Shard(min(cut.dim, param.ndim - 1)) if isinstance(cut, Shard) else cut for cut in placements]
            module.register_parameter(name, nn.Parameter(distributed(param.detach(), mesh, cuts)))


def shard_columns(model: nn.Module) -> None:
    shard_by(model, init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)])


MESHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "hybrid": (shard_hybrid, {}),
    "tensor-parallel": (shard_beside_tensor_parallel, {"make": even_model}),
    "rows-twice": (shard_rows_twice, {"make": even_model}),
    "in-part": (shard_in_part, {}),
    "rows-and-columns": (shard_columns, {}),
}
# These need whole rows.
UNFIT = {"rows-and-columns": {"int8-state", "rounding-cautious-int8", "rounding-all-cap", "lion-cautious-rounding"}}
UNFIT["tensor-parallel"] = {"rounding-cautious-int8", "rounding-all-cap", "lion-cautious-rounding"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_of_two_dimensions_and_mixed_groups_step_as_whole_ones(mesh: str, tmp_path: Path) -> None:
    shard, model = MESHES[mesh]
    cases = {name: {**ARGUMENTS[name], **model} for name in ON_MESHES if name not in UNFIT.get(mesh, ())}
    assert_shards_step_as_whole(shard, 4, cases, tmp_path)


def _step_by_compiled_kernels() -> None:
    """The update of shards without kernels, and with them where there are more than 4 elements."""
    ends = []
    for pack, fused in ((1 << 40, False), (4, True)):
        cutting.PACK_NUMEL = pack
        model = wide_model(0, torch.bfloat16)
        shard_each(model)
        optimizer = STAC(model, lr=1e-2, last_n_layers=0, stochastic_rounding=True, fused=fused)
        gradients = Gradients(model)
        for seed in range(3):
            gradients.set(seed)
            optimizer.step()
        ends.append([full(param.detach()) for param in model.parameters()])
    assert_same_bits(ends[0], ends[1])


@pytest.mark.slow
def test_compiled_kernels_step_shards_as_the_default_path() -> None:
    run_ranks(_step_by_compiled_kernels, 2, timeout=300.0)


def _refuse_cut_rows() -> None:
    model = wide_model(0, torch.bfloat16)
    shard_columns(model)
    with pytest.raises(ValueError, match=r"'0.weight' \(trunk\) is sharded within rows, and stochastic_rounding"):
        STAC(model, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"'0.weight' \(trunk\) is sharded within rows, and 8-bit state needs"):
        STAC(model, trunk_state_dtype="int8")


def test_what_needs_whole_rows_refuses_cut_ones() -> None:
    run_ranks(_refuse_cut_rows, 4)
