"""``torch.distributed.checkpoint``: its state dicts and its files without a process group, and sharded weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from stac_optimizer import STAC
from tests.runs import assert_equal_runs, built, has_flattened_without_state, process_group, stepped
from tests.support import assert_same_bits, parameter_state, set_gradients, small_model, wide_model

Run = tuple[nn.Module, STAC]

ABSENT = ("0.weight", "3.bias")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "cpu-offload": {"cpu_offload": True},
    "full-cpu-offload": {"full_state_dict": True, "cpu_offload": True},
    "not-strict": {"strict": False},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum-0": {"trunk_momentum": 0.0},
    "all-trunk": {"last_n_layers": 0},
    "all-trunk-momentum-0": {"last_n_layers": 0, "trunk_momentum": 0.0},
    "all-cap": {"last_n_layers": 9},
    "decay-amsgrad-maximize": {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "cautious": {"trunk_cautious": True},
    "tensor-lr": {"lr": torch.tensor(1e-2)},
    "fused": {"fused": True},
    "error-if-nonfinite": {"error_if_nonfinite": True},
    "bfloat16-state": {"trunk_state_dtype": torch.bfloat16},
    "int8-state": {"trunk_state_dtype": torch.int8, "make": wide_model},
    "stochastic-rounding": {"stochastic_rounding": True, "dtype": torch.bfloat16},
}
CASES = [
    pytest.param(StateDictOptions(**options), arguments, id=f"{name}-{arguments_name}")
    for name, options in OPTIONS.items()
    for arguments_name, arguments in ARGUMENTS.items()
    # torch finds the device of a full state dict by its state, and asserts that there is more than counters.
    if not (options.get("full_state_dict") and arguments_name == "all-trunk-momentum-0")
]
FLATTENED_ABSENT = pytest.mark.skipif(
    not has_flattened_without_state(),
    reason="this torch itself cannot load a flattened state dict where some parameter has no state",
)

each_target = pytest.mark.parametrize("target_steps", [0, 2], ids=["fresh", "stepped"])
each_option = pytest.mark.parametrize(
    "options",
    [
        pytest.param(StateDictOptions(**options), id=name, marks=[FLATTENED_ABSENT] if name == "flattened" else [])
        for name, options in OPTIONS.items()
    ],
)
# They say that there is no process group, and in torch 2.6 that its own way to write a file is deprecated.
quiet_files = pytest.mark.filterwarnings("ignore:(torch.distributed is|TypedStorage is deprecated):UserWarning")


def _run(steps: int, arguments: dict[str, Any], *, seed: int = 0, absent: Iterable[str] = ()) -> Run:
    """A run whose gradients are gone again, as they are when a checkpoint is made."""
    model, optimizer = stepped(0, seed=seed, **copy.deepcopy(arguments))
    for number in range(steps):
        set_gradients(model, number, skip=absent)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _transfer(source: Run, target: Run, options: StateDictOptions) -> None:
    """Load the source's optimizer into the target's; neither moves a weight."""
    before = copy.deepcopy([model.state_dict() for model, _ in (source, target)])
    set_optimizer_state_dict(*target, get_optimizer_state_dict(*source, options=options), options=options)
    assert_same_bits([model.state_dict() for model, _ in (source, target)], before)
    target[0].load_state_dict(source[0].state_dict())


@each_target
@pytest.mark.parametrize(("options", "arguments"), CASES)
def test_state_dict_of_a_stepped_optimizer_resumes_bit_identically(
    options: StateDictOptions, arguments: dict[str, Any], target_steps: int
) -> None:
    source, target = _run(3, arguments), _run(target_steps, arguments, seed=1)
    _transfer(source, target, options)
    assert_equal_runs(source, target)


@each_target
@each_option
def test_parameter_that_never_had_a_gradient_resumes_bit_identically(
    options: StateDictOptions, target_steps: int
) -> None:
    source, target = _run(3, {}, absent=ABSENT), _run(target_steps, {}, seed=1)
    _transfer(source, target, options)
    for name in ABSENT:
        averages = {key: value for key, value in parameter_state(target[1], target[0], name).items() if key != "step"}
        assert not any(value.any() for value in averages.values())
    _assert_equal_weights_after(source, target)


def _assert_equal_weights_after(source: Run, target: Run) -> None:
    """As :func:`assert_equal_runs`, where absent averages and averages of zeros count as equal."""
    for model, optimizer in (source, target):
        for seed in range(100, 103):
            set_gradients(model, seed)
            optimizer.step()
    assert_equal_runs(source, target)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_making_state_moves_no_weight_and_leaves_the_rates(arguments: dict[str, Any]) -> None:
    model, optimizer = _run(0, arguments)
    with torch.no_grad():
        model.get_parameter("0.bias").copy_(torch.tensor([0.0, -0.0, 1e-45, -3e38, 1.0]))
    before, groups = copy.deepcopy((model.state_dict(), optimizer.state_dict()["param_groups"]))
    rates = [group["lr"] for group in optimizer.param_groups]
    saved: Any = get_optimizer_state_dict(model, optimizer)
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(optimizer.state_dict()["param_groups"], groups)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    averages = [value for state in saved["state"].values() for key, value in state.items() if key != "step"]
    assert not any(value.any() for value in averages)


@each_target
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
def test_model_and_optimizer_together_resume_bit_identically(flatten: bool, target_steps: int) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    source, target = _run(3, {}), _run(target_steps, {}, seed=1)
    weights, state = get_state_dict(*source, options=options)
    set_state_dict(*target, model_state_dict=weights, optim_state_dict=state, options=options)
    assert_equal_runs(source, target)


def test_state_dict_of_another_split_is_refused() -> None:
    source, target = _run(3, {}), _run(2, {"last_n_layers": 2}, seed=1)
    before = copy.deepcopy(target[1].state_dict())
    saved = get_optimizer_state_dict(*source)
    with pytest.raises(ValueError, match="checkpoint group 0: "):
        set_optimizer_state_dict(*target, saved)
    assert_same_bits(target[1].state_dict(), before)


@quiet_files
@each_target
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_files_resume_bit_identically(
    arguments: dict[str, Any], flatten: bool, target_steps: int, tmp_path: Path
) -> None:
    source, target = _run(3, arguments), _run(target_steps, arguments, seed=1)
    _through_files(source, target, StateDictOptions(flatten_optimizer_state_dict=flatten), tmp_path)
    assert_equal_runs(source, target)


def _through_files(source: Run, target: Run, options: StateDictOptions, folder: Path, **how: Any) -> None:
    def both(run: Run) -> dict[str, Any]:
        weights, state = get_state_dict(*run, options=options)
        return {"model": weights, "optimizer": state}

    save(both(source), checkpoint_id=folder)
    loaded = both(target)
    load(loaded, checkpoint_id=folder, **how)
    set_state_dict(*target, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options)


@quiet_files
@each_target
def test_files_with_a_parameter_that_never_had_a_gradient_resume_bit_identically(
    target_steps: int, tmp_path: Path
) -> None:
    source, target = _run(3, {}, absent=ABSENT), _run(target_steps, {}, seed=1)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    _through_files(source, target, StateDictOptions(), tmp_path, planner=planner)
    _assert_equal_weights_after(source, target)


def _made(make: Any, steps: int, absent: Iterable[str] = ()) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As :func:`_run`, of torch's AdamW too."""
    model = small_model()
    optimizer = make(model if make is STAC else model.parameters(), lr=1e-2)
    for number in range(steps):
        set_gradients(model, number, skip=absent)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@quiet_files
@pytest.mark.parametrize("make", [torch.optim.AdamW, STAC])
def test_files_that_lack_a_key_load_in_part_alone(make: Any, tmp_path: Path) -> None:
    """Torch's own: the averages of a parameter without gradients are in no file, and a fresh optimizer has them."""
    model, optimizer = _made(make, 1, ABSENT)
    save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    loaded: dict[str, Any] = {"optimizer": get_optimizer_state_dict(*_made(make, 0))}
    with pytest.raises(CheckpointException, match=r"Missing key in .*: optimizer\.state\.0\.weight"):
        load(loaded, checkpoint_id=tmp_path)
    load(loaded, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    target = _made(make, 0)
    set_optimizer_state_dict(*target, loaded["optimizer"])
    for name in {name for name, _ in model.named_parameters()} - {*ABSENT}:
        assert_same_bits(target[1].state[target[0].get_parameter(name)], optimizer.state[model.get_parameter(name)])


@pytest.mark.parametrize("make", [torch.optim.AdamW, STAC])
def test_state_of_what_is_frozen_is_loaded_before_it_is_frozen(make: Any) -> None:
    """Torch's own: of a parameter that is frozen when a state dict is loaded, it drops the state."""
    saved: dict[str, Any] = dict(get_optimizer_state_dict(*_made(make, 2)))
    held: dict[bool, dict[str, Any]] = {}
    for is_frozen_first in (True, False):
        model, optimizer = _made(make, 0)
        model.get_parameter("0.weight").requires_grad_(not is_frozen_first)
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved))
        model.get_parameter("0.weight").requires_grad_(False)
        held[is_frozen_first] = {name: optimizer.state.get(param, {}) for name, param in model.named_parameters()}
    assert held[True].pop("0.weight") == {}
    assert_same_bits(held[False].pop("0.weight"), saved["state"]["0.weight"])
    assert_same_bits(held[True], held[False])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    with process_group(tmp_path):
        yield init_device_mesh("cpu", (1,))


def _sharded(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor.detach().clone(), mesh, [Shard(0)])


def _sharded_run(mesh: DeviceMesh, arguments: dict[str, Any]) -> Run:
    """The small model as FSDP2 leaves it: its parameters are shards, here the only ones."""

    def build(model: nn.Module) -> STAC:
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(_sharded(param, mesh)))
        return STAC(model, **{"lr": 1e-2, **arguments})

    make, dtype = arguments.pop("make", small_model), arguments.pop("dtype", torch.float32)
    return built(build, dtype, make=make)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="default"),
        pytest.param({"trunk_momentum": 0.0}, id="momentum-0"),
        pytest.param({"trunk_cautious": True}, id="cautious"),
        pytest.param({"foreach": True}, id="foreach"),
        pytest.param({"fused": True}, id="fused"),
        pytest.param({"weight_decay": 0.1, "maximize": True, "amsgrad": True}, id="decay-maximize-amsgrad"),
        pytest.param({"error_if_nonfinite": True}, id="error-if-nonfinite"),
        pytest.param({"trunk_state_dtype": torch.bfloat16}, id="bfloat16-state"),
        pytest.param({"trunk_state_dtype": torch.int8, "make": wide_model}, id="int8-state"),
        pytest.param({"trunk_state_dtype": torch.int8, "trunk_cautious": True, "make": wide_model}, id="int8-cautious"),
        pytest.param({"stochastic_rounding": True, "dtype": torch.bfloat16}, id="stochastic-rounding"),
    ],
)
def test_sharded_weights_step_and_resume_as_whole_ones(arguments: dict[str, Any], mesh: DeviceMesh) -> None:
    def step(seeds: range, optimizer: STAC) -> None:
        for seed in seeds:
            set_gradients(whole[0], seed)
            whole[1].step()
            for param, twin in zip(model.parameters(), whole[0].parameters(), strict=True):
                assert twin.grad is not None
                param.grad = _sharded(twin.grad, mesh)
            optimizer.step()

    whole = stepped(0, **arguments)
    model, optimizer = _sharded_run(mesh, dict(arguments))
    step(range(3), optimizer)
    resumed = STAC(model, lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    step(range(3, 6), resumed)
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        assert_same_bits(param.to_local(), whole[0].get_parameter(name), name)
        expected = parameter_state(whole[1], whole[0], name)
        held = parameter_state(resumed, model, name)
        assert {key: type(value) for key, value in held.items()} == {
            key: DTensor if value.ndim and value.numel() else Tensor for key, value in expected.items()
        }
        assert_same_bits(
            {key: value.to_local() if isinstance(value, DTensor) else value for key, value in held.items()},
            expected,
            name,
        )
