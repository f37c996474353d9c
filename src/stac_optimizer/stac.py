"""STAC: arguments to partition to groups. No arithmetic; the step is that of RuleOptimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from stac_optimizer.distributed.vote import MajorityVote
from stac_optimizer.groups.given import settle_names
from stac_optimizer.groups.keys import check_parameters, unshare_lr
from stac_optimizer.groups.translation import from_adamw
from stac_optimizer.model.partition import STACPartition
from stac_optimizer.model.selectors import Selector
from stac_optimizer.optim import AdamW, Signum
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.roles.arguments import (
    changed,
    checked_own,
    checked_shared,
    naming_what_was_meant,
    refuse_unread,
    refuse_unread_shared,
    rule_arguments,
)
from stac_optimizer.roles.building import group_of_guest, group_of_rule, groups_of
from stac_optimizer.roles.from_groups import partition_of
from stac_optimizer.roles.guests.guest import Guest
from stac_optimizer.roles.overrides import Overrides
from stac_optimizer.roles.plan import ROLES, planned_as_given
from stac_optimizer.roles.split import as_given, plans_of, warn_of_embeddings, without_arguments
from stac_optimizer.roles.updater import OptimizerFunction, Updater
from stac_optimizer.rule import Group
from stac_optimizer.stepping.checks import check_finite
from stac_optimizer.stepping.watch import IdleRoles, OneLr, OtherSchedule
from stac_optimizer.tensors.torch_private import count_as_stepped
from stac_optimizer.validation import mapping, warn

__all__ = ["STAC"]


class STAC(RuleOptimizer):
    r"""Sign trunk, AdamW cap: one optimizer for a whole model.

    The last layers (the *cap*) get AdamW or AMSGrad, to the bit as ``torch.optim.AdamW``; all earlier layers (the
    *trunk*) get the sign of a gradient average, which needs one state tensor instead of two. Either role takes any
    other optimizer.

    Trunk, for gradient :math:`g` (negated under ``maximize``) and momentum :math:`\mu`, in this order:

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow m + (1 - \mu)(g - m), \quad m_0 = 0 \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{sign}(m)

    One step moves a trunk weight by exactly lr, and a cap weight by about lr. bfloat16 and float16 trunk weights are
    computed in float32 and rounded once; the sign is that of m before it is rounded to be stored.

    Args:
        model: what to optimize, one of

            - a module;
            - (name, parameter) pairs as ``model.named_parameters()`` gives, split exactly as the module would be;
            - group dicts, each with ``params`` (parameters, or pairs), an explicit ``stac_role`` of ``"trunk"`` or
              ``"cap"``, and any hyper-parameters of its own (``lr``, ``weight_decay``, ``momentum``, ...).
        lr: shared base learning rate in [0, inf); float or one-element tensor. Groups do not share a tensor: what is
            written into this one reaches one group alone, so write into ``group["lr"]`` of each.
        last_n_layers: how many final trainable layers form the cap, 0 or more; 0: all trunk; more than there are: all
            cap.
        cap: a selector of the cap's parameters, which replaces ``last_n_layers``; see
            :mod:`stac_optimizer.model.selectors`.
        trunk_lr: the trunk's learning rate. None: ``0.75 * lr`` when both roles have layers, else ``lr``; with another
            rule in the trunk the ``lr_ratio`` of that in place of 0.75.
        cap_lr: the cap's learning rate. None: ``lr``.
        trunk_optimizer: a function of parameter groups that returns an optimizer of them: a class, of
            :mod:`stac_optimizer.optim` or any other, a ``functools.partial`` of one, a lambda. None: the sign trunk.
            What is written in it stands; what is not (a class, or a partial without ``lr``) comes from the arguments
            here: ``lr`` and ``weight_decay``, of this package's classes also the flags. A lambda has written all.
        cap_optimizer: likewise for the cap. None: AdamW.
        overrides: pairs of a selector and hyper-parameters for what it selects, later ones win:
            ``[(vectors(), {"weight_decay": 0.0}), (named("encoder.*"), {"lr_ratio": 0.3})]``. ``lr_ratio`` multiplies
            the role's lr, once, here. Each combination becomes a group of its role.
        include_frozen: keep parameters that do not require gradients, so that they can be unfrozen later. Frozen layers
            then count among the last ones, for unfreezing must move none to the other role.
        trunk_momentum: factor of the gradient average in [0, 1); 0: plain signSGD without trunk state. This and the
            other arguments of the sign trunk are refused beside a ``trunk_optimizer``, which takes them itself.
        trunk_cautious: move a trunk weight only where sign(m) agrees with the sign of the present gradient, and divide
            the step by the share of such weights in the tensor, floored at 1e-3.
        weight_decay: decoupled weight decay in [0, inf), multiplied by the role's learning rate. An optimizer given
            for a role takes it as its class does.
        trunk_weight_decay: the trunk's; None: ``weight_decay``.
        cap_weight_decay: the cap's; None: ``weight_decay``.
        betas: the cap's factors of the averages of gradient and squared gradient, each in [0, 1).
        eps: added to the cap's denominator, in [0, inf).
        amsgrad: whether the cap uses the maximum of the averages of the squared gradient.
        maximize: ascend instead of descend.
        error_if_nonfinite: raise before anything changes when a gradient holds NaN or infinity; it costs one pass over
            the gradients and one synchronization a step. Otherwise the weight becomes NaN, as AdamW's would. Under a
            GradScaler, which skips such steps itself, it has nothing to do.
        foreach: update lists of tensors at once. None: where torch would, that is on CUDA.
        fused: one pass over memory. The cap gets torch's fused kernel; the trunk on the CPU one that a C++ compiler
            makes at the first step and that is kept for later runs (without a compiler a warning says that the default
            path runs), on CUDA one Triton launch for all its tensors. Excludes ``foreach`` and ``differentiable``. A
            GradScaler hands over its scale instead of unscaling gradients; on CUDA the kernels themselves skip a step
            with an infinite one.
        capturable: keep step counters on the device, so that a CUDA graph can capture the step.
        differentiable: record the step for autograd.
        trunk_state_dtype: what the trunk's averages are held in. None: the weight's dtype; ``torch.bfloat16``;
            ``torch.int8``: codes of 8 bits, spaced by the square root, with a float32 scale for each 128 consecutive
            weights of a row, about 1.03 bytes a weight, rounded by chance so that the mean is right. Complex weights
            keep their dtype; under int8 so do float64 ones, and those with rows shorter than 64 elements, such as
            biases and norms. Groups hold the dtype's name, which may be given too: ``"bfloat16"``, ``"int8"``.
        stochastic_rounding: round bfloat16 weights, and their averages, up or down by chance so that the mean is
            right: a step below half the spacing of values then moves the weight in expectation. All weights of the
            group must be bfloat16. The cap is computed in float32.
        rounding_seed: of that chance, and of 8-bit codes', an integer, 0 or more. The same on every rank, or replicas
            drift apart.
        vote: a :class:`stac_optimizer.MajorityVote`: ranks vote on the trunk's steps instead of averaging its
            gradients. Excludes ``trunk_cautious``, ``capturable`` and ``differentiable``; ``foreach`` and ``fused``
            then say how the cap is updated.

    =========  ==================  =======  ===========  ===========================================
    role       key                 shape    dtype        present
    =========  ==================  =======  ===========  ===========================================
    both       ``step``            ``()``   float32      always; on the CPU unless capturable, fused
    trunk      ``exp_avg``         weight   see above    unless ``trunk_momentum`` is 0
    trunk      ``exp_avg_scale``   rows x   float32      with averages in 8-bit codes
                                   blocks
    cap        ``exp_avg``         weight   weight       always
    cap        ``exp_avg_sq``      weight   weight       always
    cap        ``max_exp_avg_sq``  weight   weight       with ``amsgrad``
    =========  ==================  =======  ===========  ===========================================

    A parameter that never had a gradient has ``step`` alone.

    Groups hold the arguments under their rule's names: ``lr``, ``weight_decay``, ``momentum``, ``cautious``,
    ``state_dtype``, ``betas``, ``eps``, ... ``group["lr"]`` is the group's learning rate, and nothing multiplies it
    later. Schedulers move it in every group. What writes **one** lr into all (``OneCycleLR(optimizer, max_lr=1e-3)``)
    erases the ratio of the roles, which draws one warning: give one value a group. Those that cycle momentum
    (OneCycleLR, CyclicLR) move the first of ``betas``, which the cap reads; the trunk's ``momentum`` stays.

    Raises:
        TypeError: an argument of the wrong type, or parameters without names.
        ValueError: an argument out of range or given twice, nothing to train, a selector that matches nothing, a group
            without role or with a misspelt key, a key that the role's rule does not have, stochastic rounding of
            weights that are not bfloat16. On every rank, naming what differs: ranks that share a DDP model or DTensors,
            or vote, and build different optimizers; all of them must build.
        RuntimeError: from :meth:`step`, before anything has changed: a sparse gradient, a non-finite one under
            ``error_if_nonfinite``, one that the cap's AdamW cannot apply.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stac_optimizer import STAC
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = STAC(model, lr=1e-3, weight_decay=1e-2)
        >>> optimizer.partition.trunk_layer_names, optimizer.partition.cap_layer_names
        (('0',), ('2',))
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    References:
        signSGD with Majority Vote, https://arxiv.org/abs/1810.05291; Momentum Ensures Convergence of SIGNSGD under
        Weaker Assumptions (ICML 2023); Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101;
        Cautious Optimizers, https://arxiv.org/abs/2411.16085; 8-bit Optimizers via Block-wise Quantization,
        https://arxiv.org/abs/2110.02861; Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192.
    """

    _guests: Mapping[str, Guest] = {}
    _one_lr: OneLr | None = None
    _idle_roles: IdleRoles | None = None
    _other_schedule: OtherSchedule | None = None
    # The roles that backward has updated since the last step, while gradients are released.
    _in_backward: frozenset[str] = frozenset()

    @naming_what_was_meant
    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]],
        lr: float | Tensor = 1e-3,
        *,
        last_n_layers: int = 1,
        cap: Selector | None = None,
        trunk_lr: float | Tensor | None = None,
        cap_lr: float | Tensor | None = None,
        trunk_optimizer: OptimizerFunction | None = None,
        cap_optimizer: OptimizerFunction | None = None,
        overrides: Overrides = (),
        include_frozen: bool = False,
        trunk_momentum: float = 0.9,
        trunk_cautious: bool = False,
        weight_decay: float = 0.0,
        trunk_weight_decay: float | None = None,
        cap_weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        trunk_state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        vote: MajorityVote | None = None,
    ) -> None:
        shared = checked_shared(
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "betas": betas,
                "maximize": maximize,
                "error_if_nonfinite": error_if_nonfinite,
                "foreach": foreach,
                "fused": fused,
                "capturable": capturable,
                "differentiable": differentiable,
                "stochastic_rounding": stochastic_rounding,
                "rounding_seed": rounding_seed,
            }
        )
        of_trunk = {
            "trunk_momentum": trunk_momentum,
            "trunk_cautious": trunk_cautious,
            "trunk_state_dtype": trunk_state_dtype,
        }
        of_cap = {"betas": shared["betas"], "eps": eps, "amsgrad": amsgrad}
        refuse_unread("trunk", trunk_optimizer, of_trunk, vote=vote)
        refuse_unread("cap", cap_optimizer, of_cap)
        updaters = {
            "trunk": Updater(
                role="trunk",
                function=trunk_optimizer or partial(Signum, **rule_arguments(Signum, of_trunk), vote=vote),
                offered=shared,
                own=checked_own("trunk", {"lr": trunk_lr, "weight_decay": trunk_weight_decay}),
            ),
            "cap": Updater(
                role="cap",
                function=cap_optimizer or partial(AdamW, **rule_arguments(AdamW, of_cap)),
                offered=shared,
                own=checked_own("cap", {"lr": cap_lr, "weight_decay": cap_weight_decay}),
            ),
        }
        model = as_given(model)
        plans, layers, self._moved = plans_of(
            without_arguments(model, {**of_trunk, **of_cap, "vote": vote}),
            overrides,
            last_n_layers=last_n_layers,
            cap=cap,
            include_frozen=include_frozen,
            trunk_takes=updaters["trunk"].takes_parameter,
            trunk_only=updaters["trunk"].known - updaters["cap"].known,
        )
        roles = {plan.role for plan in plans}
        refuse_unread_shared(shared, {role: updaters[role] for role in ROLES if role in roles})
        given = {
            "trunk": {
                "trunk_lr": trunk_lr,
                "trunk_weight_decay": trunk_weight_decay,
                "trunk_optimizer": trunk_optimizer,
                **changed("trunk", of_trunk, vote=vote),
            },
            "cap": {
                "cap_lr": cap_lr,
                "cap_weight_decay": cap_weight_decay,
                "cap_optimizer": cap_optimizer,
                **changed("cap", of_cap),
            },
        }
        groups, self._new_values = groups_of(plans, updaters, given)
        encoding = None if vote is None else vote.encoding
        defaults = {**rule_arguments(Signum, of_trunk), "vote": encoding, **rule_arguments(AdamW, of_cap), **shared}
        rules = {updater.rule.name: updater.rule for updater in updaters.values() if updater.rule is not None}
        self._guests = {role: updater.guest for role, updater in updaters.items() if updater.guest is not None}
        if all(rules[group["rule"]].is_guest for group in groups):
            # Schedulers that cycle momentum look here for the key under which groups hold it.
            known = [guest.optimizer.defaults for guest in self._guests.values()]
            cycled = {key: each[key] for each in known for key in each if key in ("betas", "momentum")}
            defaults = {**{key: shared[key] for key in shared if key != "betas"}, **cycled}
        self._build(groups, defaults, rules)
        self._tie()
        self._refuse_missing_closures()
        self._join_ranks(model, updaters["trunk"].vote)
        self._warn()
        warn_of_embeddings(layers, groups, rules, is_own=trunk_optimizer is None)
        self._one_lr, self._idle_roles = OneLr(groups), IdleRoles()

    def _refuse_missing_closures(self) -> None:
        for role, guest in self._guests.items():
            if guest.needs_closure and self._owner is None:
                raise ValueError(
                    f"{role}_optimizer {guest.rule.name} needs a closure in every step, which only an optimizer of the "
                    "whole model gets; give it all parameters (last_n_layers=0), or choose another for the role"
                )

    @property
    def _owner(self) -> Guest | None:
        """The foreign optimizer that owns the whole model."""
        roles = {group["stac_role"] for group in self.param_groups}
        return self._guests.get(next(iter(roles))) if len(roles) == 1 else None

    def _tie(self) -> None:
        """Let guests share groups and state: at first, and whenever torch has put others in their place."""
        for guest in self._guests.values():
            guest.tie(self)

    @property
    def partition(self) -> STACPartition:
        """The layers of trunk and cap, with the bytes of their state; ``print`` shows them as a table."""
        of_guests = self._bytes_of_guests()

        def state_bytes(param: Tensor, group: Group) -> int:
            return of_guests[param] if param in of_guests else self._state_bytes(param, group)

        return partition_of(self.param_groups, state_bytes, self._moved)

    def state_bytes(self) -> int:
        """Bytes of the state once every parameter has stepped, and meanwhile what those that have not will hold.

        Of a foreign optimizer a step without data tells, where it can do one; else what it holds by now counts. What is
        sharded, as under FSDP2, counts whole: these are the bytes of all its ranks together.
        """
        native = [group for group in self.param_groups if not self._rules[group["rule"]].is_guest]
        held = sum(self._state_bytes(param, group) for group in native for param in group["params"])
        return held + sum(self._bytes_of_guests().values())

    def _bytes_of_guests(self) -> dict[Tensor, int]:
        some = [guest.bytes_by_parameter(self.state) for guest in self._guests.values()]
        return {param: nbytes for each in some for param, nbytes in each.items()}

    @torch.no_grad()
    def average_trunk_state(self) -> None:
        """Replace the averages that each rank keeps for its votes by their mean; all ranks must call it.

        The mean is that of the averaged gradients. All ranks have the same state afterwards, which the checkpoint of
        any of them holds, and with which any number of ranks may go on.

        Raises:
            RuntimeError: no ranks vote; on all ranks, that their states are not of one kind. Nothing was changed.
        """
        if self._voters is None:
            raise RuntimeError(
                "average_trunk_state is for optimizers with a vote; others have the same state everywhere. Leave it "
                "out, or build STAC with vote=MajorityVote()"
            )
        states = [self.state.get(param, {}) for group in self.param_groups for param in group["params"]]
        kinds = [sorted((key, str(value.dtype)) for key, value in state.items()) for state in states]
        self._voters.check_same_kinds(str(kinds))
        for group in self.param_groups:
            self._rules[group["rule"]].average_state(group["params"], self.state, self._voters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that names its ``stac_role``; what it does not say it gets from the role's arguments.

        Args:
            param_group: ``params`` (parameters, or pairs with names where the optimizer has names), ``stac_role`` of
                "trunk" or "cap", and hyper-parameters of its own.

        Raises:
            RuntimeError: it names no role, or one that has no optimizer to go to.
            TypeError: what is given, or a value in it, is of the wrong type.
            ValueError: a parameter that stands in another group, a misspelt key, a value out of range. Nothing was
                added.
        """
        if self._is_building:
            super().add_param_group(param_group)
            return
        if "stac_role" not in mapping("param_group", param_group):
            raise RuntimeError(
                "STAC does not support add_param_group of a group that names no stac_role: say 'stac_role': 'trunk' or "
                "'cap' in it. To unfreeze parameters later, build STAC with include_frozen=True instead"
            )
        (plan,) = planned_as_given([param_group], "param_group: ")
        values, guest = self._new_values[plan.role], self._guests.get(plan.role)
        if guest is None and not values:
            raise RuntimeError(
                f"the {plan.role} has no optimizer to add a group to; give it parameters at construction, or write "
                f"{plan.role}_optimizer as a class or a functools.partial of one"
            )
        index = sum(group["stac_role"] == plan.role for group in self.param_groups)
        if guest is None:
            self._extend([group_of_rule(plan, self._rules[values["rule"]], values, index)])
            return
        shared = {key: self.param_groups[0][key] for key in ("error_if_nonfinite", "betas")}
        group = group_of_guest(plan, guest, values, index, known=self.defaults)
        settle_names([*map(dict, self.param_groups), group])
        check_parameters([group], self._rules)
        guest.add_param_group(group)
        self.param_groups.append({**shared, **group})
        unshare_lr(self.param_groups)
        self._tie()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as the base
        """Update every parameter that has a gradient; none has while gradients are released, and an iteration ends.

        Args:
            closure: computes the loss anew; called once, with gradients enabled. A foreign optimizer that owns the
                whole model gets the closure itself, and may call it as often as it needs, as line searches do.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient that cannot be applied. Parameters and state are as before, except for what a
                foreign optimizer finds out in the middle of its own step.
        """
        owner = None if closure is None else self._owner
        if owner is None or closure is None:
            return super().step(closure)
        self._tie()
        result: float | None = owner.step(self._checked(closure))
        self._count_writes_of_guests(self.param_groups)
        return result

    def _checked(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure itself, or where asked one that refuses NaN and infinity in the gradients that it leaves."""
        if not any(group["error_if_nonfinite"] for group in self.param_groups):
            return closure

        @wraps(closure)
        def checked_closure(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            check_finite(self.param_groups, unchanged="The parameters are where the optimizer has tried them")
            return loss

        return checked_closure

    def _step_guests(self, *, makes_state: bool) -> None:
        self._tie()  # a user may have put another state in place of the shared one
        for guest in self._guests.values():
            if guest.shares_state or not makes_state:
                guest.step()

    def _watch(self, groups: Sequence[Group]) -> None:
        super()._watch(groups)
        stepped, self._in_backward = self._in_backward, frozenset()
        found = [watch.warning(groups) for watch in (self._one_lr, self._other_schedule) if watch is not None]
        found += [] if self._idle_roles is None else [self._idle_roles.warning(groups, stepped)]
        for message in found:
            if message is not None:
                warn(message)

    def _update(self, groups: Sequence[Group], position: int | None = None) -> None:
        super()._update(groups, position)
        if position is not None:
            self._in_backward |= {groups[0]["stac_role"]}

    def load_adamw_state_dict(
        self, state_dict: Mapping[str, Any], model: nn.Module | Iterable[tuple[str, Tensor]]
    ) -> None:
        """Go on from a run of AdamW: the trunk takes its gradient averages, the cap all of its state.

        Learning rates and other hyper-parameters stay those of this optimizer. A scheduler's state has a value for each
        group, so AdamW's does not fit here: build the scheduler anew, and bring it to where AdamW's was by
        ``for _ in range(scheduler_state["last_epoch"]): scheduler.step()``. A step that finds it elsewhere warns once.

        Args:
            state_dict: of a ``torch.optim.AdamW`` or ``Adam``.
            model: whose ``named_parameters()`` are in the order in which AdamW got its parameters; or (name, parameter)
                pairs in that order, as where AdamW had several groups and no names.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: another number of parameters, other names or shapes. The optimizer is as before.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from stac_optimizer import STAC
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
            >>> model(torch.ones(2, 4)).sum().backward()
            >>> adamw.step()
            >>> optimizer = STAC(model, lr=3e-4)
            >>> optimizer.load_adamw_state_dict(adamw.state_dict(), model)
            >>> bool((optimizer.state[model[0].weight]["exp_avg"] == adamw.state[model[0].weight]["exp_avg"]).all())
            True
        """
        if self._guests:
            foreign = ", ".join(f"{role}_optimizer {guest.rule.name}" for role, guest in self._guests.items())
            raise ValueError(
                "load_adamw_state_dict is for rules of this package, not for a foreign optimizer's role, got "
                f"{foreign}; leave that out, or take a class of stac_optimizer.optim"
            )
        present = self.state_dict()
        given = mapping("state_dict", state_dict)
        self.load_state_dict(from_adamw(given, model, present, self.param_groups, self._rules))
        self._other_schedule = OtherSchedule(given["param_groups"])
        count_as_stepped(self)

    def state_dict(self) -> dict[str, Any]:
        """State and groups, as torch has them; under ``guests`` what foreign optimizers keep elsewhere."""
        result: dict[str, Any] = super().state_dict()
        kept = {role: guest.state_dict() for role, guest in self._guests.items()}
        own = {role: data for role, data in kept.items() if data is not None}
        return {**result, "guests": own} if own else result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102 - as the base
        super().load_state_dict(state_dict)
        self._one_lr = OneLr(self.param_groups)  # whether one rate is written into all is asked of those from here on

    def _checked_load(self, state_dict: dict[str, Any], state: Mapping[Any, Any]) -> Callable[[], None]:
        for guest in self._guests.values():
            guest.check_state(state)
        own = state_dict.get("guests", {})
        loads = [guest.prepare_load(own.get(role)) for role, guest in self._guests.items()]

        def load() -> None:
            for each in loads:
                each()

        return load

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_new_values", "_moved", "_one_lr", "_idle_roles", "_other_schedule")
        held = {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}
        return {**held, "_guests": self._guests} if self._guests else held

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()
