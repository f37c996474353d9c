"""RuleOptimizer: the one place that checks, gathers and dispatches; the base of STAC and of every class in optim/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stac_optimizer.distributed.agreement import check_agreement, scopes_of
from stac_optimizer.distributed.vote import MajorityVote, Voters
from stac_optimizer.groups import loading
from stac_optimizer.groups.given import RoleGroup, given_groups, settle_names
from stac_optimizer.groups.keys import check_parameters, defaults_of, unshare_lr
from stac_optimizer.model.names import named_parameters
from stac_optimizer.rule import COUNTER, Group, Rule, StepInputs
from stac_optimizer.rule.contract import DTYPES
from stac_optimizer.stepping.ambient import check_writable, copies_for_backward, neutral
from stac_optimizer.stepping.checks import check_capture, check_scaler, check_step, only_makes_state
from stac_optimizer.stepping.copies import has_foreign, step_by_copies, try_kinds
from stac_optimizer.stepping.failures import Attempt
from stac_optimizer.stepping.gathering import Declared, resolved, states_of_kind, take_at_once, with_state
from stac_optimizer.stepping.release import GradientRelease
from stac_optimizer.stepping.voting import check_on_all_ranks, share_gradients_, warn_of_equal_gradients
from stac_optimizer.validation import mapping, warn

__all__ = ["RuleOptimizer"]

# Note [Unseen writes]
# A backward that still needs the weights from before a step must raise, and not compute with the new ones. Operations
# of torch count what they write to, and autograd compares. Kernels that get addresses do not count, torch's fused ones
# do not, a DTensor does not see what is written to its local part, nor anyone what a foreign optimizer writes to
# ``param.data``. So each step counts once more, but for a recorded one, whose own backward needs the counts it saw.

# By the third step without any gradient something is wrong: ever, or once all parameters are frozen that were not.
IDLE_STEPS = 3
NEVER_BEGUN = (
    f"none of the optimizer's parameters has had a gradient in {IDLE_STEPS} steps, so nothing was ever updated. Either "
    "the model has other parameters by now, as after fully_shard, which replaces them: build the optimizer after that. "
    "Or backward did not run, or gradients were set to None before the step"
)
STOPPED = (
    f"all of the optimizer's parameters are frozen by now, and in {IDLE_STEPS} steps none had a gradient: what trains, "
    "such as an adapter that was added or made active later, is not in this optimizer. Build the optimizer anew, or "
    "add it with add_param_group"
)


class RuleOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose groups are updated by rules.

    A class of :mod:`stac_optimizer.optim` sets ``rule`` and hands its arguments on.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        values: the hyper-parameters of the rule, and the flags that all rules share, by name.
        vote: the ranks that vote on the rule's steps, or None.

    Raises:
        TypeError: an argument of the wrong type, or one that the rule does not have.
        ValueError: a value out of range, a misspelt group key, a parameter that the rule cannot update; on every rank,
            ranks that share DTensors, or vote, and have built different optimizers.
    """

    rule: ClassVar[Rule]
    given_vote: MajorityVote | None = None
    _rules: Mapping[str, Rule]
    _release: GradientRelease | None = None
    _voters: Voters | None = None
    _is_building = False
    _had_gradient = False
    _idle_steps = 0

    def __init__(self, params: Any, values: Mapping[str, Any], *, vote: MajorityVote | None = None) -> None:
        defaults = defaults_of(self.rule, values)
        self.given_vote = vote
        params = list(params) if hasattr(params, "__next__") else params
        self._build(given_groups(params, self.rule, defaults), defaults, {self.rule.name: self.rule})
        if not (isinstance(params, list) and params and isinstance(params[0], RoleGroup)):
            self._join_ranks(params, vote)
            self._warn()

    def _warn(self) -> None:
        """Warn of what rules find in their groups."""
        for group in self.param_groups:
            rule = self._rules[group["rule"]]
            # Beside what trains there may be frozen weights that nothing is computed with, such as quantized ones.
            named = [(name, param) for name, param, _ in named_parameters([group]) if param.dtype in DTYPES]
            warning = rule.warning([name for name, _ in named], [param for _, param in named], group)
            if warning is not None:
                warn(f"{group.get('stac_role', rule.name)}: {warning}")

    def _build(self, groups: list[dict[str, Any]], defaults: dict[str, Any], rules: Mapping[str, Rule]) -> None:
        """Become an optimizer of groups that are complete and checked."""
        self._rules = rules
        # By the position of a group's first parameter.
        self._declared: dict[int, tuple[object, list[Declared | None]]] = {}
        self._made: list[tuple[Tensor, str]] = []
        self._tried: set[object] = set()
        self._is_building = True
        # A schedule that fills a group's lr in place must not change what later groups begin with.
        super().__init__(groups, {key: v.clone() if isinstance(v, Tensor) else v for key, v in defaults.items()})
        self._is_building = False
        check_parameters(self.param_groups, rules)

    def _join_ranks(self, model: Any, vote: MajorityVote | None) -> None:
        """Find out whether other ranks have built the same optimizer, and vote with them where asked."""
        if vote is not None and not isinstance(vote, MajorityVote):
            raise TypeError(f"vote must be a MajorityVote or None, got {type(vote).__name__}")
        voters = None if vote is None else Voters.of(vote, model)
        self._check_votes(self.param_groups, None if vote is None else vote.encoding)
        check_agreement(self.param_groups, scopes_of(model, self.param_groups, voters and voters.group))
        if voters is not None:
            voters.hook(p for group in self.param_groups if self._rules[group["rule"]].votes for p in group["params"])
            self._voters = voters

    def _check_votes(self, groups: Sequence[Group], encoding: str | None) -> None:
        """Refuse groups whose ranks are to vote otherwise than the optimizer's."""
        for index, group in enumerate(groups):
            if self._rules[group["rule"]].votes and group["vote"] != encoding:
                raise ValueError(
                    f"group {index}: vote is {group['vote']!r}, which vote=MajorityVote(...) alone can set, for the "
                    f"whole optimizer; it is {encoding!r}"
                )

    def state_bytes(self) -> int:
        """Bytes of the state once every parameter has stepped, and meanwhile what those that have not will hold."""
        return sum(self._state_bytes(param, group) for _, param, group in named_parameters(self.param_groups))

    def _state_bytes(self, param: Tensor, group: Group) -> int:
        return self._rules[group["rule"]].nbytes(param, self.state.get(param, {}), group)

    def release_gradients(self, model: nn.Module) -> GradientRelease:
        """Update each parameter during backward, as soon as its gradient is there, and free the gradient.

        Args:
            model: the module that holds the optimizer's parameters.

        Returns:
            A context manager with ``remove()``. :class:`stac_optimizer.stepping.release.GradientRelease` says what
            changes while it is active.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: a parameter of the optimizer is not in ``model``.
            RuntimeError: what a release cannot serve, such as several ranks. Nothing was changed.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from stac_optimizer import STAC
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
            >>> optimizer = STAC(model, lr=1e-3)
            >>> with optimizer.release_gradients(model):
            ...     for _ in range(3):
            ...         model(torch.ones(2, 4)).square().mean().backward()
            ...         optimizer.step()
            >>> [param.grad for param in model.parameters()]
            [None, None, None, None]
        """
        return GradientRelease(self, self._rules, model)

    # Found by torch.amp.GradScaler, which then leaves gradients scaled and sets grad_scale and found_inf for the step.
    # While gradients are released, or ranks vote, a step that has these can say why it refuses them.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        refuses = self._release is not None or self._voters is not None
        return refuses or all(
            group.get("fused") and not self._rules[group["rule"]].is_guest for group in self.param_groups
        )

    def __getstate__(self) -> dict[str, Any]:
        held: dict[str, Any] = {**super().__getstate__(), "_rules": self._rules}
        return held if self._voters is None else {**held, "_voters": self._voters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._declared = {}
        self._made, self._tried = [], set()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not say it gets from the arguments at construction.

        Raises:
            TypeError: what is given, or a value in it, is of the wrong type.
            ValueError: a parameter that stands in another group, a misspelt key, a value out of range. Nothing was
                added.
        """
        if self._is_building:
            self.param_groups.append(param_group)
            return
        (group,) = given_groups([mapping("param_group", param_group)], self.rule, self.defaults)
        self._extend([group])

    def _extend(self, groups: list[dict[str, Any]]) -> None:
        """Add complete groups, or none of them."""
        settle_names([*map(dict, self.param_groups), *groups])
        check_parameters(groups, self._rules)
        self._check_votes(groups, None if self._voters is None else self._voters.vote.encoding)
        self.param_groups.extend(groups)
        unshare_lr(self.param_groups)
        if self._voters is not None:
            self._voters.keep(p for group in groups if self._rules[group["rule"]].votes for p in group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; none has while gradients are released, and an iteration ends.

        Args:
            closure: computes the loss anew; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient that cannot be applied. Parameters and state are as before.
            BaseException: whatever else ends a step on its way, as memory that runs out. It keeps its type, and its
                message says that nothing was changed, or which parameters were.
        """
        if self._release is not None:
            self._release.end_iteration(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._update(self.param_groups)
        except BaseException:
            # A GradScaler takes these away after a step that succeeds, and would multiply its scale by one left here.
            for name in ("grad_scale", "found_inf"):
                vars(self).pop(name, None)
            raise
        return loss

    def _update(self, groups: Sequence[Group], position: int | None = None) -> None:
        """Check, gather, dispatch.

        Args:
            groups: all of the optimizer's groups, or in backward one group cut to one parameter.
            position: in backward that parameter's place among all.
        """
        check_capture(groups)
        check_writable(groups, self.param_groups)
        check_scaler(is_scaled=getattr(self, "found_inf", None) is not None, votes=self._voters is not None)
        attempt = Attempt(self, groups, self._rules, self._made, position)
        # torch.compile goes on after a graph that ends within a context only where it knows that.
        with nullcontext() if torch.compiler.is_compiling() else attempt:
            context = neutral(groups)
            with context:
                ready = self._ready(groups, position)
            if ready is None:
                return
            makes_state, gathered = ready
            attempt.begin_guests()
            self._step_guests(makes_state=makes_state)
            if makes_state:
                return
            self._count_writes_of_guests(groups)
            attempt.end_guests()
            with context:
                for inputs in gathered:
                    attempt.begin(inputs)
                    recorded = inputs.group["differentiable"]
                    with torch.set_grad_enabled(recorded), copies_for_backward(is_recorded=recorded):
                        step_by_copies(self._rules[inputs.group["rule"]].step, inputs)
                    if not recorded:
                        torch.autograd.graph.increment_version(inputs.params)  # Note [Unseen writes]

    def _ready(self, groups: Sequence[Group], position: int | None) -> tuple[bool, list[StepInputs]] | None:
        """Check, and gather what rules are to update.

        Returns:
            Whether the step is only to make state, and what was gathered; None where a GradScaler lets it be skipped.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_scaled = found_inf is not None
        if found_inf is not None:
            can_skip = all(self._rules[group["rule"]].skips_by_itself(group, self.state) for group in groups)
            if can_skip and not has_foreign(groups):
                found_inf = (found_inf != 0).to(torch.float32)  # as a sum over devices it may be more than 1
            elif found_inf.item():
                return None
            else:
                found_inf = None
        makes_state = self._check(groups, is_first=position is None and not self.state, is_scaled=is_scaled)
        if position is not None:
            self._had_gradient = True
        elif not (makes_state or torch.compiler.is_compiling()):
            self._watch(groups)
        gathered = self._gather(groups, position or 0, found_inf)
        if not makes_state:
            try_kinds(gathered, self._rules, self._tried, self.param_groups)
        return makes_state, gathered

    def _count_writes_of_guests(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if self._rules[group["rule"]].is_guest and not group.get("differentiable"):
                torch.autograd.graph.increment_version([param for param in group["params"] if param.grad is not None])

    def _step_guests(self, *, makes_state: bool) -> None:
        """Let foreign optimizers step, before rules: what they refuse at their start leaves all as it was."""

    def _check(self, groups: Sequence[Group], *, is_first: bool, is_scaled: bool) -> bool:
        """Check gradients, on all ranks where they vote.

        Args:
            groups: those to step.
            is_first: whether this may be the hidden step that makes state.
            is_scaled: whether a GradScaler has multiplied the gradients.

        Returns:
            Whether the step is only to make state.
        """
        if self._voters is not None:
            verdict = check_on_all_ranks(self._voters, groups, self._rules, is_first=is_first)
            if not verdict.only_makes_state:
                warn_of_equal_gradients(self._voters, groups, self._rules)
            share_gradients_(self._voters, groups, self._rules, verdict)
            return verdict.only_makes_state
        changed = self._release is not None
        check_step(groups, self.param_groups, self._rules, is_scaled=is_scaled, rest_may_have_changed=changed)
        return is_first and only_makes_state(groups)

    def _gather(self, groups: Sequence[Group], start: int, found_inf: Tensor | None) -> list[StepInputs]:
        """What each rule is to update, with its state."""
        gathered: list[StepInputs] = []
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in groups:
            if self._rules[group["rule"]].is_guest:
                start += len(group["params"])
                continue
            params: list[Tensor] = []
            grads: list[Tensor] = []
            positions: list[int] = []
            kinds: list[int] = []
            keys = self._rules[group["rule"]].state_keys
            states: list[list[Tensor]] = [[] for _ in keys]
            self._init_group(group, start, positions, kinds, params, grads, *states)
            grads = resolved(grads) if group["fused"] else grads
            start += len(group["params"])
            for kind in sorted(set(kinds)):
                held = states_of_kind(keys, states, kinds, kind)
                of_kind = (params, grads, positions)
                if len(held["step"]) < len(params):
                    chosen = [index for index, other in enumerate(kinds) if other == kind]
                    of_kind = (
                        [params[index] for index in chosen],
                        [grads[index] for index in chosen],
                        [positions[index] for index in chosen],
                    )
                some, their_grads, places = of_kind
                gathered.append(StepInputs(group, some, their_grads, held, grad_scale, places, found_inf, self._voters))
        return gathered

    def _init_group(
        self,
        group: Group,
        start: int,
        positions: list[int],
        kinds: list[int],
        params: list[Tensor],
        grads: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Gather what has a gradient, and create its state. torch.compile knows this name and runs it untraced.

        ``kinds`` tells which keys a parameter's state has, as bits: the lists of the others lack it.
        """
        rule = self._rules[group["rule"]]
        told = *(group[name] for name in rule.hyperparameters), group["capturable"], group["fused"]
        remembered = self._declared.get(start)
        if remembered is None or remembered[0] != told or len(remembered[1]) != len(group["params"]):
            remembered = self._declared[start] = (told, [None] * len(group["params"]))
        declared = remembered[1]
        kind = take_at_once(group["params"], declared, self.state, grads, states)
        if kind is not None:
            params += group["params"]
            positions += range(start, start + len(params))
            kinds += [kind] * len(params)
            return
        for index, param in enumerate(group["params"]):
            grad = param.grad
            state = self.state[param]
            if grad is None:
                # The counter alone: strict loading of distributed checkpoints wants state of every parameter.
                if COUNTER.key not in state:
                    state[COUNTER.key] = COUNTER.create(param, group)
                    self._made.append((param, COUNTER.key))
                continue
            known = declared[index]
            if known is None or known.param is not param or known.last not in state:
                known = declared[index] = with_state(rule, param, group, state, self._made)
            for place, key in known.keys:
                states[place].append(state[key])
            positions.append(start + index)
            kinds.append(known.kind)
            params.append(param)
            grads.append(grad)

    def _watch(self, groups: Sequence[Group]) -> None:
        """Warn once of an optimizer that has no gradient ever, or none any more, all of it being frozen.

        A step that does nothing would otherwise not show.

        Not where parameters have no names: libraries that deal them out over ranks may give one rank unused ones alone.
        """
        if self._idle_steps == IDLE_STEPS:
            return
        if any(param.grad is not None for group in groups for param in group["params"]):
            self._had_gradient, self._idle_steps = True, 0
            return
        trains = any(param.requires_grad for group in groups for param in group["params"])
        if trains is self._had_gradient or self._release is not None or any("param_names" not in g for g in groups):
            return
        self._idle_steps += 1
        if self._idle_steps == IDLE_STEPS:
            warn(STOPPED if self._had_gradient else NEVER_BEGUN)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        All is checked first: roles, layer names, parameter names, shapes, hyper-parameters. State keeps the dtype that
        it was saved in, and is copied.

        Raises:
            TypeError: a hyper-parameter of the wrong type.
            ValueError: the checkpoint belongs to another model or split; the message names the first difference. The
                optimizer is as before.
        """
        mapping("state_dict", state_dict)
        state: dict[Tensor, dict[str, Any]] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            with neutral(self.param_groups):
                groups, loaded = loading.prepare(incoming, self.param_groups, self._rules)
            load = self._checked_load(incoming, loaded)
            state.update(loaded)
            load()
            return {"state": {}, "param_groups": groups}

        def fill(_: Optimizer) -> None:
            self.state.update(state)
            unshare_lr(self.param_groups)

        # As hooks, to stand after the user's own pre-hooks and before the post-hooks. torch itself gets no state, for
        # it would cast that to the parameters' dtype.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked_load(self, state_dict: dict[str, Any], state: Mapping[Any, Any]) -> Callable[[], None]:
        """Check what else there is to a state dict than what rules know; the result loads it.

        Args:
            state_dict: the whole.
            state: of each parameter, as it will be loaded.
        """
        return lambda: None
