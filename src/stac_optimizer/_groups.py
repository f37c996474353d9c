"""Parameter groups: what they hold, how that is checked, and what of the partition they tell.

Every group has the same keys: ``params``, ``param_names`` (as torch defines it; absent for explicit groups without
names), ``stac_role``, ``rule``, ``layer_names``, ``layer_types``, and the hyper-parameters of all rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from stac_optimizer._layers import STACLayer, layer_of
from stac_optimizer.partition import STACPartition
from stac_optimizer.rules import RULES, Group, hyperparameters

__all__ = [
    "ROLE_RULES",
    "STRUCTURE_KEYS",
    "TORCH_KEYS",
    "check_fitness",
    "check_vote",
    "checked",
    "name_of",
    "named_layers",
    "named_parameters",
    "partition_of",
    "structure_of",
]

ROLE_RULES = {"trunk": "sign_momentum", "cap": "adamw"}


# What torch's learning-rate schedulers and weight averaging keep in groups.
TORCH_KEYS = frozenset({"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"})
# A rounded step is flat in lr and weight, so there is nothing to differentiate.
EXCLUSIVE_FLAGS = (
    ("fused", "foreach"),
    ("fused", "differentiable"),
    ("foreach", "differentiable"),
    ("stochastic_rounding", "differentiable"),
    # The host waits for the votes of others, and masks and recorded steps know of one rank's gradients alone.
    ("trunk_vote", "trunk_cautious"),
    ("trunk_vote", "differentiable"),
    ("trunk_vote", "capturable"),
)
STRUCTURE_KEYS = frozenset({"params", "param_names", "stac_role", "rule", "layer_names", "layer_types"})


def checked(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Hyper-parameters as plain Python values.

    Args:
        values: every hyper-parameter by name; other keys are passed over.
        where: what stands before each name in a message.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or two that exclude each other.
    """
    known = hyperparameters()
    result = {name: known[name].check(where + name, value) for name, value in values.items() if name in known}
    for one, other in EXCLUSIVE_FLAGS:
        if result[one] and result[other]:
            raise ValueError(f"{where}{one} and {other} exclude each other, got {result[one]!r} and {result[other]!r}")
    if isinstance(result["lr"], Tensor) and result["foreach"] and not result["capturable"]:
        raise ValueError(f"{where}lr as a tensor with foreach=True needs capturable=True, as in torch.optim.AdamW")
    return result


def named_layers(params: Iterable[Any]) -> list[STACLayer]:
    """The layers that (name, parameter) pairs form, in order of appearance; none of parameters without names."""
    members: dict[str, list[tuple[str, Tensor]]] = {}
    for item in params:
        if isinstance(item, tuple):
            members.setdefault(layer_of(item[0]), []).append(item)
    return [
        STACLayer(name=name, parameter_names=tuple(n for n, _ in named), parameters=tuple(p for _, p in named))
        for name, named in members.items()
    ]


def structure_of(role: str, rule: str, layers: Iterable[STACLayer]) -> dict[str, Any]:
    """What a group says of itself besides its parameters and hyper-parameters."""
    names_and_types = [(layer.name, layer.type_name) for layer in layers]
    return {
        "stac_role": role,
        "rule": rule,
        "layer_names": tuple(name for name, _ in names_and_types),
        "layer_types": tuple(type_name for _, type_name in names_and_types),
    }


def check_fitness(groups: Iterable[Group]) -> None:
    """Refuse parameters that cannot have the hyper-parameters of their group.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, param, group in named_parameters(groups):
        reason = RULES[group["rule"]].unfitness(param, group)
        if reason is not None:
            raise ValueError(f"{name!r} ({group['stac_role']}) {reason}")


def check_vote(groups: Iterable[Group], encoding: str | None) -> None:
    """Refuse groups whose ranks are to vote otherwise than the optimizer's."""
    for index, group in enumerate(groups):
        if group["trunk_vote"] != encoding:
            raise ValueError(
                f"group {index}: trunk_vote is {group['trunk_vote']!r}, which vote=MajorityVote(...) alone can set; it "
                f"is {encoding!r}"
            )


def named_parameters(groups: Iterable[Group]) -> Iterator[tuple[str, Tensor, Group]]:
    """Every parameter with a name to call it by, and its group.

    Names that are not as many as the parameters are of others: DeepSpeed puts flat partitions in their place.
    """
    for index, group in enumerate(groups):
        names = group.get("param_names") or ()
        if len(names) != len(group["params"]):
            names = [f"<group {index}>.{number}" for number in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            yield name, param, group


def name_of(groups: Iterable[Group], param: Tensor) -> str:
    """The name of a parameter that is in one of the groups."""
    return next(name for name, named, _ in named_parameters(groups) if named is param)


def partition_of(groups: Iterable[Group], state: Mapping[Tensor, Mapping[str, Tensor]]) -> STACPartition:
    """The partition that groups hold, with the bytes of their parameters' state."""
    groups = list(groups)
    types = {
        name: kind for group in groups for name, kind in zip(group["layer_names"], group["layer_types"], strict=True)
    }
    held = list(named_parameters(groups))
    group_of = {id(param): group for _, param, group in held}

    def nbytes(param: Tensor) -> int:
        group = group_of[id(param)]
        return RULES[group["rule"]].nbytes(param, state.get(param, {}), group)

    def layers(role: str) -> tuple[STACLayer, ...]:
        named = [(name, param) for name, param, group in held if group["stac_role"] == role]
        return tuple(
            replace(
                layer,
                type_name=types.get(layer.name, ""),
                state_bytes=sum(map(nbytes, layer.parameters)),
                amsgrad=any(group["amsgrad"] for group in groups),
            )
            for layer in named_layers(named)
        )

    return STACPartition(trunk_layers=layers("trunk"), cap_layers=layers("cap"))
