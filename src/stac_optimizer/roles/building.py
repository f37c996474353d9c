"""From plans, and what updates each role, to complete groups: at construction, and of groups that are added later."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stac_optimizer.groups.given import settle_names
from stac_optimizer.groups.keys import (
    check_common,
    checked,
    hyperparameters_of,
    instead_of,
    refuse_unread_keys,
    unshare_lr,
)
from stac_optimizer.roles.arguments import warn_of_empty_role
from stac_optimizer.roles.guests.guest import Guest
from stac_optimizer.roles.overrides import LR_RATIO, with_lr_of_ratio
from stac_optimizer.roles.plan import ROLES, GroupPlan
from stac_optimizer.roles.updater import Updater, fresh
from stac_optimizer.rule import Rule

__all__ = ["group_of_guest", "group_of_rule", "groups_of"]

WHERE = "param_group: "


def groups_of(
    plans: Sequence[GroupPlan], updaters: Mapping[str, Updater], given: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The groups that were planned, in their order, and by role what groups that are added later begin with.

    Args:
        plans: of both roles.
        updaters: by role what updates it.
        given: by role its own arguments that were given, for a warning where it has no parameters.

    Raises:
        TypeError: a function that returns no optimizer, or a value of the wrong type.
        ValueError: a value out of range, something that stands twice, roles that disagree on maximize.
    """
    by_role = {role: [plan for plan in plans if plan.role == role] for role in ROLES}
    groups: dict[int, dict[str, Any]] = {}
    new_values: dict[str, dict[str, Any]] = {}
    for role, some in by_role.items():
        has_other = any(others for other, others in by_role.items() if other != role)
        made = updaters[role].groups(some, has_other=has_other) if some else []
        groups.update((id(plan), group) for plan, group in zip(some, made, strict=True))
        if not some:
            warn_of_empty_role(role, given[role])
        new_values[role] = fresh(updaters[role].values_of_new_groups(made, has_other=has_other))
    result = [groups[id(plan)] for plan in plans]
    settle_names(result)
    unshare_lr(result)
    sides = {bool(group.get("maximize", False)) for group in result}
    if len(sides) > 1 or (updaters["trunk"].offered["maximize"] and sides == {False}):
        raise ValueError(
            "the roles disagree on maximize: one ascends and the other descends; give the same to STAC and to "
            "trunk_optimizer and cap_optimizer"
        )
    return result, new_values


def group_of_rule(plan: GroupPlan, rule: Rule, values: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A group that is added to a role of a rule.

    Args:
        plan: of the group.
        rule: of the role.
        values: what such groups begin with.
        index: its place among the groups of its role.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a misspelt key, or a value out of range.
    """
    given = [key for key in plan.values if key != "betas"]  # for schedulers that cycle momentum, in every group
    refuse_unread_keys(given, {*hyperparameters_of(rule), LR_RATIO}, WHERE, f"{rule.name} ({plan.role})")
    whole = with_lr_of_ratio({**values, **plan.values}, values["lr"])
    # Fresh, or a schedule of this group would move what the next one begins with.
    group = fresh({**whole, **checked(whole, rule, WHERE)})
    return {**group, "params": plan.params, **plan.structure(index, rule.name)}


def group_of_guest(
    plan: GroupPlan, guest: Guest, values: Mapping[str, Any], index: int, *, known: Collection[str]
) -> dict[str, Any]:
    """The same of a role of a foreign optimizer, which completes it.

    Args:
        plan: of the group.
        guest: of the role.
        values: what such groups begin with.
        index: its place among the groups of its role.
        known: keys that some optimizer would read.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a key that is misspelt or that the optimizer does not have, a value out of range, or an optimizer of
            one group alone.
    """
    if guest.needs_closure:
        raise ValueError(f"{WHERE}{guest.rule.name} takes one group alone; give it all parameters at construction")
    read = {*guest.optimizer.defaults, *guest.groups[0], LR_RATIO}
    unread = [key for key in plan.values if key in known and key not in read]
    if unread:
        name = guest.rule.name
        raise ValueError(f"{WHERE}{unread[0]!r} is no hyper-parameter of {name}{instead_of(unread[0], read)}")
    refuse_unread_keys([key for key in plan.values if key != "betas"], read, WHERE, f"{guest.rule.name} ({plan.role})")
    check_common(plan.values, WHERE)
    whole = fresh(with_lr_of_ratio({**values, **plan.values}, guest.groups[0].get("lr")))
    return {**whole, **plan.structure(index, guest.rule.name), "params": list(plan.params)}
