"""The contract of a rule. A rule holds no data: everything that changes an update stands in groups or state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from stac_optimizer.distributed.shards import is_sharded, is_sharded_in_runs
from stac_optimizer.distributed.vote import Voters
from stac_optimizer.rule.execution.preparation import Measuring, step_prepared
from stac_optimizer.rule.execution.wholes import Wholes
from stac_optimizer.rule.hyperparameters import Group, Hyperparameter
from stac_optimizer.rule.inputs import StateLists, StepInputs, TensorList
from stac_optimizer.rule.state import StateTensor
from stac_optimizer.tensors.kinds import is_fake
from stac_optimizer.tensors.torch_private import is_foreach_faster

__all__ = ["DTYPES", "REAL_DTYPES", "Rule"]

REAL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
DTYPES = REAL_DTYPES | {torch.complex128, torch.complex64, torch.complex32}  # what torch has arithmetic for


class Rule(ABC):
    """One update rule, stateless. Its optimizer class (:class:`stac_optimizer.optimizer.RuleOptimizer`) holds one."""

    name: ClassVar[str]
    """The group key ``rule`` holds it, so checkpoints do too: once released, never renamed."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "elements"
    """What an update must see at once. "elements" runs on any part of a parameter, under flat partitions too; "tensor"
    reduces over whole ones, and over their shards; "matrix" takes whole matrices, and no vectors."""

    lr_ratio: ClassVar[float] = 1.0
    """Where the learning rate of a role of STAC starts, of the shared one, beside another role."""

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {}
    """Group keys that the rule reads besides the common ones. Their defaults are this rule's alone."""

    excluded: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of group keys of which only one may be set, besides the common ones."""

    state_keys: ClassVar[tuple[str, ...]]
    """Every key that :meth:`state` may declare, the counter's "step" first."""

    numbers: ClassVar[tuple[str, ...]] = ()
    """Keys of state of which a parameter has one number, which :meth:`settled` alone sees."""

    switched_keys: ClassVar[frozenset[str]] = frozenset()
    """Those of them that it declares under some hyper-parameters alone, and that a checkpoint may lack: of a parameter
    that has not stepped since such a one was switched on."""

    paths: ClassVar[frozenset[str]] = frozenset({"single", "foreach"})
    """The ways it can run: "single", "foreach", "fused"."""

    votes: ClassVar[bool] = False
    """Whether ranks may vote on its step; where not, they average gradients."""

    counts_at_once: ClassVar[bool] = True
    """Whether a step begins by counting for all parameters, so that counters can be put back where it then fails. False
    where a :meth:`step` of the rule's own counts otherwise."""

    is_guest: ClassVar[bool] = False
    """Whether a foreign optimizer updates its groups, and not :meth:`step`."""

    @abstractmethod
    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        """The state of one parameter under this group's hyper-parameters, the counter first."""

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        """Update parameters and state in place, by ``torch._foreach_*`` functions.

        What every rule needs is done around it: tensors are local, real and in arithmetic precision, steps counted,
        gradients unscaled and negated under ``maximize``; lr is a float, or a 0-dim tensor of float32 or wider. Several
        threads may call it at once, on different tensors.

        Args:
            params: weights, of one device and dtype; on the single path a list of one.
            grads: read-only.
            state: by key, in the order of ``params``.
            group: the hyper-parameters.
            wholes: what can be asked of whole parameters, for rules that need more than elements.
        """
        raise TypeError(f"{type(self).__name__} has neither update nor a step of its own")

    def step(self, inputs: StepInputs) -> None:
        """Update parameters in place. Rules with paths of their own replace it, and prepare by themselves.

        Called without gradient recording, unless the group is differentiable.
        """
        step_prepared(
            inputs,
            self.update,
            measuring=Measuring(self.measured, self.settled) if self._measures else None,
            numbers=self.numbers,
            is_whole=self.needs_whole(inputs.group),
            is_dealt=self.needs == "matrix",
        )

    def measured(self, params: TensorList, grads: TensorList, state: StateLists, group: Group) -> Sequence[TensorList]:
        """For rules that ask for norms of whole parameters, and are elementwise besides: the first half of an update.

        It runs on all parts of a parameter before :meth:`update` runs on any, and must not change parameters. It may
        change the state, as the update then finds it; what is stored in low precision may be measured twice, each time
        from the same state.

        Returns:
            Lists of tensors, each with one for each of ``params``; ``wholes.norms`` then has their norms.
        """
        raise TypeError(f"{type(self).__name__} measures nothing")

    def settled(
        self, measured: Sequence[TensorList], state: StateLists, group: Group, wholes: Wholes
    ) -> Sequence[TensorList]:
        """Between the halves: what an update is to know of whole parameters, made of the norms that were measured.

        Args:
            measured: for each list that :meth:`measured` returned, the norms of these parameters.
            state: theirs as the optimizer holds it; that of ``numbers`` may be changed.
            group: the hyper-parameters.
            wholes: what can be asked of the parameters.

        Returns:
            Lists of numbers, each with one for each parameter, which ``wholes.settled`` then has for parts of them.
        """
        return measured

    @property
    def _measures(self) -> bool:
        return type(self).measured is not Rule.measured

    def needs_whole(self, group: Group) -> bool:
        """Whether parameters must not be cut under these hyper-parameters."""
        return self.needs != "elements" and not self._measures

    def walks_on(self, group: Group) -> bool:
        """Whether a weight whose gradient stays zero keeps moving at full speed, as under the sign of an average."""
        return False

    def takes(self, param: Tensor) -> bool:
        """Whether the rule can update a parameter of this shape; in STAC's trunk others go to the cap."""
        return self.needs != "matrix" or (param.ndim >= 2 and not param.is_complex())

    def parameter_problem(self, param: Tensor, group: Group) -> str | None:
        """Why this parameter cannot have these hyper-parameters, or None. Asked at construction and on load."""
        if not self.takes(param):
            has = f"is {param.dtype}" if param.is_complex() else f"has {param.ndim} dimension" + "s" * (param.ndim != 1)
            return (
                f"{has}, and {self.name} updates whole matrices of real numbers; give what is none to another "
                "optimizer, as STAC's cap, and do not flatten parameters, as ZeRO and DeepSpeed do"
            )
        if param.requires_grad and param.dtype not in DTYPES:
            return _no_arithmetic(f"is {param.dtype}")
        if not torch.compiler.is_compiling() and (param.is_conj() or param.is_neg()):  # which has no words for it
            return (
                "is a lazily conjugated or negated view, which cannot be updated in place; pass a parameter of "
                "tensor.resolve_conj().resolve_neg()"
            )
        if group["stochastic_rounding"] and param.dtype != torch.bfloat16:
            return (
                f"is {param.dtype}, and stochastic_rounding is for torch.bfloat16 alone; give such parameters a group "
                "of their own with stochastic_rounding=False"
            )
        if group["stochastic_rounding"] and not is_sharded_in_runs(param):
            return (
                "is sharded within rows, and stochastic_rounding numbers the elements of whole ones; shard the first "
                "dimension, or give such parameters a group of their own with stochastic_rounding=False"
            )
        return None

    def gradient_problem(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """Why this gradient cannot be applied, or None. Asked before anything changes, but see :meth:`takes_plain`."""
        if grad.layout != torch.strided:
            return (
                f"has a gradient of layout {grad.layout}, and {self.name} takes no sparse gradients; make it dense, "
                "for embeddings with sparse=False"
            )
        # Asked of every parameter in many a step, so what is plain is told at one look.
        is_plain = type(param) is Parameter and type(grad) is Tensor
        if not is_plain and is_sharded(param) != is_sharded(grad):
            kinds = ["a plain tensor", "a DTensor"]
            param_kind, grad_kind = (kinds[is_sharded(tensor)] for tensor in (param, grad))
            return f"is {param_kind} and its gradient {grad_kind}; distribute the gradient as the parameter is"
        if not is_plain and is_fake(param) != is_fake(grad):
            kinds = ["holds data", "is a fake tensor of a dry run"]
            param_kind, grad_kind = (kinds[is_fake(tensor)] for tensor in (param, grad))
            return f"{param_kind} and its gradient {grad_kind}; make both under one FakeTensorMode"
        if param.dtype not in REAL_DTYPES or grad.dtype not in REAL_DTYPES:
            problem = _number_problem(param, grad)
            if problem is not None:
                return problem
        if group["differentiable"] and param.is_leaf and param.requires_grad:
            return "is a leaf that requires grad, which a differentiable step cannot change in place; give clones"
        # A model may have been cast, or its parameters flattened, since construction.
        has_changed = group["stochastic_rounding"] or self.needs == "matrix"
        return self.parameter_problem(param, group) if has_changed else None

    def takes_plain(self, group: Group) -> bool:
        """Whether every plain gradient can be applied, so that :meth:`gradient_problem` is asked of no such one.

        Plain is a strided ``Tensor`` of a ``Parameter``, both of the same dtype, which is real. To be replaced beside
        :meth:`gradient_problem`.
        """
        has_conditions = group["differentiable"] or group["stochastic_rounding"] or self.needs == "matrix"
        return not has_conditions and type(self).gradient_problem is Rule.gradient_problem

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        """Whether :meth:`step` itself reads ``found_inf`` on the device, so that the host need not wait for it."""
        return False

    def average_state(  # noqa: B027 - most rules have nothing to do
        self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], voters: Voters
    ) -> None:
        """Make state that differs by rank under a vote the mean over ranks; a collective."""

    def can_lack(self, key: str, state: Mapping[str, Tensor]) -> bool:
        """Whether a checkpoint's state of a parameter may lack this key, which its group declares."""
        return key in self.switched_keys

    def warning(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        """What the user should be warned of at construction, or None."""
        return None

    def nbytes(self, param: Tensor, state: Mapping[str, Tensor], group: Group) -> int:
        """State bytes of one parameter once it has stepped: as held, as declared where nothing is held yet."""
        return sum(state[t.key].nbytes if t.key in state else t.nbytes(param) for t in self.state(param, group))

    def path(self, params: Sequence[Tensor], group: Group) -> str:
        """The path that the flags ask for; without flags the fastest safe one, as torch chooses."""
        if group["fused"] and "fused" in self.paths:
            return "fused"
        foreach = group["foreach"]
        if foreach is None:
            foreach = is_foreach_faster(params, differentiable=group["differentiable"])
        return "foreach" if foreach else "single"


def _number_problem(param: Tensor, grad: Tensor) -> str | None:
    """Why numbers of these dtypes, of which one at least is not real, cannot be computed with, or None."""
    for what, dtype in (("is", param.dtype), ("has a gradient of", grad.dtype)):
        if dtype not in DTYPES:
            return _no_arithmetic(f"{what} {dtype}")
    if param.is_complex() != grad.is_complex():
        return f"is {param.dtype} and its gradient {grad.dtype}; give both real, or both complex numbers"
    return None


def _no_arithmetic(fault: str) -> str:
    return (
        f"{fault}, for which torch has no arithmetic; keep weights and gradients in float32 or bfloat16, and convert "
        "them in forward alone"
    )
