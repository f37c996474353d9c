"""Who takes part in the benchmark of steps: a table of names and of how to build each optimizer. No measuring here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from benchmark_shapes import Workload
from stac_optimizer import STAC, parameters_where
from stac_optimizer.optim import Muon

__all__ = ["BASELINE", "CONTESTANTS", "SHARED", "Contestant", "LeftOutError", "found", "peer"]

BASELINE = "AdamW"
# What a step costs does not hang on these; all get the same.
SHARED: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}


class LeftOutError(Exception):
    """Why a contestant cannot take part."""


@dataclass(frozen=True)
class Contestant:
    """A name and how to build the optimizer; a foreign one may fail, and is then left out."""

    name: str
    build: Callable[[Workload], Optimizer]
    foreign: bool = False


def stac(*, split: bool = False, **arguments: Any) -> Callable[[Workload], Optimizer]:
    """STAC as a trunk alone, or with what belongs there in the cap."""

    def build(workload: Workload) -> Optimizer:
        roles = {"trunk": workload.named(in_cap=False if split else None), "cap": workload.named(in_cap=True)}
        if split and not roles["cap"]:
            raise LeftOutError("these shapes have no cap")
        groups = [{"params": roles[role], "stac_role": role} for role in (("trunk", "cap") if split else ("trunk",))]
        if arguments.get("stochastic_rounding") and any(p.dtype != torch.bfloat16 for p in workload.parameters):
            raise LeftOutError("rounds bfloat16 weights alone")
        return STAC(groups, **SHARED, **arguments)

    return build


def whole(**arguments: Any) -> Callable[[Workload], Optimizer]:
    """STAC with all in the trunk, for another optimizer there."""
    return lambda workload: STAC(workload.named(), last_n_layers=0, **SHARED, **arguments)


class InTurn(Optimizer):
    """Several optimizers as users step them by hand, one after the other."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here gives a closure
        for optimizer in self.optimizers:
            optimizer.step()
            self.state.update(optimizer.state)


def torch_muon_and_adamw(workload: Workload) -> Optimizer:
    """torch's Muon for the trunk's matrices and its AdamW for all else."""
    if not hasattr(torch.optim, "Muon"):
        raise LeftOutError("this torch has no Muon")
    if not workload.trunk_matrices():
        raise LeftOutError("these shapes have no matrices")
    muon = torch.optim.Muon(workload.trunk_matrices(), adjust_lr_fn="match_rms_adamw", **SHARED)
    return InTurn([muon, torch.optim.AdamW(workload.others(), **SHARED)])


def stac_muon(**arguments: Any) -> Callable[[Workload], Optimizer]:
    """STAC with the same in one object."""

    def build(workload: Workload) -> Optimizer:
        if not workload.trunk_matrices():
            raise LeftOutError("these shapes have no matrices")
        names = {id(parameter): name for name, parameter in workload.named()}
        roles = {"trunk": workload.trunk_matrices(), "cap": workload.others()}
        groups = [
            {"params": [(names[id(parameter)], parameter) for parameter in parameters], "stac_role": role}
            for role, parameters in roles.items()
        ]
        return STAC(groups, trunk_optimizer=partial(Muon, **arguments), **SHARED)

    return build


def overridden(**arguments: Any) -> Callable[[Workload], Optimizer]:
    """STAC as a trunk alone, every other tensor under an override, and so in a second group."""

    def build(workload: Workload) -> Optimizer:
        odd = {name for name, _ in workload.named()[1::2]}
        if not odd:
            raise LeftOutError("these shapes have one tensor, and so one group")
        some = parameters_where(lambda name, _: name in odd)
        return STAC(workload.named(), last_n_layers=0, overrides=[(some, {"weight_decay": 0.0})], **SHARED, **arguments)

    return build


def two_groups(workload: Workload) -> Optimizer:
    """AdamW with every other tensor in a second group without decay."""
    params = workload.parameters
    if len(params) < 2:
        raise LeftOutError("these shapes have one tensor, and so one group")
    groups: list[dict[str, Any]] = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **SHARED)


def found(path: str) -> Any:
    """What stands at an import path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LeftOutError(str(error)) from error


def peer(path: str, *, cuda: bool = False, **arguments: Any) -> Callable[[Workload], Optimizer]:
    """An optimizer by its import path; for CUDA alone, where so said."""

    def build(workload: Workload) -> Optimizer:
        make = found(path)
        if cuda and workload.device.type != "cuda":
            raise LeftOutError("runs on CUDA alone")
        optimizer: Optimizer = make(workload.parameters, **SHARED, **arguments)
        return optimizer

    return build


# One row per contestant: a new path or state dtype is a new row.
CONTESTANTS = (
    Contestant(BASELINE, peer("torch.optim.AdamW")),
    Contestant("AdamW foreach", peer("torch.optim.AdamW", foreach=True)),
    Contestant("AdamW fused", peer("torch.optim.AdamW", fused=True)),
    Contestant("AdamW two groups", two_groups),
    Contestant("Adam foreach", peer("torch.optim.Adam", foreach=True)),
    Contestant("SGD momentum fused", peer("torch.optim.SGD", momentum=0.9, fused=True)),
    Contestant("Muon + AdamW by hand", torch_muon_and_adamw),
    Contestant("STAC Muon", stac_muon()),
    Contestant("STAC Muon float32", stac_muon(ns_dtype=torch.float32)),
    Contestant("STAC trunk", stac()),
    Contestant("STAC trunk foreach", stac(foreach=True)),
    Contestant("STAC trunk fused", stac(fused=True)),
    Contestant("STAC split", stac(split=True)),
    Contestant("STAC split foreach", stac(split=True, foreach=True)),
    Contestant("STAC split fused", stac(split=True, fused=True)),
    Contestant("STAC trunk momentum=0", stac(trunk_momentum=0.0)),
    Contestant("STAC trunk momentum=0 fused", stac(trunk_momentum=0.0, fused=True)),
    Contestant("STAC trunk cautious", stac(trunk_cautious=True)),
    Contestant("STAC trunk cautious fused", stac(trunk_cautious=True, fused=True)),
    Contestant("STAC trunk state=bfloat16", stac(trunk_state_dtype=torch.bfloat16)),
    Contestant("STAC trunk state=bfloat16 fused", stac(trunk_state_dtype=torch.bfloat16, fused=True)),
    Contestant("STAC trunk state=int8", stac(trunk_state_dtype=torch.int8)),
    Contestant("STAC trunk state=int8 fused", stac(trunk_state_dtype=torch.int8, fused=True)),
    Contestant("STAC trunk state=int8 rounding", stac(trunk_state_dtype=torch.int8, stochastic_rounding=True)),
    Contestant(
        "STAC trunk state=int8 rounding fused", stac(trunk_state_dtype=torch.int8, stochastic_rounding=True, fused=True)
    ),
    Contestant("STAC trunk override", overridden()),
    Contestant("STAC trunk override fused", overridden(fused=True)),
    Contestant("STAC guest Adam foreach", whole(trunk_optimizer=partial(torch.optim.Adam, foreach=True))),
    Contestant("Lion", peer("stac_optimizer.optim.Lion")),
    Contestant("Lion foreach", peer("stac_optimizer.optim.Lion", foreach=True)),
    Contestant("lion-pytorch Lion", peer("lion_pytorch.Lion"), foreign=True),
    Contestant("optimi Lion", peer("optimi.Lion"), foreign=True),
    Contestant("flashoptim FlashLion", peer("flashoptim.FlashLion", cuda=True), foreign=True),
    Contestant("flashoptim FlashAdamW", peer("flashoptim.FlashAdamW", cuda=True), foreign=True),
    Contestant("heavyball AdamW", peer("heavyball.AdamW"), foreign=True),
    Contestant("torchao AdamW8bit", peer("torchao.optim.AdamW8bit"), foreign=True),
    Contestant("bitsandbytes AdamW8bit", peer("bitsandbytes.optim.AdamW8bit"), foreign=True),
    Contestant("bitsandbytes Lion8bit", peer("bitsandbytes.optim.Lion8bit"), foreign=True),
)
