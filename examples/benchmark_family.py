"""The classes of ``stac_optimizer.optim`` and its wrappers beside the packages they come from: a table, no measuring.

python examples/benchmark_step.py --family --shapes many-tiny
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from benchmark_contestants import SHARED, Contestant, found, peer
from benchmark_shapes import Workload

__all__ = ["FAMILY"]

# Beside each class of this package those of others; their names differ in their package alone.
PEERS = {
    "AdEMAMix": ("holocron.optim.AdEMAMix", "pytorch_optimizer.AdEMAMix"),
    "AdaBelief": ("holocron.optim.AdaBelief", "pytorch_optimizer.AdaBelief", "adabelief_pytorch.AdaBelief"),
    "AdamP": ("holocron.optim.AdamP", "pytorch_optimizer.AdamP", "adamp.AdamP"),
    "Adan": ("holocron.optim.Adan", "pytorch_optimizer.Adan"),
    "LAMB": ("holocron.optim.LAMB", "pytorch_optimizer.Lamb"),
    "LARS": ("holocron.optim.LARS", "pytorch_optimizer.LARS"),
    "LAdaGrad": ("ladam.LAdaGrad",),
    "LAdam": ("ladam.LAdam",),
    "LRMSProp": ("ladam.LRMSProp",),
    "RaLars": ("holocron.optim.RaLars",),
    "TAdam": ("holocron.optim.TAdam",),
}
# What a step does that is not asked for by default.
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{name: {"c2": 1e-4} for name in ("LAdaGrad", "LAdam", "LRMSProp")},
    "LARS": {"momentum": 0.9},
}


def theirs(path: str, **arguments: Any) -> Callable[[Workload], Optimizer]:
    """An optimizer of another package."""

    def build(workload: Workload) -> Optimizer:
        spare_torchvision()
        with redirect_stdout(sys.stderr):  # one of them prints its settings
            return peer(path, **arguments)(workload)

    return build


def spare_torchvision() -> None:
    """Make holocron's optimizers importable without torchvision, which its models need, and its package imports."""
    spec = importlib.util.find_spec("holocron") if "holocron" not in sys.modules else None
    if spec is not None and spec.submodule_search_locations:
        package = ModuleType("holocron")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["holocron"] = package


def around_sgd(path: str) -> Callable[[Workload], Optimizer]:
    """A wrapper around torch's SGD."""

    def build(workload: Workload) -> Optimizer:
        spare_torchvision()
        optimizer: Optimizer = found(path)(torch.optim.SGD(workload.parameters, momentum=0.9, **SHARED))
        return optimizer

    return build


def mechanized_sgd(path: str) -> Callable[[Workload], Optimizer]:
    """The same of one that wraps the class."""
    return lambda workload: found(path)(torch.optim.SGD)(workload.parameters, momentum=0.9, **SHARED)


def rows(name: str) -> list[Contestant]:
    """A class and its peers."""
    arguments = ARGUMENTS.get(name, {})
    others = [Contestant(f"{path.partition('.')[0]} {name}", theirs(path, **arguments), True) for path in PEERS[name]]
    return [Contestant(name, peer(f"stac_optimizer.optim.{name}", **arguments)), *others]


FAMILY = (
    *(row for name in PEERS for row in rows(name)),
    Contestant("mechanize(SGD)", mechanized_sgd("stac_optimizer.wrappers.mechanize")),
    Contestant("mechanic_pytorch mechanize(SGD)", mechanized_sgd("mechanic_pytorch.mechanize"), foreign=True),
    Contestant("Lookahead(SGD)", around_sgd("stac_optimizer.wrappers.Lookahead")),
    Contestant("holocron Lookahead(SGD)", around_sgd("holocron.optim.Lookahead"), foreign=True),
    Contestant("Scout(SGD)", around_sgd("stac_optimizer.wrappers.Scout")),
    Contestant("holocron Scout(SGD)", around_sgd("holocron.optim.Scout"), foreign=True),
)
