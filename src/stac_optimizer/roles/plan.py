"""Which parameters form which group of which role, before anything is known of what updates them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stac_optimizer.groups.given import given_params
from stac_optimizer.groups.keys import STRUCTURE_KEYS
from stac_optimizer.model.layers import Layers, STACLayer
from stac_optimizer.model.names import layer_of
from stac_optimizer.model.partition import STACPartition
from stac_optimizer.roles.overrides import checked_ratio, merged, overrides_by_name, without_keys
from stac_optimizer.validation import one_of

__all__ = ["ROLES", "GroupPlan", "planned", "planned_as_given"]

ROLES = ("trunk", "cap")


@dataclass(kw_only=True)
class GroupPlan:
    """One group to be.

    Args:
        role: "trunk" or "cap".
        params: its parameters.
        names: their names; None where they came without.
        values: the hyper-parameters that it has of its own, ``lr_ratio`` among them.
        types: by layer the name of its class, where that is known.
        where: what stands before a name in a message.
        is_given: whether a user wrote the group, and not overrides.
        name: what the user called it.
        rule: what the user says that updates it.
    """

    role: str
    params: list[Tensor]
    names: list[str] | None
    values: dict[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    is_given: bool = False
    name: str | None = None
    rule: str | None = None

    def structure(self, index: int, rule: str) -> dict[str, Any]:
        """What the group says of itself besides parameters and hyper-parameters.

        Args:
            index: its place among the groups of its role.
            rule: the name of what updates it.
        """
        layers = tuple(dict.fromkeys(map(layer_of, self.names or ())))
        return {
            **({} if self.names is None else {"param_names": self.names}),
            "stac_role": self.role,
            "name": self.name or (self.role if index == 0 else f"{self.role}_{index}"),
            "rule": rule,
            "layer_names": layers,
            "layer_types": tuple(self.types.get(name, "") for name in layers),
        }


def planned(
    layers: Layers,
    partition: STACPartition,
    overrides: Sequence[tuple[Any, Mapping[str, Any]]],
    trunk_only: Collection[str],
) -> list[GroupPlan]:
    """Of a model: one group for each role and combination of overrides, trunk first.

    Args:
        layers: of the model.
        partition: of them.
        overrides: the user's.
        trunk_only: keys that do not follow a parameter to the cap where it went there by itself, as the bias of a layer
            whose weight they are for.
    """
    applied, moved = overrides_by_name(overrides, layers), set(partition.moved)
    # Such as reach moved parameters alone are refused as ever.
    reached = {index for name, which in applied.items() if name not in moved for index in which}
    stripped = without_keys(overrides, trunk_only)
    of_moved = [stripped[index] if index in reached else pair for index, pair in enumerate(overrides)]
    types = {layer.name: layer.type_name for layer in layers.layers}
    plans = []
    for role, some in (("trunk", partition.trunk_layers), ("cap", partition.cap_layers)):
        members: dict[tuple[bool, tuple[int, ...]], list[tuple[str, Tensor]]] = {}
        for name, param in _named(some):
            which = applied[name]
            if name in moved:
                which = tuple(index for index in which if of_moved[index][1])
            members.setdefault((name in moved and bool(which), which), []).append((name, param))
        for (is_moved, which), named in members.items():
            names, params = [name for name, _ in named], [param for _, param in named]
            plans.append(
                GroupPlan(
                    role=role,
                    params=params,
                    names=names,
                    values=merged(of_moved if is_moved else overrides, which),
                    types=types,
                    where=f"overrides, {role}: " if which else "",
                )
            )
    return plans


def _named(layers: Iterable[STACLayer]) -> Iterable[tuple[str, Tensor]]:
    for layer in layers:
        yield from zip(layer.parameter_names, layer.parameters, strict=True)


def planned_as_given(given: Iterable[Any], where_of_one: str | None = None) -> list[GroupPlan]:
    """From dicts that name their ``stac_role``, in the order given.

    Args:
        given: the dicts.
        where_of_one: what stands before a name in a message, where it is not the number of a group.

    Raises:
        TypeError: no dict, or something in it of the wrong type.
        ValueError: no role, an exhausted iterator.
    """
    given, plans = list(given), []
    for index, group in enumerate(given):
        where = where_of_one or f"group {index}: "
        if not isinstance(group, Mapping):
            raise TypeError(f"{where}expected a dict, as the first group is one, got {type(group).__name__}")
        if "stac_role" not in group:
            raise ValueError(
                f"{where}stac_role must be one of 'trunk', 'cap', got None: groups must say which role they are of. To "
                "let STAC split a model, pass the model itself, and what differs between parameters as overrides: "
                f"STAC(model, {_shared_decay(given)}overrides=[(vectors(), {{'weight_decay': 0.0}})]). Where a trainer "
                'makes the groups, give it the model among the arguments: (STAC, {"model": model, ...})'
            )
        role = one_of(where + "stac_role", group["stac_role"], ROLES)
        params, names = given_params(group, where)
        plans.append(
            GroupPlan(
                role=role,
                params=params,
                names=names,
                values=checked_ratio({key: group[key] for key in group if key not in STRUCTURE_KEYS}, where),
                types=dict(zip(group.get("layer_names", ()), group.get("layer_types", ()), strict=False)),
                is_given=True,
                where=where,
                name=group.get("name"),
                rule=group.get("rule"),
            )
        )
    return plans


def _shared_decay(given: Iterable[Any]) -> str:
    """The weight decay of groups as an argument of all, where some have one and others none."""
    decays = [group.get("weight_decay", 0.0) for group in given if isinstance(group, Mapping)]
    greatest = max((decay for decay in decays if isinstance(decay, int | float)), default=0.0)
    return f"weight_decay={greatest}, " if greatest > 0 else ""
