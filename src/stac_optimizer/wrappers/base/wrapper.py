"""Wrapper: an optimizer around another, whose groups and state are its own too. Knows no algorithm.

Note [One optimizer]. Schedulers, scalers, hooks, checkpoints and copies see one optimizer, whichever of the two they
get: a wrapper has no groups and no state but those of its base. What it keeps of a parameter stands beside what the
base keeps, under keys that begin with its name, and its hyper-parameters stand in the groups. It writes there only
after the base has stepped that parameter: torch's classes make their state where they find none at all.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.groups.foreign_state import tensors_in
from stac_optimizer.rule import Group
from stac_optimizer.stepping.ambient import neutral
from stac_optimizer.stepping.checks import only_makes_state
from stac_optimizer.validation import Checker, mapping
from stac_optimizer.wrappers.base.loading import Own, parted
from stac_optimizer.wrappers.base.refusals import chain, is_closed_to_scalers, refuse_base, refuse_step

__all__ = ["Wrapper"]

# What a base remembers of its wrapper: a second one would find the groups and the state of the first.
MARK = "_wrapped_in"


class Wrapper(Optimizer):
    """An optimizer around another.

    Args:
        base: what it wraps.
        values: its hyper-parameters, by group key.

    Raises:
        TypeError: ``base`` is no optimizer, or a value of the wrong type.
        ValueError: a value out of range, or a base that cannot be wrapped.
    """

    hyperparameters: ClassVar[Mapping[str, Checker]]
    """Its group keys. No two wrappers around one base have the same."""

    own: ClassVar[Own]
    """Its keys in the state of parameters."""

    hands_closure_on: ClassVar[bool] = True
    """Whether the base evaluates closures, which line searches need."""

    base: Optimizer

    def __init__(self, base: Optimizer, values: Mapping[str, Any]) -> None:
        self._values = {key: self.hyperparameters[key](key, value) for key, value in values.items()}
        self._refuse(base)
        vars(base)[MARK] = type(self).__name__
        self.base = base
        self._why_closed: str | None = None
        # Not torch's __init__, which would give it groups and state of its own.
        super().__setstate__({})
        self._complete()
        with torch.no_grad():  # of bases that make their state at construction, or have stepped before
            self._begin([param for param in self._params() if self.state.get(param)])

    def _refuse(self, base: Optimizer) -> None:
        """Raise where this base cannot be wrapped."""
        refuse_base(base, type(self).__name__)
        if MARK in vars(base):
            raise ValueError(
                f"base is wrapped in {vars(base)[MARK]} already, and holds its settings and weights; go on with that "
                "wrapper, or build the base anew"
            )
        for inner in chain(base):
            if isinstance(inner, Wrapper) and inner.hyperparameters.keys() & self.hyperparameters.keys():
                raise ValueError(
                    f"base holds {type(inner).__name__} already, whose hyper-parameters have the names of "
                    f"{type(self).__name__}'s; one of the two is enough"
                )

    # Note [One optimizer]
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state, in which the wrapper keeps its own."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Found by GradScaler, as RuleOptimizer's: where it must not step, the step itself can say why."""
        return is_closed_to_scalers(self.base)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "_values": self._values, "_why_closed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Without a base it is torch's load_state_dict that calls, see there: the base has loaded by then.
        if "base" in state:
            self.base = state["base"]
            vars(self.base)[MARK] = type(self).__name__
            super().__setstate__(state)

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self._values.items())
        return f"{type(self).__name__}({values}) around {self.base!r}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it may hold hyper-parameters of the wrapper too.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: a value out of range, or what the base refuses. Nothing was added.
        """
        group = dict(mapping("param_group", param_group))
        own = {key: self.hyperparameters[key](key, group.pop(key)) for key in self.hyperparameters if key in group}
        self.base.add_param_group(group)
        self.param_groups[-1].update(own)
        self._complete()

    def state_bytes(self) -> int:
        """Bytes of the state, the wrapper's included, once every parameter has stepped.

        Of a base that is none of this package, what it holds by now.
        """
        self._complete()
        own: int = sum(
            param.numel() * self.own.dtype_of(key, param).itemsize
            for group in self.param_groups
            for param in group["params"]
            for key in self._kept(group)
        )
        with self._stripped():
            count = getattr(self.base, "state_bytes", None)
            of_base: int = sum(t.nbytes for t in tensors_in(dict(self.state))) if count is None else count()
        return own + of_base

    @contextlib.contextmanager
    def _stripped(self) -> Iterator[None]:
        """The state without what is the wrapper's own."""
        held = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        taken = {param: {key: state.pop(key) for key in self.own.keys if key in state} for param, state in held.items()}
        try:
            yield
        finally:
            for param, own in taken.items():
                held[param].update(own)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as the base
        """Let the base step, and do what the wrapper adds.

        Args:
            closure: computes the loss anew, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a step that the wrapper, or the base, cannot take. Nothing was changed.
        """
        is_scaled = vars(self).pop("found_inf", None) is not None
        vars(self).pop("grad_scale", None)
        self._refuse_while_closed("step")
        refuse_step(self.base, type(self).__name__, is_scaled=is_scaled)
        self._complete()
        loss: float | None = None
        if closure is not None and not self.hands_closure_on:
            with torch.enable_grad():
                loss = closure()
            closure = None
        context = neutral(self.param_groups)
        with context, torch.no_grad():
            makes_state = not self.state and only_makes_state(self.param_groups)
            noted = self._before(may_get_gradients=closure is not None, makes_state=makes_state)
        if closure is not None:
            loss = self.base.step(closure)
        else:
            self.base.step()
        with context, torch.no_grad():
            self._after(noted, makes_state=makes_state)
        return loss

    def _before(self, *, may_get_gradients: bool, makes_state: bool) -> Any:
        """Check and note what is needed of what the base's step will change; changes nothing itself.

        Args:
            may_get_gradients: whether a closure will make gradients.
            makes_state: whether the step is the hidden one of torch.distributed.checkpoint, for the state alone.
        """
        raise NotImplementedError

    def _after(self, noted: Any, *, makes_state: bool) -> None:
        """What the wrapper adds to a step.

        Args:
            noted: by :meth:`_before`.
            makes_state: as there.
        """
        raise NotImplementedError

    def _begin(self, params: Sequence[Tensor]) -> None:
        """Make the wrapper's state of parameters of which the base has some."""
        raise NotImplementedError

    def _kept(self, group: Group) -> Sequence[str]:
        """The keys of what is kept of a parameter of this group, each as large as that."""
        return self.own.weights

    def _complete(self) -> None:
        """Give groups that came by other ways, as through the base, what they lack, and check what they have."""
        for index, group in enumerate(self.param_groups):
            for key, value in self._values.items():
                group[key] = self.hyperparameters[key](f"group {index}: {key}", group.get(key, value))

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _held(self, key: str, params: Sequence[Tensor] | None = None) -> dict[Tensor, Tensor]:
        """By parameter what is kept under a key, of those that have it."""
        states = ((param, self.state.get(param) or {}) for param in (self._params() if params is None else params))
        return {param: state[key] for param, state in states if key in state}

    def _shared(self, key: str) -> Tensor | None:
        """What all parameters have one of."""
        return next((state[key] for param in self._params() if key in (state := self.state.get(param) or {})), None)

    def _refuse_while_closed(self, what: str) -> None:
        if self._why_closed is not None:
            raise RuntimeError(f"{type(self).__name__} cannot {what} {self._why_closed}. Nothing was changed")

    def state_dict(self) -> dict[str, Any]:
        """What the base's ``state_dict`` returns; the wrapper's state is in it."""
        self._complete()
        handle = self.register_state_dict_post_hook(lambda _, __: self.base.state_dict(), prepend=True)
        try:
            result: dict[str, Any] = super().state_dict()
            return result
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned. State is copied, the wrapper's in dtypes that go with the weights.

        A checkpoint of the base alone loads too: the wrapper begins with the weights that its next step finds.

        Raises:
            TypeError: a hyper-parameter of the wrong type.
            ValueError: the checkpoint belongs to another model, or to other wrappers. The optimizer is as before.
        """
        self._refuse_while_closed("load a checkpoint")

        def load(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            is_innermost = not isinstance(self.base, Wrapper)
            rest, own = parted(incoming, self.param_groups, self.own, self.hyperparameters, is_innermost=is_innermost)
            self._check_loaded(rest["param_groups"], own.shared)
            self.base.load_state_dict(rest)
            self._complete()
            for param, state in own.states.items():
                self.state[param].update(state)
            # torch is left to call the hooks, and __setstate__ with groups and state that nobody reads.
            return {"state": {}, "param_groups": [{"params": [0] * len(g["params"])} for g in self.param_groups]}

        handle = self.register_load_state_dict_pre_hook(load)
        try:
            with torch.no_grad():
                super().load_state_dict(mapping("state_dict", state_dict))  # type: ignore[arg-type]  # any mapping
        finally:
            handle.remove()

    def _check_loaded(self, groups: Sequence[Group], shared: Mapping[str, Tensor]) -> None:
        """Refuse what all parameters have one of, where it does not fit the checkpoint's own groups."""
