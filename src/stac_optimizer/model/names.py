"""Names of parameters: without those of wrappers, of the layers they belong to, and in parameter groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "FSDP1_NAME",
    "ROOT",
    "WRAPPED_NAMES",
    "layer_of",
    "listed",
    "name_of",
    "named_parameters",
    "tensor_name",
    "unwrapped",
]

ROOT = "<root>"

# Names that torch.compile, activation checkpointing and FSDP1 put between a module and what they wrap.
FSDP1_NAME = "_fsdp_wrapped_module"
WRAPPED_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", FSDP1_NAME})

# What torch.nn.utils.parametrize makes of a tensor's name: "parametrizations.<tensor>.original", "original0" and so on,
# and "parametrizations.<tensor>.<number>." before the names of what the parametrizations hold themselves.
PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.([^.]+)\.(?:original\d*$|\d+\.)")


def unwrapped(name: str) -> str:
    """A parameter's name without those of wrappers. A "module" stays: a user's own submodule may have that name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED_NAMES)


def layer_of(name: str) -> str:
    """The name of the layer that a parameter of this name belongs to; a parametrized one is the module's still."""
    parametrized = PARAMETRIZED.search(name)
    return (name[: parametrized.start()] if parametrized else name.rpartition(".")[0]) or ROOT


def tensor_name(name: str) -> str:
    """What the module itself calls a parameter of this name, parametrized or not: "weight", "bias"."""
    parametrized = PARAMETRIZED.search(name)
    if parametrized and parametrized.end() == len(name):
        return parametrized[1]
    return name.rpartition(".")[2]


def listed(names: Sequence[str], most: int) -> str:
    """Names for a message: the first ones, and how many follow."""
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def named_parameters(groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Every parameter with a name to call it by, and its group.

    Names that are not as many as the parameters are of others: DeepSpeed puts flat partitions in their place.
    """
    for index, group in enumerate(groups):
        names = group.get("param_names") or ()
        if len(names) != len(group["params"]):
            names = [f"<group {index}>.{number}" for number in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            yield name, param, group


def name_of(groups: Iterable[Mapping[str, Any]], param: Tensor) -> str:
    """The name of a parameter that is in one of the groups."""
    return next(name for name, named, _ in named_parameters(groups) if named is param)
