"""Checkpoints on several ranks: state dicts under FSDP2 and DDP, files saved on some ranks and loaded on others.

Every rank trains the whole model beside the sharded one, with the same gradients; both must stay equal to the bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC
from stac_optimizer.optim import Muon
from tests.ranks import run_ranks
from tests.runs import has_flattened_without_state
from tests.support import assert_same_bits, set_gradients, through_file

Run = tuple[nn.Module, STAC]

ABSENT = ("0.weight", "3.bias")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum-0": {"trunk_momentum": 0.0},
    "amsgrad-cautious-decay": {"amsgrad": True, "trunk_cautious": True, "weight_decay": 0.1},
    "int8-state": {"trunk_state_dtype": torch.int8},
    "bfloat16-state": {"trunk_state_dtype": torch.bfloat16},
    "tensor-lr": {"lr": torch.tensor(1e-2)},
    "muon": {"trunk_optimizer": partial(Muon, foreach=False, ns_dtype="float32")},
    "never-a-gradient": {"absent": ABSENT},
}
# torch itself cannot make, or load, a state dict that is flattened and full: its AdamW fails likewise.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "cpu-offload": {"cpu_offload": True},
    "full-cpu-offload": {"full_state_dict": True, "cpu_offload": True},
}


def _model(seed: int = 0) -> nn.Sequential:
    """5 and 3 rows fall unevenly on 2 and on 4 ranks, 1 row leaves ranks with empty shards."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(200, 5), nn.LayerNorm(5), nn.Linear(70, 3), nn.Linear(5, 1))


def _runs(arguments: dict[str, Any], wrapper: str, *, seed: int = 0) -> tuple[Run, Run, tuple[str, ...]]:
    """A run on all ranks, its twin on each, and the names of parameters that never get a gradient."""
    # Of torch 2.6: of random numbers on shards, which nothing here draws, and of its own way to write a file.
    warnings.filterwarnings("ignore", "(DTensor random operators|TypedStorage is deprecated)", UserWarning)
    arguments = {"lr": 1e-2, **copy.deepcopy(arguments)}
    absent = arguments.pop("absent", ())
    whole = _model(seed)
    model: nn.Module = copy.deepcopy(whole)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        # Two dimensions of the mesh: sharded over pairs of ranks, and the pairs replicate each other.
        shape, names = ((2, 2), ("replicate", "shard")) if wrapper == "hsdp" else ((dist.get_world_size(),), None)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.get_submodule("0"), mesh=mesh)
        fully_shard(model, mesh=mesh)
    return (model, STAC(model, **copy.deepcopy(arguments))), (whole, STAC(whole, **arguments)), absent


def _step(run: Run, twin: Run, seeds: Iterable[int], absent: tuple[str, ...] = ()) -> None:
    """Steps of both with equal gradients, which are gone again as they are when a checkpoint is made."""
    for seed in seeds:
        set_gradients(twin[0], seed, skip=absent)
        for param, whole in zip(run[0].parameters(), twin[0].parameters(), strict=True):
            param.grad = whole.grad if whole.grad is None else _placed_as(param, whole.grad)
        for _, optimizer in (run, twin):
            optimizer.step()
            optimizer.zero_grad()


def _placed_as(param: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return whole.clone()
    return distribute_tensor(whole, param.device_mesh, param.placements)


def _full(value: Any) -> Any:
    """The same with each DTensor gathered."""
    if isinstance(value, dict):
        return {key: _full(each) for key, each in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def _assert_equal(run: Run, twin: Run, case: str) -> None:
    """Weights and state of both are equal to the bit, and the state lies where its parameter does."""
    for (name, whole), param in zip(twin[0].named_parameters(), run[0].parameters(), strict=True):
        assert_same_bits(_full(param.detach()), whole.detach(), f"{case}: {name}")
        state = run[1].state[param]
        assert_same_bits(_full(state), twin[1].state[whole], f"{case}: {name}")
        averages = [value for key, value in state.items() if key != "step" and value.numel()]
        assert all(isinstance(value, DTensor) == isinstance(param, DTensor) for value in averages), f"{case}: {name}"
    assert_same_bits(_hyperparameters(run[1]), _hyperparameters(twin[1]), case)


def _hyperparameters(optimizer: STAC) -> list[dict[str, Any]]:
    # fully_shard makes classes of its own, such as FSDPLinear.
    passed_over = ("params", "layer_types")
    return [{key: value for key, value in group.items() if key not in passed_over} for group in optimizer.param_groups]


def _transfer(source: Run, target: Run, options: dict[str, Any]) -> None:
    """Load the source's optimizer into the target's, which moves no weight, and then its weights."""
    saved = get_optimizer_state_dict(*source, options=StateDictOptions(**options))
    before = copy.deepcopy(target[0].state_dict())
    # What is full and on the CPU, rank 0 alone has.
    is_on_rank_0 = options.get("full_state_dict", False) and options.get("cpu_offload", False)
    set_optimizer_state_dict(*target, saved, options=StateDictOptions(**options, broadcast_from_rank0=is_on_rank_0))
    assert_same_bits(_full(target[0].state_dict()), _full(before))
    target[0].load_state_dict(source[0].state_dict())


def _resume_from_state_dicts(wrapper: str, options: dict[str, Any], cases: Iterable[str]) -> None:
    for case in cases:
        arguments = ARGUMENTS[case]
        source, twin, absent = _runs(arguments, wrapper)
        _step(source, twin, range(2), absent)
        for steps in (2, 0) if case == "default" else (0,):
            target, target_twin, _ = _runs({**arguments, "lr": 0.5}, wrapper, seed=1)
            _step(target, target_twin, range(10, 10 + steps))
            _transfer(source, target, options)
        _step(target, twin, range(2, 4))
        _assert_equal(target, twin, case)


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_state_dicts_on_two_ranks_resume_bit_identically(wrapper: str, options: dict[str, Any]) -> None:
    is_possible = "flatten_optimizer_state_dict" not in options or has_flattened_without_state()
    cases = [case for case, arguments in ARGUMENTS.items() if is_possible or "absent" not in arguments]
    run_ranks(_resume_from_state_dicts, 2, wrapper, options, cases)


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}], ids=["plain", "full"])
def test_state_dicts_on_a_mesh_of_two_dimensions_resume_bit_identically(options: dict[str, Any]) -> None:
    run_ranks(_resume_from_state_dicts, 4, "hsdp", options, ["amsgrad-cautious-decay", "int8-state"])


def _exchange_full_state_dicts(wrapper: str) -> None:
    full = StateDictOptions(full_state_dict=True)
    for case, arguments in ARGUMENTS.items():
        sharded, twin, absent = _runs(arguments, wrapper)
        _step(sharded, twin, range(2), absent)
        whole = _model()
        of_trunk = {key: value for key, value in arguments.items() if key in ("trunk_state_dtype", "trunk_optimizer")}
        optimizer = STAC(whole, **of_trunk, lr=0.5)
        set_optimizer_state_dict(whole, optimizer, through_file(get_optimizer_state_dict(*sharded, options=full)))
        assert_same_bits(optimizer.state_dict()["state"], twin[1].state_dict()["state"], case)
        back, _, _ = _runs(arguments, wrapper, seed=1)
        set_optimizer_state_dict(*back, through_file(get_optimizer_state_dict(*twin)), options=full)
        back[0].load_state_dict(sharded[0].state_dict())
        _step(back, twin, range(2, 4))
        _assert_equal(back, twin, case)


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_full_state_dict_of_a_wrapped_model_loads_into_a_bare_one_and_back(wrapper: str) -> None:
    run_ranks(_exchange_full_state_dicts, 2, wrapper)


def _resume_from_plain_state_dicts() -> None:
    for case, arguments in ARGUMENTS.items():
        source, twin, absent = _runs(arguments, "fsdp")
        _step(source, twin, range(2), absent)
        held = {key: value for key, value in arguments.items() if key not in ("absent", "lr")}
        resumed = STAC(source[0], **held, lr=0.5)
        resumed.load_state_dict(copy.deepcopy(source[1].state_dict()))
        _step((source[0], resumed), twin, range(2, 4))
        _assert_equal((source[0], resumed), twin, case)


def test_plain_state_dict_of_shards_resumes_bit_identically_on_the_same_layout() -> None:
    run_ranks(_resume_from_plain_state_dicts, 2)


def _refuse_state_that_is_not_cut_as_the_parameters() -> None:
    sharded, twin, _ = _runs({}, "fsdp")
    _step(sharded, twin, range(1))
    for (_, saved), (_, optimizer), message in (
        (twin, sharded, "'exp_avg' of '0.weight' is whole, that of the parameter sharded.*full_state_dict"),
        (sharded, twin, "'exp_avg' of '0.weight' is sharded, that of the parameter whole.*full_state_dict"),
    ):
        before = copy.deepcopy(_full(optimizer.state_dict()))
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved.state_dict())
        assert_same_bits(_full(optimizer.state_dict()), before)


def test_state_that_is_not_cut_as_the_parameters_is_refused() -> None:
    run_ranks(_refuse_state_that_is_not_cut_as_the_parameters, 2)


STEPS = 2


def _train_on(folder: Path, generation: int, options: dict[str, Any], cases: Iterable[str]) -> None:
    """For each case load the files of the generation before, train on, and save."""
    for case in cases:
        run, twin, absent = _runs(ARGUMENTS[case], "fsdp")
        first = STEPS * generation
        if generation:
            run, _, _ = _runs({**ARGUMENTS[case], "lr": ARGUMENTS[case].get("lr", 0.0) + 0.5}, "fsdp", seed=1)
            for seed in range(first):
                set_gradients(twin[0], seed, skip=absent)
                twin[1].step()
            # A partial load, for a parameter that never had a gradient has no averages in the files.
            planner = DefaultLoadPlanner(allow_partial_load=bool(absent))
            _load(run, folder / case / str(generation - 1), options, planner)
        _assert_equal(run, twin, case)
        _step(run, twin, range(first, first + STEPS), absent)
        _assert_equal(run, twin, case)
        weights, state = get_state_dict(*run, options=StateDictOptions(**options))
        save({"model": weights, "optimizer": state}, checkpoint_id=folder / case / str(generation))


def _load(run: Run, folder: Path, options: dict[str, Any], planner: DefaultLoadPlanner) -> None:
    option = StateDictOptions(**options)
    weights, state = get_state_dict(*run, options=option)
    read: dict[str, Any] = {"model": weights, "optimizer": state}
    load(read, checkpoint_id=folder, planner=planner)
    set_state_dict(*run, model_state_dict=read["model"], optim_state_dict=read["optimizer"], options=option)


@pytest.mark.parametrize(
    ("world_sizes", "options", "cases"),
    [
        pytest.param((2, 4, 1), {}, list(ARGUMENTS), id="2-4-1"),
        pytest.param((2, 1, 3), {}, ["default", "int8-state", "muon"], id="2-1-3"),
        pytest.param((4, 2), {"flatten_optimizer_state_dict": True}, ["default", "momentum-0"], id="4-2-flattened"),
    ],
)
def test_files_of_some_ranks_resume_bit_identically_on_others(
    world_sizes: tuple[int, ...], options: dict[str, Any], cases: list[str], tmp_path: Path
) -> None:
    for generation, world_size in enumerate(world_sizes):
        run_ranks(_train_on, world_size, tmp_path, generation, options, cases)
