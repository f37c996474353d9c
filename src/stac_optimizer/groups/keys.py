"""What parameter groups hold, and how that is checked.

A group holds ``params``, ``param_names`` (as torch defines it; absent where parameters came without names), ``rule``,
the common hyper-parameters and those of its rule; a group of STAC also ``stac_role``, ``name``, ``layer_names``,
``layer_types`` and ``betas``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from stac_optimizer.model.names import named_parameters
from stac_optimizer.rule import COMMON_HYPERPARAMETERS, Group, Hyperparameter, Rule
from stac_optimizer.rule.hyperparameters import EXCLUDED_FLAGS

__all__ = [
    "STRUCTURE_KEYS",
    "TORCH_KEYS",
    "check_common",
    "check_parameters",
    "checked",
    "defaults_of",
    "hyperparameters_of",
    "refuse_near_miss",
    "unshare_lr",
]

# What torch's learning-rate schedulers and weight averaging keep in groups.
TORCH_KEYS = frozenset({"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"})
STRUCTURE_KEYS = frozenset({"params", "param_names", "stac_role", "rule", "name", "layer_names", "layer_types"})
# How alike a key must be to a known one to be taken for a misspelling of it.
NEAR = 0.8
ALIASES = {"wd": "weight_decay", "learning_rate": "lr", "mu": "momentum"}


def hyperparameters_of(rule: Rule) -> dict[str, Hyperparameter]:
    """The group keys of a rule: the common ones and its own."""
    return {**COMMON_HYPERPARAMETERS, **rule.hyperparameters}


def defaults_of(rule: Rule, values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked hyper-parameters of a rule, its defaults where there is no value.

    Raises:
        TypeError: a value of the wrong type, or a name that the rule does not know.
        ValueError: a value out of range, or two that exclude each other.
    """
    known = hyperparameters_of(rule)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise TypeError(f"{rule.name} has no argument {unknown[0]!r}{_meant(unknown[0], known)}")
    return checked({**{name: each.default for name, each in known.items()}, **values}, rule)


def checked(values: Mapping[str, Any], rule: Rule, where: str = "") -> dict[str, Any]:
    """Hyper-parameters as plain Python values.

    Args:
        values: every hyper-parameter of the rule by name; other keys are passed over.
        rule: whose.
        where: what stands before each name in a message.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or two that exclude each other.
    """
    known = hyperparameters_of(rule)
    result = {name: known[name].check(where + name, value) for name, value in values.items() if name in known}
    for one, other in (*EXCLUDED_FLAGS, *rule.excluded):
        if result[one] and result[other]:
            raise ValueError(f"{where}{one} and {other} exclude each other, got {result[one]!r} and {result[other]!r}")
    if isinstance(result["lr"], Tensor) and result["foreach"] and not result["capturable"]:
        raise ValueError(f"{where}lr as a tensor with foreach=True needs capturable=True, as in torch.optim.AdamW")
    return result


def check_common(values: Mapping[str, Any], where: str) -> None:
    """Check what a foreign optimizer's group holds of the common hyper-parameters, which torch would not.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """
    for key in values.keys() & COMMON_HYPERPARAMETERS.keys():
        COMMON_HYPERPARAMETERS[key].check(where + key, values[key])


def refuse_near_miss(keys: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse keys that look like a misspelt hyper-parameter. Others pass: frameworks keep their own in groups.

    Raises:
        ValueError: naming the key and what was meant.
    """
    allowed = {*known, *STRUCTURE_KEYS, *TORCH_KEYS}
    for key in keys:
        if key not in allowed and (meant := _meant(key, known)):
            raise ValueError(f"{where}unknown key {key!r}{meant}")


def _meant(key: str, known: Collection[str]) -> str:
    bare = key.removeprefix("trunk_").removeprefix("cap_")
    guesses = [bare] if bare != key and bare in known else difflib.get_close_matches(key, known, n=1, cutoff=NEAR)
    guesses = [ALIASES[key]] if ALIASES.get(key) in known else guesses
    return f"; did you mean {guesses[0]!r}?" if guesses else ""


def check_parameters(groups: Iterable[Group], rules: Mapping[str, Rule]) -> None:
    """Refuse parameters that cannot have the hyper-parameters of their group.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, param, group in named_parameters(groups):
        if not (param.is_leaf or param.retains_grad or group.get("differentiable")):
            raise ValueError(f"{name!r}: can't optimize a non-leaf Tensor; pass the parameter that it was computed of")
        reason = rules[group["rule"]].parameter_problem(param, group)
        if reason is not None:
            raise ValueError(f"{name!r} ({group.get('stac_role', group['rule'])}) {reason}")


def unshare_lr(groups: Iterable[dict[str, Any]]) -> None:
    """Give each group a tensor lr of its own: schedulers write into it in place, group by group."""
    seen: set[int] = set()
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor):
            group["lr"] = lr = lr.clone() if id(lr) in seen else lr
            seen.add(id(lr))
