"""Groups as a user gives them: parameters, (name, parameter) pairs or dicts, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from stac_optimizer.groups.keys import checked, hyperparameters_of, refuse_unread_keys, unshare_lr
from stac_optimizer.model.layers import writable
from stac_optimizer.model.names import unwrapped
from stac_optimizer.rule import Rule

__all__ = ["RoleGroup", "given_groups", "given_params", "settle_names"]


WHAT_TO_PASS = "pass model.parameters(), or model.named_parameters()"


class RoleGroup(dict[str, Any]):
    """A group of a role of STAC, which itself asks other ranks, and warns, once its groups are complete.

    Args:
        values: what it holds.
        where: what stands before a name in a message.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def given_groups(params: Any, rule: Rule, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of an optimizer of one rule.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with ``params`` and hyper-parameters of their own.
        rule: the rule.
        defaults: what groups have where they say nothing.

    Raises:
        TypeError: what is given, or a value in it, is of the wrong type.
        ValueError: nothing is given, twice the same, a misspelt key, a value out of range.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params must be parameters or group dicts, got the module {type(params).__name__}; {WHAT_TO_PASS}"
        )
    if isinstance(params, Tensor | str | set | frozenset | Mapping) or not isinstance(params, Iterable):
        one = isinstance(params, Mapping) and "params" in params
        raise TypeError(
            f"params must be an ordered iterable of parameters or dicts, got {type(params).__name__}; "
            f"{'put the group in a list, [group]' if one else WHAT_TO_PASS}"
        )
    given = list(params)
    if not given:
        raise ValueError(
            "params holds no parameter, and at least one trainable parameter is needed; an iterator such as "
            "model.parameters() can be used only once"
        )
    groups = [_given_group(group, f"group {index}: ", rule, defaults) for index, group in enumerate(_as_dicts(given))]
    settle_names(groups)
    unshare_lr(groups)
    return groups


def _as_dicts(given: list[Any]) -> list[Any]:
    return given if isinstance(given[0], Mapping) else [{"params": given}]


def _given_group(group: Any, where: str, rule: Rule, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(group, Mapping):
        raise TypeError(f"{where}expected a dict, as the first group is one, got {type(group).__name__}")
    where = group.where if isinstance(group, RoleGroup) else where
    if not isinstance(group, RoleGroup):
        refuse_unread_keys(group, hyperparameters_of(rule), where, rule.name)
    params, names = given_params(group, where)
    result = {**group, "params": params, "rule": rule.name}
    result.pop("param_names", None)
    if names is not None:
        result["param_names"] = names
    return {**result, **checked({**defaults, **group}, rule, where)}


def settle_names(groups: list[dict[str, Any]]) -> None:
    """Refuse what stands twice, and let all groups have names or none, as torch wants it.

    Raises:
        ValueError: a parameter or a name that stands twice, or groups with and without names.
    """
    _refuse_repeated((name, param) for group in groups for name, param in _named(group))
    has_names = any("param_names" in group for group in groups)
    for index, group in enumerate(groups):
        if has_names and not group["params"]:
            group["param_names"] = []
        if ("param_names" in group) != has_names:
            raise ValueError(
                f"group {index}: its parameters have no names, and those of other groups have; give (name, parameter) "
                "pairs in every group, or in none"
            )


def _named(group: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    return zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True)


def _refuse_repeated(named: Iterable[tuple[str, Tensor]]) -> None:
    """A parameter that stands twice would be moved twice, and checkpoints tell parameters by their names."""
    names: set[str] = set()
    seen: set[int] = set()
    for name, param in named:
        if name and name in names:
            raise ValueError(f"params has the name {name!r} twice; each parameter needs a name of its own")
        if id(param) in seen:
            raise ValueError(
                f"params has one parameter twice, of shape {tuple(param.shape)}{name and f', named {name!r}'}; leave "
                "out one of the places"
            )
        names.add(name)
        seen.add(id(param))


def given_params(group: Mapping[str, Any], where: str) -> tuple[list[Tensor], list[str] | None]:
    """The parameters of a given group, and their names; None where they came without.

    Raises:
        TypeError: something of the wrong type.
        ValueError: no parameters, an exhausted iterator, names of some alone.
    """
    items = _given_items(group, where)
    names = [item[0] for item in items if isinstance(item, tuple)]
    if names and len(names) != len(items):
        raise ValueError(f"{where}params must all have names or none, got {len(names)} names for {len(items)}")
    return [item[1] if isinstance(item, tuple) else item for item in items], names or None


def _given_items(group: Mapping[str, Any], where: str) -> list[Any]:
    if "params" not in group:
        raise ValueError(f"{where}params is missing; a group holds its parameters under 'params'")
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
