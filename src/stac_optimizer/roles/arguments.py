"""STAC's arguments: each checked under its own name, and what one role alone reads refused beside another optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from stac_optimizer.distributed.vote import MajorityVote
from stac_optimizer.groups.misspelt import meant
from stac_optimizer.optim import AdamW, Signum
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.roles.updater import Updater
from stac_optimizer.rule import COMMON_HYPERPARAMETERS
from stac_optimizer.validation import warn

__all__ = [
    "changed",
    "checked_own",
    "checked_shared",
    "naming_what_was_meant",
    "refuse_unread",
    "refuse_unread_shared",
    "rule_arguments",
    "warn_of_empty_role",
]

Init = TypeVar("Init", bound=Callable[..., None])

OWN: Mapping[str, type[RuleOptimizer]] = {"trunk": Signum, "cap": AdamW}


def checked_shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """What both roles take: the hyper-parameters that all rules have, and betas, which schedulers look for.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """
    known = {**COMMON_HYPERPARAMETERS, "betas": AdamW.rule.hyperparameters["betas"]}
    return {name: known[name].check(name, value) for name, value in values.items()}


def checked_own(role: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What one role has in place of a shared argument; None where nothing was given."""
    return {
        name: None if value is None else COMMON_HYPERPARAMETERS[name].check(f"{role}_{name}", value)
        for name, value in values.items()
    }


def rule_arguments(kind: type[RuleOptimizer], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a role's own rule, checked under the names that STAC has for them.

    Args:
        kind: the class of the rule.
        values: by STAC's name; after ``trunk_`` that of the rule.
    """
    known = kind.rule.hyperparameters
    bare = {name: name.removeprefix("trunk_") for name in values}
    return {bare[name]: known[bare[name]].check(name, value) for name, value in values.items()}


def refuse_unread(role: str, function: object, values: Mapping[str, Any], *, vote: MajorityVote | None = None) -> None:
    """Refuse arguments of a role's own rule beside an optimizer given for the role, which would not read them.

    Raises:
        TypeError: a vote that is none.
        ValueError: an argument that is not at its default.
    """
    if vote is not None and not isinstance(vote, MajorityVote):
        raise TypeError(f"vote must be a MajorityVote or None, got {type(vote).__name__}")
    given = changed(role, values, vote=vote)
    if function is not None and given:
        name, value = next(iter(given.items()))
        bare = name.removeprefix("trunk_")
        shown = "..." if name == "vote" else repr(value)
        kind = getattr(function, "func", function)
        remedy = f"write it there: {role}_optimizer=functools.partial(..., {bare}={shown})"
        if isinstance(kind, type) and bare not in inspect.signature(kind).parameters:
            remedy = f"leave it out, for {kind.__name__} has none"
        raise ValueError(
            f"{name} is for the {role}'s own {OWN[role].__name__}, got {value!r} beside {role}_optimizer; {remedy}"
        )


def changed(role: str, values: Mapping[str, Any], *, vote: MajorityVote | None = None) -> dict[str, Any]:
    """Those of the arguments of a role's own rule that are not at their defaults."""
    known = OWN[role].rule.hyperparameters
    given = {name: value for name, value in values.items() if value != known[name.removeprefix("trunk_")].default}
    return given if vote is None else {**given, "vote": vote}


def refuse_unread_shared(shared: Mapping[str, Any], updaters: Mapping[str, Updater]) -> None:
    """Refuse shared arguments that a foreign optimizer, or a function that has written its own, does not read.

    Args:
        shared: the checked arguments.
        updaters: of the roles that have parameters.

    Raises:
        ValueError: an argument, not at its default, that no role reads; a decay or rounding that one of them does not.
    """
    for name, value in shared.items():
        # Roles that disagree on maximize are refused elsewhere; STAC itself reads the others.
        is_default = name in ("betas", "error_if_nonfinite", "maximize") or (
            not isinstance(value, Tensor) and value == COMMON_HYPERPARAMETERS[name].default
        )
        unread = [] if is_default else [role for role, updater in updaters.items() if not updater.reads(name)]
        is_lost = name == "stochastic_rounding" or (
            name == "weight_decay" and any(updaters[r].kind for r in unread if name not in updaters[r].written)
        )
        written = [role for role in unread if name in updaters[role].written]
        lost = [role for role in unread if role not in written]
        if lost and (is_lost or len(unread) == len(updaters)):
            own = f", and {'cap' if lost[0] == 'trunk' else 'trunk'}_weight_decay for the other role"
            raise ValueError(
                f"{name} is {value!r}, and {lost[0]}_optimizer does not read it: write there what it takes"
                f"{own if name == 'weight_decay' and len(unread) < len(updaters) else ''}"
            )


def warn_of_empty_role(role: str, own: Mapping[str, Any]) -> None:
    """Warn of arguments for a role that has no parameters."""
    for name, value in own.items():
        if value is not None:
            warn(f"{name} is {value!r}, and the {role} has no parameters: nothing reads it. Leave it out")


def naming_what_was_meant(init: Init) -> Init:
    """A constructor that says of an argument it does not have which was meant, in place of Python's bare refusal."""
    arguments = list(inspect.signature(init).parameters.values())[1:]
    known = [argument.name for argument in arguments]
    positional = [argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD]

    @functools.wraps(init)
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            name = meant(unknown, known)
            way = (
                f"what another optimizer takes is written in that, trunk_optimizer=functools.partial(..., {unknown}="
                "...); help(STAC) shows STAC's own"
            )
            raise TypeError(f"STAC has no argument {unknown!r}; {way if name is None else f'did you mean {name!r}?'}")
        if len(args) > len(positional):
            raise TypeError(
                f"STAC takes {' and '.join(positional)} by position, got {len(args)} values; give the others by name, "
                "such as betas=(0.9, 0.95)"
            )
        init(self, *args, **kwargs)

    return told  # type: ignore[return-value]  # the same signature, which wraps keeps for readers
