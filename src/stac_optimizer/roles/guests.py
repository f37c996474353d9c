"""Guests: foreign optimizers that update a role of STAC. They share its very group dicts and its state.

So schedulers, ``state_dict``, distributed checkpoints and copies see one optimizer. A guest that keeps state elsewhere
is hosted by ``own_state.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.groups.foreign_state import tensors_in
from stac_optimizer.rule import Group, Rule, StateTensor

__all__ = ["Guest", "GuestRule", "guest_of"]

# What STAC shares with a guest, and hooks, which torch leaves out of copies as well.
SHARED = frozenset({"param_groups", "state"})


class GuestRule(Rule):
    """What a guest's groups answer where rules are asked: it declares nothing, and is never stepped as a rule.

    Args:
        kind: the guest's class.
    """

    is_guest: ClassVar[bool] = True
    state_keys = ()

    def __init__(self, kind: type[Optimizer]) -> None:
        # The module within a package may move from release to release.
        self.name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"  # type: ignore[misc]  # one a guest

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return ()

    def parameter_problem(self, param: Tensor, group: Group) -> str | None:
        return None

    def gradient_problem(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        if is_sharded(param) != is_sharded(grad):
            return "and its gradient are not both DTensors; distribute the gradient as the parameter is"
        return None

    def nbytes(self, param: Tensor, state: Mapping[str, Any], group: Group) -> int:
        return sum(tensor.nbytes for tensor in tensors_in(state))


class Guest:
    """A foreign optimizer that updates a role.

    Args:
        optimizer: it, over the role's parameters.
        role: the role.
    """

    def __init__(self, optimizer: Optimizer, role: str) -> None:
        self.optimizer, self.role = optimizer, role
        self.rule = GuestRule(type(optimizer))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The dicts that STAC takes for its own."""
        return self.optimizer.param_groups

    def tie(self, host: Optimizer) -> None:
        """Share the host's groups of the role, and its state.

        By assignment: a ``__setstate__``, such as Adagrad's, may look at the other role's state.
        """
        self.optimizer.param_groups = [group for group in host.param_groups if group["stac_role"] == self.role]
        self.optimizer.state = host.state
        if hasattr(self.optimizer, "_params"):  # LBFGS remembers its parameters
            self.optimizer._params = self.optimizer.param_groups[0]["params"]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Let it step, on gradients that are there or by the closure's."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Let it complete a group, and take it."""
        self.optimizer.add_param_group(group)

    def state_bytes(self, state: Mapping[Tensor, Any]) -> int:
        """Bytes of its state once every parameter has stepped, found by a step of a twin without data."""
        params = [param for group in self.groups for param in group["params"]]
        held = sum(tensor.nbytes for param in params for tensor in tensors_in(state.get(param, {})))
        if all(state.get(param) for param in params):
            return held
        try:
            return sum(tensor.nbytes for each in self._dry_run() for tensor in tensors_in(each))
        except Exception:  # what a foreign step cannot do without data shows in many ways
            return held

    def _dry_run(self) -> list[Any]:
        twin = object.__new__(type(self.optimizer))
        Optimizer.__setstate__(twin, {**_attributes(self.optimizer), "state": {}, "param_groups": []})
        twin.state = type(self.optimizer.state)(dict)
        for group in self.groups:
            params = [torch.nn.Parameter(torch.empty_like(param, device="meta")) for param in group["params"]]
            for param in params:
                param.grad = torch.empty_like(param)
            twin.param_groups.append({**group, "params": params})
        type(twin).step(twin)
        return list(twin.state.values())

    def state_dict(self) -> dict[str, Any] | None:
        """What the host's own state dict does not hold."""
        return None

    def prepare_load(self, data: Mapping[str, Any] | None) -> Callable[[], None]:
        """Check what :meth:`state_dict` returned; the result loads it."""
        if data is not None:
            raise ValueError(f"the checkpoint has state of its own for the {self.role}, which {self.rule.name} has not")
        return lambda: None

    def __getstate__(self) -> dict[str, Any]:
        # Attributes that torch's __getstate__ would drop, such as those of LBFGS and lion-pytorch's Lion.
        return {"role": self.role, "kind": type(self.optimizer), "attributes": _attributes(self.optimizer)}

    def __setstate__(self, held: dict[str, Any]) -> None:
        optimizer = object.__new__(held["kind"])
        Optimizer.__setstate__(optimizer, held["attributes"])
        self.optimizer, self.role, self.rule = optimizer, held["role"], GuestRule(held["kind"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Guest:
        twin = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in vars(optimizer).items() if key not in SHARED and not key.endswith("_hooks")}


def guest_of(optimizer: Optimizer, role: str, function: Callable[[Any], Optimizer]) -> Guest:
    """The guest that an optimizer makes: one that shares, or one that keeps state of its own."""
    from stac_optimizer.roles.own_state import OwnStateGuest, keeps_own_state  # noqa: PLC0415 - seldom needed

    return OwnStateGuest(optimizer, role, function) if keeps_own_state(optimizer) else Guest(optimizer, role)
