"""What parameter groups hold, and how that is checked.

A group holds ``params``, ``param_names`` (as torch defines it; absent where parameters came without names), ``rule``,
the common hyper-parameters and those of its rule; a group of STAC also ``stac_role``, ``name``, ``layer_names``,
``layer_types`` and ``betas``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stac_optimizer.groups.misspelt import few, meant
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
    "instead_of",
    "refuse_unread_keys",
    "unshare_lr",
]

# What torch's learning-rate schedulers and weight averaging keep in groups.
TORCH_KEYS = frozenset({"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"})
STRUCTURE_KEYS = frozenset({"params", "param_names", "stac_role", "rule", "name", "layer_names", "layer_types"})
FLAGS = COMMON_HYPERPARAMETERS.keys() - {"lr", "weight_decay"}
# Hyper-parameters of some optimizer: no framework keeps anything else under these names.
OF_SOME_OPTIMIZER = frozenset(
    {"amsgrad", "betas", "cautious", "dampening", "eps", "lr_ratio", "momentum", "nesterov", "state_dtype", "vote"}
)


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
        raise TypeError(f"{rule.name} has no argument {unknown[0]!r}{instead_of(unknown[0], known)}")
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
            raise ValueError(
                f"{where}{one} and {other} exclude each other, got {result[one]!r} and {result[other]!r}; leave out "
                "one of them"
            )
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


def refuse_unread_keys(
    keys: Iterable[str], known: Collection[str], where: str, whose: str, *, of_overrides: bool = False
) -> None:
    """Refuse keys that look like a misspelt hyper-parameter, or are another optimizer's.

    Others pass in groups, for frameworks keep their own there; in overrides nothing else would read them.

    Args:
        keys: of a group.
        known: those that something reads.
        where: what stands before a name in a message.
        whose: what reads them.
        of_overrides: whether these are keys of an override, and of no group.

    Raises:
        TypeError: a key that is no string.
        ValueError: naming the key and what was meant.
    """
    allowed = set(known) if of_overrides else {*known, *STRUCTURE_KEYS, *TORCH_KEYS}
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"{where}keys must be strings, got {key!r} of type {type(key).__name__}")
        if key in allowed:
            continue
        name = meant(key, known)
        if name is not None and key not in OF_SOME_OPTIMIZER:
            raise ValueError(f"{where}unknown key {key!r}; did you mean {name!r}?")
        if of_overrides:
            raise ValueError(
                f"{where}{key!r} is no hyper-parameter of {whose}, which has {few(known, FLAGS)}; leave it out, or "
                "select parameters of the other role alone"
            )
        if key in OF_SOME_OPTIMIZER:
            raise ValueError(f"{where}{key!r} is no hyper-parameter of {whose}{instead_of(key, known)}")


def instead_of(key: str, known: Collection[str]) -> str:
    """For a message: what an unknown key was meant to be, or which there are."""
    name = meant(key, known)
    return f"; did you mean {name!r}?" if name is not None else f"; it has {few(known, FLAGS)}"


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
    """Give each group a tensor lr of its own: schedulers write into it in place, group by group, in any context."""
    seen: set[int] = set()
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor):
            if lr.is_inference():
                with torch.inference_mode(mode=False):
                    lr = lr.clone()
            group["lr"] = lr = lr.clone() if id(lr) in seen else lr
            seen.add(id(lr))
