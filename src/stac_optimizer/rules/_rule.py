"""What a rule is: the mathematics of one update, with its hyper-parameters, its state and its paths.

A rule holds no data. :class:`stac_optimizer.STAC` hands it one parameter group at a time; everything that changes an
update stands in that group or in the state, so a checkpoint resumes bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from stac_optimizer import _codes, _shards, _tensors
from stac_optimizer._validation import Checker, boolean, count, learning_rate, non_negative, optional_boolean
from stac_optimizer.vote import Voters

__all__ = ["COMMON_HYPERPARAMETERS", "Group", "Hyperparameter", "Rule", "StateTensor", "StepInputs"]

Group = Mapping[str, Any]
"""One parameter group: hyper-parameters by name, plain Python values, lr possibly a tensor."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """A group key that a rule reads.

    Args:
        default: its value where nobody gives one.
        check: returns a given value as plain Python, or raises.
    """

    default: Any
    check: Checker


COMMON_HYPERPARAMETERS: Mapping[str, Hyperparameter] = {
    "lr": Hyperparameter(default=1e-3, check=learning_rate),
    "weight_decay": Hyperparameter(default=0.0, check=non_negative),
    "maximize": Hyperparameter(default=False, check=boolean),
    "error_if_nonfinite": Hyperparameter(default=False, check=boolean),
    "foreach": Hyperparameter(default=None, check=optional_boolean),
    "fused": Hyperparameter(default=None, check=optional_boolean),
    "capturable": Hyperparameter(default=False, check=boolean),
    "differentiable": Hyperparameter(default=False, check=boolean),
    "stochastic_rounding": Hyperparameter(default=False, check=boolean),
    "rounding_seed": Hyperparameter(default=0, check=count),
}


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """Declares one state tensor of a parameter: zeros of its shape and layout, unless told otherwise.

    Args:
        key: its key in ``optimizer.state[parameter]``, torch's own where the meaning is torch's.
        counter: a 0-dim float32 count of steps instead.
        scales: the float32 scales of a neighbour in 8-bit codes instead; empty where that is not in codes.
        dtype: None for the parameter's; ``torch.int8`` for 8-bit codes, where the parameter can have them.
    """

    key: str
    counter: bool = False
    scales: bool = False
    dtype: torch.dtype | None = None

    def create(self, param: Tensor, group: Group) -> Tensor:
        """Zeros, as declared. A counter lives on the CPU unless a kernel must read it (capturable or fused)."""
        if self.counter:
            return torch.zeros((), dtype=torch.float32, device=self.device(param, group))
        if self.scales:
            return _codes.scales_like(param)
        return torch.zeros_like(param, dtype=self.dtype_for(param), memory_format=torch.preserve_format)

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """The dtype once created."""
        if self.counter or self.scales:
            return torch.float32
        is_kept = param.is_complex() or (self.dtype == torch.int8 and not _codes.can_be_coded(param))
        return param.dtype if self.dtype is None or is_kept else self.dtype

    def device(self, param: Tensor, group: Group) -> torch.device:
        """Where the tensor belongs."""
        on_device = not self.counter or group["capturable"] or group["fused"]
        return param.device if on_device else torch.device("cpu")

    def shape(self, param: Tensor) -> torch.Size:
        """The shape once created."""
        if self.counter:
            return torch.Size()
        return _codes.scales_shape(param) if self.scales else param.shape

    def nbytes(self, param: Tensor) -> int:
        """Bytes once created."""
        return math.prod(self.shape(param)) * self.dtype_for(param).itemsize


class StepInputs(NamedTuple):
    """What a step hands to the rule of one group.

    Args:
        group: the group.
        params: those of its parameters that have a gradient, at least one.
        grads: their gradients, read-only.
        states: one list for each of the rule's :meth:`Rule.state_tensors`, in that order.
        grad_scale: what a GradScaler left the gradients multiplied by.
        positions: for each parameter its place among all of the optimizer.
        found_inf: not 0 where a GradScaler found NaN or infinity, for rules that skip such a step by themselves.
        voters: the ranks that vote on the step of a group with ``trunk_vote``.
    """

    group: Group
    params: list[Tensor]
    grads: list[Tensor]
    states: Sequence[list[Tensor]]
    grad_scale: Tensor | None = None
    positions: Sequence[int] = ()
    found_inf: Tensor | None = None
    voters: Voters | None = None


class Rule(ABC):
    """One update rule. A subclass is stateless; ``RULES`` holds one instance of each by its ``name``."""

    name: ClassVar[str]
    """The group key ``rule`` holds it, so checkpoints do too: once released, never renamed."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {}
    """Group keys that the rule reads besides the common ones. One that another rule has too means the same there."""

    state_keys: ClassVar[frozenset[str]]
    """Every key that :meth:`state_tensors` may declare, whatever the hyper-parameters."""

    paths: ClassVar[frozenset[str]] = frozenset({"single", "foreach"})
    """The ways it can run: "single", "foreach", "fused"."""

    votes: ClassVar[bool] = False
    """Whether ranks vote on its step with ``trunk_vote``; where not, they average gradients."""

    @abstractmethod
    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        """The state that one parameter has under this group's hyper-parameters, counter first."""

    @abstractmethod
    def update(self, inputs: StepInputs) -> None:
        """Update parameters in place. Called without gradient recording, unless the group is differentiable."""

    def unfitness(self, param: Tensor, group: Group) -> str | None:
        """Why this parameter cannot have these hyper-parameters, or None. Asked at construction and on load."""
        if group["stochastic_rounding"] and param.dtype != torch.bfloat16:
            return (
                f"is {param.dtype}, and stochastic_rounding is for torch.bfloat16 alone; give such parameters a group "
                "of their own with stochastic_rounding=False"
            )
        if group["stochastic_rounding"] and not _shards.is_sharded_in_runs(param):
            return (
                "is sharded within rows, and stochastic_rounding numbers the elements of whole ones; shard the first "
                "dimension, or give such parameters a group of their own with stochastic_rounding=False"
            )
        return None

    def refusal(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """Why this gradient cannot be applied, or None. Asked for every parameter before any of them changes."""
        if grad.layout != torch.strided:
            return f"has a gradient of layout {grad.layout}; make it dense, for embeddings with sparse=False"
        if _shards.is_sharded(param) != _shards.is_sharded(grad):
            kinds = ["a plain tensor", "a DTensor"]
            param_kind, grad_kind = (kinds[_shards.is_sharded(tensor)] for tensor in (param, grad))
            return f"is {param_kind} and its gradient {grad_kind}; distribute the gradient as the parameter is"
        if group["differentiable"] and param.is_leaf and param.requires_grad:
            return "is a leaf that requires grad, which a differentiable step cannot change in place; give clones"
        return self.unfitness(param, group) if group["stochastic_rounding"] else None  # a model may have been cast

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        """Whether :meth:`update` itself reads ``found_inf`` on the device, so that the host need not wait for it."""
        return False

    def average_state(  # noqa: B027 - most rules have nothing to do
        self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], voters: Voters
    ) -> None:
        """Make state that differs by rank under a vote the mean over ranks; a collective."""

    def advice(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        """What the user should be warned of at construction, or None."""
        return None

    def nbytes(self, param: Tensor, state: Mapping[str, Tensor], group: Group) -> int:
        """State bytes of one parameter once it has stepped: as held, as declared where nothing is held yet."""
        tensors = self.state_tensors(group)
        return sum(state[t.key].nbytes if t.key in state else t.nbytes(param) for t in tensors)

    def path(self, params: Sequence[Tensor], group: Group) -> str:
        """The path that the flags ask for; without flags the fastest safe one, as torch chooses."""
        if group["fused"] and "fused" in self.paths:
            return "fused"
        foreach = group["foreach"]
        if foreach is None:
            foreach = _tensors.is_foreach_faster(params, differentiable=group["differentiable"])
        return "foreach" if foreach else "single"
