"""Muon on many ranks: whole matrices are dealt out, each to one rank, and step as on one process, to the bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard

from stac_optimizer import named, vectors
from stac_optimizer.optim import Muon
from stac_optimizer.optim.muon import muon as muon_file
from stac_optimizer.optim.muon.matrices import signs_of_matrices
from stac_optimizer.rule.execution import parts
from stac_optimizer.tensors.units import cutting
from tests.distributed.test_fsdp2 import (
    even_model,
    shard_beside_tensor_parallel,
    shard_columns,
    shard_hybrid,
    shard_rows_twice,
)
from tests.ranks import run_ranks
from tests.sharded import Gradients, Sharding, distributed, full, shard_each, shard_in_part, trained
from tests.support import assert_same_bits


def matrices_model(seed: int, dtype: torch.dtype) -> nn.Module:
    """Matrices of fewer rows than there are ranks, wide and tall, one the transpose of another, and experts."""
    torch.manual_seed(seed)
    layers = (nn.Linear(7, 2), nn.Linear(5, 1), nn.Conv2d(8, 5, 3), nn.Linear(130, 6), nn.Linear(6, 130))
    return nn.Sequential(*layers, nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def muon(**arguments: Any) -> Any:
    """What gives the same bits however matrices are dealt out: none is multiplied beside others."""
    return partial(Muon, **{"foreach": False, "ns_dtype": "float32", **arguments})


STEPS = 3
CASES: Mapping[str, dict[str, Any]] = {
    "default": {"trunk_optimizer": muon(ns_dtype=None)},
    "bfloat16-products": {"trunk_optimizer": muon(ns_dtype="bfloat16")},
    "cautious": {"trunk_optimizer": muon(cautious=True), "maximize": True, "error_if_nonfinite": True},
    "blocks-and-experts": {
        "trunk_optimizer": muon(nesterov=False, adjust_lr="spectral"),
        "overrides": [(named("2") - vectors(), {"batch_dims": 1}), (named("3") - vectors(), {"row_blocks": 3})],
    },
    "int8": {"trunk_optimizer": muon(state_dtype="int8")},
    "rounding-int8-cautious": {
        "trunk_optimizer": muon(state_dtype="int8", cautious=True),
        "stochastic_rounding": True,
        "dtype": torch.bfloat16,
    },
}
# By name how a model is sharded, the model, and the cases that cannot be had so: for want of whole rows, or of a layer.
SHARDINGS: Mapping[str, tuple[Sharding, Any, set[str]]] = {
    "each": (shard_each, matrices_model, set()),
    "hybrid": (shard_hybrid, matrices_model, set()),
    "in-part": (shard_in_part, matrices_model, set()),
    "tensor-parallel": (shard_beside_tensor_parallel, even_model, {"blocks-and-experts", "rounding-int8-cautious"}),
    "rows-twice": (shard_rows_twice, even_model, {"blocks-and-experts"}),
    "rows-and-columns": (shard_columns, matrices_model, {"int8", "rounding-int8-cautious"}),
}


def _ended(shard: Sharding, make: Any, case: str) -> dict[str, Any]:
    return trained(shard, {"make": make, "steps": STEPS, **CASES[case]})


def _assert_each_steps_as_whole(shardings: tuple[str, ...], folder: Path, full_list: int | None) -> None:
    if full_list is not None:  # so that there are several lists, which end before ranks have any part of some matrices
        cutting.BLOCK_NUMEL, parts.DEALT = full_list, 1
    differing = []
    for sharding in shardings:
        shard, make, unfit = SHARDINGS[sharding]
        for case in [name for name in CASES if name not in unfit]:
            expected = torch.load(folder / f"{make.__name__}-{case}.pt")
            try:
                assert_same_bits(_ended(shard, make, case), expected, f"{sharding} {case}")
            except AssertionError as error:
                differing.append(str(error))
    assert not differing, "\n".join(differing)


@pytest.fixture(scope="module")
def folder_of_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of what one process ends with."""
    folder = tmp_path_factory.mktemp("whole")
    for _, make, unfit in SHARDINGS.values():
        for case in CASES.keys() - unfit:
            torch.save(_ended(nn.Identity(), make, case), folder / f"{make.__name__}-{case}.pt")
    return folder


@pytest.mark.parametrize(
    ("world_size", "shardings", "full_list"),
    [(2, ("each",), None), (3, ("each", "in-part"), 6), (4, tuple(SHARDINGS.keys() - {"in-part"}), None)],
    ids=["2", "3-in-small-lists", "4"],
)
def test_shards_step_as_whole_ones(
    world_size: int, shardings: tuple[str, ...], full_list: int | None, folder_of_whole: Path
) -> None:
    run_ranks(_assert_each_steps_as_whole, world_size, shardings, folder_of_whole, full_list)


def _counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many matrices this rank computes the signs of from now on."""
    counts: Counter[str] = Counter()

    def counting(tensors: Any, group: Any) -> Any:
        counts["matrices"] += len(tensors)
        return signs_of_matrices(tensors, group)

    monkeypatch.setattr(muon_file, "signs_of_matrices", counting)
    return counts


def _plain_run(**arguments: Any) -> tuple[dict[str, nn.Parameter], Muon]:
    dtype = arguments.pop("dtype", torch.float32)
    params = {name: nn.Parameter(p) for name, p in matrices_model(0, dtype).named_parameters() if p.ndim > 1}
    built: Muon = muon(**arguments)(list(params.items()), lr=0.01)
    return params, built


def _step(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, seeds: range, *, absent: str = "") -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, param in params.items():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distributed(grad, param.device_mesh, param.placements)
            param.grad = None if name == absent else grad
        optimizer.step()


def _divide_the_work() -> None:
    world_size = dist.get_world_size()
    sharded = nn.Sequential(*[nn.Linear(6, 5, bias=False) for _ in range(2 * world_size)])
    shard_each(sharded)
    with pytest.MonkeyPatch.context() as patch:
        counts = _counted(patch)
        optimizer = muon()(sharded.parameters())
        Gradients(sharded).set(0)
        optimizer.step()
        assert counts == {"matrices": 2}
        for share_work, expected in ((True, None), (False, 6)):
            counts.clear()
            params, plain = _plain_run(share_work=share_work)
            _step(params, plain, range(1))
            dealt: list[Any] = [None] * world_size
            dist.all_gather_object(dealt, counts["matrices"])
            assert expected is None or dealt == [expected] * world_size
            assert expected is not None or (sum(dealt) == 6 and min(dealt) >= 1)


def _share_the_work_of_plain_matrices() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"cautious": True, "state_dtype": "int8"},
        {"dtype": torch.bfloat16, "stochastic_rounding": True},
        {"ns_dtype": "bfloat16"},
    ]
    for arguments in cases:
        alone, expected = _plain_run(**arguments)
        shared, optimizer = _plain_run(**arguments, share_work=True)
        for params, stepping in ((alone, expected), (shared, optimizer)):
            _step(params, stepping, range(2))
            _step(params, stepping, range(2, 4), absent="3.weight")
        for name, param in alone.items():
            assert_same_bits(shared[name].detach(), param.detach(), f"{arguments} {name}")
            assert_same_bits(optimizer.state[shared[name]], expected.state[param], f"{arguments} {name}")


def _shard(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Rows, columns and replicas in turn."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = (Shard(0), Shard(1), Replicate())
    return {
        name: nn.Parameter(distributed(param.detach(), mesh, [placements[index % 3]]))
        for index, (name, param) in enumerate(params.items())
    }


def _step_where_a_gradient_is_absent() -> None:
    """And where a matrix is not finite, alone."""
    whole, expected = _plain_run()
    sharded = _shard(whole)
    optimizer = muon()(list(sharded.items()), lr=0.01)
    for params, stepping in ((whole, expected), (sharded, optimizer)):
        _step(params, stepping, range(2), absent="2.weight")
        _step(params, stepping, range(2, 3))
        grad = params["0.weight"].grad
        assert grad is not None
        params["0.weight"].grad = grad * torch.tensor(float("nan"))
        stepping.step()
    for name, param in whole.items():
        assert_same_bits(full(sharded[name].detach()), param.detach(), name)
        assert bool(param.isnan().all()) == (name == "0.weight")


def _step_under_zero_redundancy() -> None:
    whole, expected = _plain_run()
    dealt = {name: nn.Parameter(param.detach().clone()) for name, param in whole.items()}
    optimizer = ZeroRedundancyOptimizer(list(dealt.values()), muon(), lr=0.01)
    _step(whole, expected, range(2))
    _step(dealt, optimizer, range(2))
    assert 0 < len(optimizer.optim.state) < len(whole)
    for name, param in whole.items():
        assert_same_bits(dealt[name].detach(), param.detach(), name)


def _refuse_to_share_the_work_of_other_matrices() -> None:
    rows = 8 + (dist.get_rank() == 1)
    with pytest.raises(ValueError, match="rank 1"):
        muon(share_work=True)([("weight", nn.Parameter(torch.ones(rows, 4)))], lr=0.01)


def _check_on_three_ranks() -> None:
    _divide_the_work()
    _share_the_work_of_plain_matrices()
    _refuse_to_share_the_work_of_other_matrices()
    _step_where_a_gradient_is_absent()
    _step_under_zero_redundancy()


def test_work_is_divided_and_results_are_those_of_one_process() -> None:
    run_ranks(_check_on_three_ranks, 3)


def test_parameters_that_were_flattened_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'flat' \(muon\) has 1 dimension, and muon .* do not flatten .*DeepSpeed"):
        Muon([("flat", nn.Parameter(torch.ones(12)))])
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([("w", param)])
    param.data = param.data.flatten()  # as FSDP1 and ZeRO do it later
    param.grad = torch.ones(12)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"'w' \(muon\) has 1 dimension.*Nothing was changed"):
        optimizer.step()
    assert torch.equal(param, torch.ones(12))
    assert optimizer.state_dict() == before
