"""How parameter groups are made, of a model's partition or of given dicts. What they hold: see ``_groups.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from stac_optimizer._groups import ROLE_RULES, STRUCTURE_KEYS, TORCH_KEYS, checked, named_layers, structure_of
from stac_optimizer._layers import Layers, find_layers, unwrapped, writable
from stac_optimizer._validation import count, one_of, warn
from stac_optimizer.partition import STACPartition, split
from stac_optimizer.rules import RULES, hyperparameters
from stac_optimizer.selectors import Selector

__all__ = ["build_groups"]

# Sign steps move every weight by the full lr, so a trunk takes a smaller one than the cap beside it.
TRUNK_LR_RATIO = 0.75


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
            groups.append({"params": named, **structure_of(role, ROLE_RULES[role], layers), **role_defaults[role]})
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
        structure = {"params": params, **structure_of(role, rule, named_layers(params))}
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
