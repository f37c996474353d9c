"""Parameter groups: what they hold, how they are made of a partition or of given group dicts, and how they are checked.

Every group has the same keys: ``params``, ``param_names`` (as torch defines it; absent for explicit groups without
names), ``stac_role``, ``rule``, ``layer_names``, ``layer_types``, and the hyper-parameters of all rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stac_optimizer._layers import Layers, STACLayer, find_layers, layer_of, unwrapped, writable
from stac_optimizer._validation import count, one_of, warn
from stac_optimizer.partition import STACPartition, split
from stac_optimizer.rules import RULES, Group, hyperparameters
from stac_optimizer.selectors import Selector

__all__ = [
    "ROLE_RULES",
    "STRUCTURE_KEYS",
    "TORCH_KEYS",
    "build_groups",
    "check_fitness",
    "check_vote",
    "checked",
    "name_of",
    "named_parameters",
    "partition_of",
]

ROLE_RULES = {"trunk": "sign_momentum", "cap": "adamw"}

# Sign steps move every weight by the full lr, so a trunk takes a smaller one than the cap beside it.
TRUNK_LR_RATIO = 0.75

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


def build_groups(
    params: nn.Module | Iterable[Any],
    defaults: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    *,
    last_n_layers: int,
    cap: Selector | None,
) -> list[dict[str, Any]]:
    """The groups that STAC's arguments ask for: of a model one for each role that has layers, trunk first.

    Args:
        params: a module, named parameters, or group dicts.
        defaults: the hyper-parameters that all groups share.
        own: by role what it was given for itself; None where nothing was.
        last_n_layers: see :func:`stac_optimizer.partition_trainable_layers`.
        cap: likewise.
    """
    last_n_layers = count("last_n_layers", last_n_layers)
    if isinstance(params, Tensor | str | set | frozenset) or not isinstance(params, Iterable | nn.Module):
        raise TypeError(f"params must be a module, named parameters or group dicts, got {type(params).__name__}")
    if isinstance(params, Mapping):
        raise TypeError(
            "params must be a module, named parameters or group dicts with a stac_role, got one dict: put it in a list"
        )
    given = params if isinstance(params, nn.Module) else list(params)
    if isinstance(given, list) and given and isinstance(given[0], Mapping):
        for name, value, default in (("cap", cap, None), ("last_n_layers", last_n_layers, 1)):
            if value != default:
                raise ValueError(
                    f"{name} chooses layers of a model, got {value!r} beside groups that name their stac_role"
                )
        both = len({str(group.get("stac_role")) for group in given if isinstance(group, Mapping)}) > 1
        groups = _explicit_groups(given, _role_defaults(defaults, own, both))
    else:
        layers = find_layers(given)
        partition = split(layers, last_n_layers=last_n_layers, cap=cap)
        both = bool(partition.trunk_layers and partition.cap_layers)
        groups = _partition_groups(partition, _role_defaults(defaults, own, both))
        if defaults["trunk_momentum"] and not defaults["trunk_cautious"]:
            _warn_of_embeddings(layers, partition)
    _unshare_lr(groups)
    return groups


def _role_defaults(
    defaults: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]], both: bool
) -> dict[str, dict[str, Any]]:
    """The defaults of each role: shared ones, its own where given, and the trunk's smaller lr beside a cap."""
    result = {}
    for role in ROLE_RULES:
        known = hyperparameters()
        given = {name: value for name, value in own[role].items() if value is not None}
        result[role] = {**defaults, **{name: known[name].check(f"{role}_{name}", given[name]) for name in given}}
    if both and own["trunk"]["lr"] is None:
        result["trunk"]["lr"] = TRUNK_LR_RATIO * defaults["lr"]
    for role in ROLE_RULES:
        checked(result[role], f"{role}: ")
    return result


def _unshare_lr(groups: Iterable[dict[str, Any]]) -> None:
    """Give each group a tensor lr of its own: schedulers write into it in place, group by group."""
    seen: set[int] = set()
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone() if id(group["lr"]) in seen else group["lr"]
            seen.add(id(group["lr"]))


def _warn_of_embeddings(layers: Layers, partition: STACPartition) -> None:
    trunk = set(partition.trunk_layer_names)
    found = [
        layer.name
        for layer, module in zip(layers.layers, layers.modules, strict=True)
        if layer.name in trunk and isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    ]
    if found:
        what = "the embedding" if len(found) == 1 else "the embeddings"
        warn(
            f"the trunk holds {what} {', '.join(map(repr, found))}: rows of tokens that are absent from a batch keep "
            "moving by the full lr, for the sign of their gradient average outlives their gradient. Pass "
            "trunk_cautious=True, or put embeddings in the cap with cap=last_layers(1) | embeddings()"
        )


def _partition_groups(partition: STACPartition, role_defaults: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for role, layers in (("trunk", partition.trunk_layers), ("cap", partition.cap_layers)):
        if layers:
            named = [item for layer in layers for item in zip(layer.parameter_names, layer.parameters, strict=True)]
            groups.append({"params": named, **_structure(role, ROLE_RULES[role], layers), **role_defaults[role]})
    return groups


def _explicit_groups(given: Iterable[Any], role_defaults: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups from dicts that name their ``stac_role``, in the order given.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a role or rule that does not exist, an unknown key, an exhausted iterator, a value out of range.
    """
    allowed = STRUCTURE_KEYS | TORCH_KEYS | set(hyperparameters())
    groups = []
    for index, group in enumerate(given):
        where = f"group {index}: "
        if not isinstance(group, Mapping):
            raise TypeError(f"{where}expected a dict, as the first group is one, got {type(group).__name__}")
        role = one_of(where + "stac_role", group.get("stac_role"), tuple(ROLE_RULES))
        rule = one_of(where + "rule", group.get("rule", ROLE_RULES[role]), tuple(RULES))
        unknown = [key for key in group if key not in allowed]
        if unknown:
            raise ValueError(f"{where}unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")
        params = _given_params(group, where)
        structure = {"params": params, **_structure(role, rule, _named_layers(params))}
        kept = {key: group[key] for key in group if key in TORCH_KEYS}
        groups.append({**structure, **kept, **checked({**role_defaults[role], **group}, where)})
    items = [item for group in groups for item in group["params"]]
    _refuse_repeated(items)
    if any(isinstance(item, tuple) for item in items):
        for group in groups:
            if not group["params"]:
                group["param_names"] = []  # torch wants names in every group or in none
    return groups


def _refuse_repeated(items: Iterable[Any]) -> None:
    """A parameter that stands twice would be moved twice, and checkpoints tell parameters by their names."""
    names: set[str] = set()
    seen: set[int] = set()
    for item in items:
        name, param = item if isinstance(item, tuple) else ("", item)
        if name and name in names:
            raise ValueError(f"params has the name {name!r} twice")
        if id(param) in seen:
            raise ValueError(
                f"params has one parameter twice, of shape {tuple(param.shape)}{name and f', named {name!r}'}"
            )
        names.add(name)
        seen.add(id(param))


def _given_params(group: Mapping[str, Any], where: str) -> list[Any]:
    """Parameters, or (name, parameter) pairs, of a given group."""
    if "params" not in group:
        raise ValueError(f"{where}params is missing")
    params = group["params"]
    if not isinstance(params, Iterable) or isinstance(params, set | frozenset | str | Mapping):
        raise TypeError(
            f"{where}params must be a parameter or an ordered iterable of them, got {type(params).__name__}"
        )
    # An empty list is meant, as a wrapper means it that deals parameters out to ranks.
    is_meant = isinstance(params, list | tuple)
    params = [params] if isinstance(params, Tensor) else list(params)
    if not params and not is_meant:
        raise ValueError(
            f"{where}params must hold at least one parameter, got an iterator that yields none and may have been "
            "exhausted before; a group that is meant to be empty takes an empty list"
        )
    names = group.get("param_names")
    if names is not None and not isinstance(names, list | tuple):
        raise TypeError(f"{where}param_names must be a list of names, got {type(names).__name__}")
    if names is not None and len(names) != len(params):
        raise ValueError(f"{where}param_names must name each of {len(params)} parameters, got {len(names)} names")
    items = list(zip(names, params, strict=True)) if names is not None else params
    return [_given_param(item, f"{where}parameter {number}") for number, item in enumerate(items)]


def _given_param(item: Any, where: str) -> Any:
    """A parameter, or a (name, parameter) pair with the name freed of wrappers."""
    if isinstance(item, Tensor):
        return writable(where, item)
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    if not (is_pair and isinstance(item[0], str) and isinstance(item[1], Tensor)):
        raise TypeError(
            f"{where} must be a parameter or a (name, parameter) pair with a name of type str, got {item!r}"
        )
    return unwrapped(item[0]), writable(item[0], item[1])


def _named_layers(params: Iterable[Any]) -> list[STACLayer]:
    """The layers that (name, parameter) pairs form, in order of appearance; none of parameters without names."""
    members: dict[str, list[tuple[str, Tensor]]] = {}
    for item in params:
        if isinstance(item, tuple):
            members.setdefault(layer_of(item[0]), []).append(item)
    return [
        STACLayer(name=name, parameter_names=tuple(n for n, _ in named), parameters=tuple(p for _, p in named))
        for name, named in members.items()
    ]


def _structure(role: str, rule: str, layers: Iterable[STACLayer]) -> dict[str, Any]:
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
            for layer in _named_layers(named)
        )

    return STACPartition(trunk_layers=layers("trunk"), cap_layers=layers("cap"))
