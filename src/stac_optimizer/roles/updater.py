"""What updates a role: from the function that a user gives, and STAC's arguments, to complete groups.

What is written in the function stands. What is not comes from STAC's arguments: of a class, or a ``functools.partial``
of one, it is known what that is; any other function has written everything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.distributed.vote import MajorityVote
from stac_optimizer.groups.given import RoleGroup
from stac_optimizer.groups.keys import check_common, defaults_of, hyperparameters_of, refuse_unread_keys
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.roles.guests.guest import MATRIX_CLASSES, Guest
from stac_optimizer.roles.guests.own_state import guest_of
from stac_optimizer.roles.overrides import LR_RATIO
from stac_optimizer.roles.plan import GroupPlan
from stac_optimizer.rule import Rule

__all__ = ["OptimizerFunction", "Updater", "fresh"]

OptimizerFunction = Callable[[Any], Optimizer]
"""From parameter groups to an optimizer of them: a class, a ``functools.partial`` of one, a lambda."""


@dataclass(kw_only=True)
class Updater:
    """What updates one role.

    Args:
        role: the role.
        function: the user's, or that of the role's own rule.
        offered: STAC's shared arguments by name, for what the function has not written.
        own: likewise those of the role alone, such as ``trunk_lr``; None where nothing was given.
    """

    role: str
    function: OptimizerFunction
    offered: Mapping[str, Any]
    own: Mapping[str, Any]
    guest: Guest | None = field(default=None, init=False)
    rule: Rule | None = field(default=None, init=False)
    vote: MajorityVote | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        name = f"{self.role}_optimizer"
        if isinstance(self.function, Optimizer) or not callable(self.function):
            raise TypeError(
                f"{name} must be a function of parameters that returns an optimizer, such as a class or a "
                f"functools.partial of one, got {self.function!r} of type {type(self.function).__name__}"
            )
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        self.kind = function if isinstance(function, type) and issubclass(function, Optimizer) else None
        is_native = self.kind is not None and issubclass(self.kind, RuleOptimizer)
        self.native: Rule | None = getattr(self.kind, "rule", None) if is_native else None
        self.rule = self.native
        self.written = self.function.keywords if isinstance(self.function, functools.partial) else {}
        for key, value in self.own.items():
            if value is not None and (key in self.written or not self._takes(key)):
                why = f"{key} is written there too" if key in self.written else f"it does not take {key} from here"
                raise ValueError(
                    f"{self.role}_{key} is given beside {name} ({_name(self.function)}), and {why}; write it in {name} "
                    f"alone, for example functools.partial(..., {key}={value!r})"
                )

    @property
    def known(self) -> Set[str]:
        """The hyper-parameters of its rule, where that is known before it is called."""
        return frozenset() if self.native is None else hyperparameters_of(self.native).keys()

    def takes_parameter(self, param: Tensor) -> bool:
        """Whether what updates the role can update this parameter."""
        if self.native is not None:
            return self.native.takes(param)
        is_matrix_class = self.kind is not None and issubclass(self.kind, MATRIX_CLASSES)
        return not is_matrix_class or param.ndim == 2

    def _base(self, *, has_other: bool) -> dict[str, Any]:
        """What groups of the role have, where they say nothing, of STAC's arguments."""
        offered = {key: value for key, value in self.offered.items() if key != "betas"}  # of the cap's AdamW alone
        base = {key: value for key, value in offered.items() if self.reads(key)}
        if "lr" in base and has_other and self.native is not None and self.native.lr_ratio != 1:
            base["lr"] = base["lr"] * self.native.lr_ratio
        return base | {key: value for key, value in self.own.items() if value is not None}

    def reads(self, key: str) -> bool:
        """Whether the role takes this argument of STAC's."""
        return key not in self.written and self._takes(key)

    def _takes(self, key: str) -> bool:
        """Whether a value that the function has not written can be given to it in groups."""
        if self.kind is None:
            return False
        if self.native is not None:
            return key in hyperparameters_of(self.native)
        # Flags of a foreign class are those of its function.
        known = inspect.signature(self.kind).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        return key in ("lr", "weight_decay") and (key in known or takes_any)

    def groups(self, plans: Sequence[GroupPlan], *, has_other: bool) -> list[dict[str, Any]]:
        """Complete groups of this role.

        Args:
            plans: those of the role.
            has_other: whether there is another role beside it.

        Raises:
            TypeError: the function returns no optimizer, or a value of the wrong type.
            ValueError: a value out of range, a key that the optimizer does not have, other parameters than were given.
        """
        base = self._base(has_other=has_other)
        given = []
        for plan in plans:
            values = {key: value for key, value in plan.values.items() if key != LR_RATIO}
            params = _pairs(plan) if plan.names is not None and self.native is not None else plan.params
            where = {"stac_role": self.role} if self.native is not None else {}
            given.append({"params": list(params), **where, **base, **fresh(values)})
        wheres = [plan.where or f"{self.role}: " for plan in plans]
        optimizer = self.function(list(map(RoleGroup, given, wheres)))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{self.role}_optimizer must return an optimizer, got {type(optimizer).__name__}; write a class, a "
                "functools.partial of one, or lambda groups: SGD(groups, lr=0.1)"
            )
        groups = self._taken_over(optimizer, plans, given)
        written_lr = self.written.get("lr")
        for index, (plan, group) in enumerate(zip(plans, groups, strict=True)):
            self._check_values(plan, group, optimizer)
            if LR_RATIO in plan.values:
                if "lr" not in group:
                    raise ValueError(
                        f"{self.role}: {type(optimizer).__name__} has no lr for lr_ratio to multiply; leave it out"
                    )
                group["lr"] = group["lr"] * plan.values[LR_RATIO]
            group.update(plan.structure(index, self.rule.name if self.rule else ""))
            if self.native is None:  # STAC itself asks for finite gradients, whatever the function has written
                group["error_if_nonfinite"] = group.get("error_if_nonfinite") or self.offered["error_if_nonfinite"]
            group.setdefault("betas", self.offered["betas"])
            if isinstance(written_lr, Tensor) and group["lr"] is written_lr:
                group["lr"] = written_lr.clone()  # or it would be one lr of all optimizers that the function makes
        return groups

    def values_of_new_groups(self, made: Sequence[Mapping[str, Any]], *, has_other: bool) -> dict[str, Any]:
        """What a group that is added later begins with; nothing where that cannot be known.

        Args:
            made: the role's groups.
            has_other: whether there is another role beside it.
        """
        if self.guest is not None:
            return self._base(has_other=has_other)
        if self.native is None:  # a function that has written all of an optimizer of this package
            rule = self.rule
            keys = () if rule is None else (*hyperparameters_of(rule), "betas", "rule")
            return {key: made[0][key] for key in keys} if made else {}
        known = hyperparameters_of(self.native)
        written = {key: value for key, value in self.written.items() if key in known}
        if "vote" in written:
            written["vote"] = getattr(written["vote"], "encoding", None)
        values = defaults_of(self.native, {**self._base(has_other=has_other), **written})
        return {"betas": self.offered["betas"], **values, "rule": self.native.name}

    def _taken_over(
        self, optimizer: Optimizer, plans: Sequence[GroupPlan], given: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        if isinstance(optimizer, RuleOptimizer):
            if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(RuleOptimizer.step):
                raise TypeError(
                    f"{self.role}_optimizer: {type(optimizer).__name__} has a step of its own, which a role would not "
                    "run: its groups are taken over; write a rule with a step of its own instead"
                )
            self.rule, self.vote = optimizer.rule, optimizer.given_vote
            groups = optimizer.param_groups
        else:
            self.guest = guest_of(optimizer, self.role, self.function, given)
            self.rule = self.guest.rule
            groups = self.guest.groups
        held = [[id(param) for param in group["params"]] for group in groups]
        if held != [[id(param) for param in plan.params] for plan in plans]:
            raise ValueError(
                f"{self.role}_optimizer must hand the groups it is given to the optimizer as they are; "
                f"{type(optimizer).__name__} holds other parameters. Write lambda groups: "
                f"{type(optimizer).__name__}(groups, ...)"
            )
        return groups

    def _check_values(self, plan: GroupPlan, group: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Refuse overrides that nothing would read, and what a foreign optimizer does not check in groups."""
        where = plan.where or f"{self.role}: "
        rule = self.rule.name if self.rule else ""
        if plan.rule not in (None, rule):
            raise ValueError(
                f"{where}rule is {plan.rule!r}, and {rule!r} updates the {self.role}; leave it out, or pass "
                f"{self.role}_optimizer"
            )
        if isinstance(optimizer, RuleOptimizer):
            known = {*hyperparameters_of(optimizer.rule), LR_RATIO}
        else:
            own = {key for key in group if key not in plan.values}
            known = {*optimizer.defaults, *own, LR_RATIO, "error_if_nonfinite"}
            check_common(plan.values, where)
            for key in plan.values.keys() & known - {LR_RATIO}:
                if not _is(group.get(key), plan.values[key]):
                    raise ValueError(
                        f"{self.role}_optimizer must hand the groups it is given to the optimizer as they are: an "
                        f"override's {key} is lost, {group.get(key)!r} in place of {plan.values[key]!r}"
                    )
        # Schedulers that cycle momentum look for betas in every group.
        keys = [key for key in plan.values if not (plan.is_given and key == "betas")]
        refuse_unread_keys(keys, known, where, type(optimizer).__name__, of_overrides=not plan.is_given)


def _is(held: Any, given: Any) -> bool:
    return held is given or (isinstance(held, Tensor) or isinstance(given, Tensor) or bool(held == given))


def _pairs(plan: GroupPlan) -> list[tuple[str, Tensor]]:
    return list(zip(plan.names or (), plan.params, strict=True))


def fresh(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of which no tensor is shared with other groups: schedulers write into it in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)
