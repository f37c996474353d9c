"""What groups tell of the partition: the layers of each role, with their state's bytes, learning rates and decays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from stac_optimizer.model.layers import STACLayer
from stac_optimizer.model.names import layer_of, named_parameters
from stac_optimizer.model.partition import STACPartition
from stac_optimizer.rule import Group

__all__ = ["partition_of"]


def partition_of(
    groups: Sequence[Group], state_bytes: Callable[[Tensor, Group], int], moved: tuple[str, ...]
) -> STACPartition:
    """The partition that groups hold.

    Args:
        groups: the optimizer's.
        state_bytes: of a parameter of a group, once it has stepped.
        moved: names of parameters that went to the cap because what updates the trunk cannot take them.
    """
    types = {
        name: kind for group in groups for name, kind in zip(group["layer_names"], group["layer_types"], strict=True)
    }
    members: dict[str, list[tuple[str, Tensor, Group]]] = {"trunk": [], "cap": []}
    for name, param, group in named_parameters(groups):
        if "param_names" in group:
            members[group["stac_role"]].append((name, param, group))
    return STACPartition(
        trunk_layers=_layers(members["trunk"], types, state_bytes),
        cap_layers=_layers(members["cap"], types, state_bytes),
        amsgrad=any(group.get("amsgrad") for group in groups),
        moved=moved,
    )


def _layers(
    members: Iterable[tuple[str, Tensor, Group]],
    types: Mapping[str, str],
    state_bytes: Callable[[Tensor, Group], int],
) -> tuple[STACLayer, ...]:
    """The layers that parameters form, in order of appearance."""
    by_layer: dict[str, list[tuple[str, Tensor, Group]]] = {}
    for member in members:
        by_layer.setdefault(layer_of(member[0]), []).append(member)
    return tuple(
        STACLayer(
            name=layer,
            parameter_names=tuple(name for name, _, _ in some),
            parameters=tuple(param for _, param, _ in some),
            type_name=types.get(layer, ""),
            state_bytes=sum(state_bytes(param, group) for _, param, group in some),
            lrs=_values(some, "lr"),
            weight_decays=_values(some, "weight_decay"),
        )
        for layer, some in by_layer.items()
    )


def _values(members: Iterable[tuple[Any, Any, Group]], key: str) -> tuple[float, ...]:
    """The values of a key, each once."""
    return tuple(dict.fromkeys(float(group[key]) for _, _, group in members if key in group))
