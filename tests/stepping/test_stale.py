"""Optimizers that cannot train: their parameters are no longer the model's, or FSDP1 has flattened them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from stac_optimizer import STAC, partition_trainable_layers, where
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.sharded import Gradients
from tests.support import assert_same_bits, seeded_loss, small_model, snapshot, take_steps

MESSAGE = "none of the optimizer's parameters has had a gradient in 3 steps.*fully_shard.*build the optimizer after"


def test_third_step_without_any_gradient_warns_once_and_changes_nothing() -> None:
    model = small_model()
    optimizer = STAC(model)
    optimizer.step()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(3):
        optimizer.step()  # a warning would raise
    assert_same_bits(snapshot(model, optimizer), before)
    take_steps(model, optimizer, range(1))
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step()


def test_copy_counts_anew() -> None:
    model = small_model()
    optimizer = STAC(model)
    optimizer.step()
    optimizer.step()
    copy.deepcopy(optimizer).step()


def _one_gradient(model: nn.Module, optimizer: STAC) -> None:
    model.get_parameter("3.bias").grad = torch.ones(3)
    optimizer.step()


def _closure(model: nn.Module, optimizer: STAC) -> None:
    optimizer.step(lambda: seeded_loss(model, 0).backward() or 0.0)


def _released(model: nn.Module, optimizer: STAC) -> None:
    with optimizer.release_gradients(model):
        for _ in range(4):
            optimizer.step()
        seeded_loss(model, 0).backward()
        optimizer.step()


def _frozen(model: nn.Module, optimizer: STAC) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("once", [_one_gradient, _closure, _released, _frozen])
def test_optimizer_with_reason_to_wait_may_step_without_gradients(once: Callable[[nn.Module, STAC], None]) -> None:
    model = small_model()
    optimizer = STAC(model)
    optimizer.step()
    once(model, optimizer)
    optimizer.zero_grad()
    for _ in range(4):
        optimizer.step()


def test_zeros_that_only_make_state_are_no_gradient() -> None:
    model = small_model()
    optimizer = STAC(model)
    get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match=MESSAGE):
        optimizer.step()


def _shard_too_late() -> None:
    model = small_model()
    optimizer = STAC(model)
    fully_shard(model)
    for step in range(3):
        Gradients(model).set(step)
        if step < 2:
            optimizer.step()
    with pytest.warns(UserWarning, match=MESSAGE):
        optimizer.step()
    STAC(model).step()


def test_optimizer_from_before_fully_shard_warns_on_every_rank() -> None:
    run_ranks(_shard_too_late, 2)


def _fsdp1(module: nn.Module, *, use_orig_params: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one rank shards nothing, and that FSDP1 is deprecated
        return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_with_the_way_out(use_orig_params: bool, tmp_path: Path) -> None:
    with process_group(tmp_path):
        whole = _fsdp1(small_model(), use_orig_params=use_orig_params)
        inner = nn.Sequential(_fsdp1(small_model(), use_orig_params=use_orig_params), nn.Linear(3, 3))
        for model, where_it_is in ((whole, "<root>"), (inner, "0")):
            for build in (STAC, partition_trainable_layers):
                with pytest.raises(ValueError, match=f"FullyShardedDataParallel as '{where_it_is}'.*Use fully_shard"):
                    build(model)
            with pytest.raises(ValueError, match=r"name '.*_fsdp_wrapped_module.*Use fully_shard"):
                STAC(model.named_parameters())


def test_fsdp_is_not_imported_to_look_for_it() -> None:
    # torch's own Optimizer may import it.
    code = (
        "import sys, torch, stac_optimizer; stac_optimizer.partition_trainable_layers(torch.nn.Linear(2, 2));"
        "assert 'torch.distributed.fsdp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_layers_of_fsdp2_keep_their_type(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = small_model()
        bare = str(partition_trainable_layers(model))
        for module in (*model.children(), model):
            fully_shard(module)
        assert str(partition_trainable_layers(model)) == bare
        chosen = partition_trainable_layers(model, cap=where(lambda layer: layer.type_name == "LayerNorm"))
        assert chosen.cap_layer_names == ("1",)
