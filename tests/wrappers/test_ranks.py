"""Wrapped optimizers on two ranks: FSDP2 against the whole model, its checkpoints, DDP, votes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC, MajorityVote
from stac_optimizer.wrappers import Lookahead, Scout, mechanize
from tests.ranks import run_ranks
from tests.sharded import Gradients, full, shard_each, shard_in_part
from tests.support import assert_same_bits, seeded_loss, small_model
from tests.wrappers.support import BASES

STEPS = 7
WRAPPERS: dict[str, Any] = {
    "Lookahead": lambda base, model: Lookahead(base(model, lambda kind: kind), 0.3, 3),
    "Scout": lambda base, model: Scout(base(model, lambda kind: kind), 0.0, 3),
    "mechanize": lambda base, model: base(model, lambda kind: mechanize(kind, s_init=0.3)),
    "store-delta": lambda base, model: base(model, lambda kind: mechanize(kind, s_init=0.3, store_delta=True)),
}

CASES = [*((wrapper, "STAC") for wrapper in WRAPPERS), ("Lookahead", "Adam"), ("mechanize", "Adam")]


def _model(seed: int = 0) -> nn.Sequential:
    return small_model(seed, torch.float64)


def _trained(shard: Any, wrapper: str, base: str) -> tuple[nn.Module, Any, Gradients]:
    model = _model()
    shard(model)
    optimizer = WRAPPERS[wrapper](BASES[base], model)
    gradients = Gradients(model)
    for seed in range(STEPS):
        gradients.set(seed)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, gradients


def _whole(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    held = {name: (param.detach(), optimizer.state[param]) for name, param in model.named_parameters()}
    return {
        name: (full(param), {key: full(state[key]) for key in sorted(state)}) for name, (param, state) in held.items()
    }


def _differences(one: Any, other: Any) -> float:
    """The largest difference, of values of about 1; infinite where keys differ."""
    worst = 0.0
    for name, (weights, state) in one.items():
        theirs, their_state = other[name]
        if state.keys() != their_state.keys():
            return float("inf")
        pairs = [(weights, theirs), *((state[key], their_state[key]) for key in state)]
        worst = max([worst, *(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in pairs if a.numel())])
    return worst


def _resume(run: tuple[nn.Module, Any, Gradients], wrapper: str, base: str, options: dict[str, Any]) -> None:
    model, optimizer, gradients = run
    twin = _model(1)
    shard_each(twin)
    other = WRAPPERS[wrapper](BASES[base], twin)
    kind = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=kind))
    with warnings.catch_warnings():  # older torch says that random numbers of shards differ on the CPU
        warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)
        set_optimizer_state_dict(twin, other, saved, options=kind)
    twin.load_state_dict(model.state_dict())
    for seed in range(STEPS, 2 * STEPS):
        for each, its in ((model, gradients), (twin, Gradients(twin))):
            its.model = each
            its.set(seed)
        optimizer.step()
        other.step()
    assert_same_bits(_whole(model, optimizer), _whole(twin, other), f"{wrapper} {base} {options}")


def _check_shards(whole: dict[str, Any]) -> None:
    for wrapper, base in CASES:
        run = _trained(shard_each, wrapper, base)
        ended = _whole(*run[:2])
        where = f"{wrapper} {base}"
        if wrapper == "Lookahead":
            assert_same_bits(ended, whole[where], where)
        else:  # sums are taken in another order
            assert _differences(ended, whole[where]) < 1e-9, where
        _resume(run, wrapper, base, {"full_state_dict": True} if base == "STAC" else {})
    in_part = _trained(shard_in_part, "mechanize", "Adam")
    assert _differences(_whole(*in_part[:2]), whole["mechanize Adam"]) < 1e-9
    scale = in_part[1].scale
    scales = [torch.zeros_like(scale) for _ in range(2)]
    torch.distributed.all_gather(scales, scale)
    assert_same_bits(scales[0], scales[1])


def _check_replicas() -> None:
    rank = torch.distributed.get_rank()
    for wrapper, make in WRAPPERS.items():
        model = _model()
        ddp = DistributedDataParallel(model)
        optimizer = make(BASES["Adam"], model)
        for step in range(5):
            optimizer.zero_grad()
            seeded_loss(ddp, 10 * rank + step).backward()
            optimizer.step()
        for param in model.parameters():
            for tensor in (param.detach(), *optimizer.state[param].values()):
                held = [torch.zeros_like(tensor) for _ in range(2)]
                torch.distributed.all_gather(held, tensor)
                assert_same_bits(held[0], held[1], wrapper)


def _check_votes() -> None:
    model = _model()
    with pytest.raises(ValueError, match="build it without vote"):
        mechanize(STAC)(model, vote=MajorityVote())
    optimizer = Lookahead(STAC(model, lr=1e-2, vote=MajorityVote()), 0.5, 2)
    for step in range(4):
        optimizer.zero_grad()
        seeded_loss(model, 10 * torch.distributed.get_rank() + step).backward()
        optimizer.step()
    for param in model.parameters():
        held = [torch.zeros_like(param) for _ in range(2)]
        torch.distributed.all_gather(held, param.detach())
        assert_same_bits(held[0], held[1])
    scaler = GradScaler("cpu")
    scaler.scale(seeded_loss(model, 0)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="part ranks that vote"):
        scaler.step(optimizer)
    assert_same_bits(model.state_dict(), before)


def _on_a_rank(file: Path) -> None:
    _check_shards(torch.load(file))
    _check_replicas()
    _check_votes()


def test_on_two_ranks(tmp_path: Path) -> None:
    """In one test, for ranks cost seconds to start."""
    whole = {f"{wrapper} {base}": _whole(*_trained(nn.Identity(), wrapper, base)[:2]) for wrapper, base in CASES}
    torch.save(whole, tmp_path / "whole.pt")
    run_ranks(_on_a_rank, 2, tmp_path / "whole.pt", timeout=120.0)
