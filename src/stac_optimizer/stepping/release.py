"""Gradient release: each parameter is updated in backward, as soon as its gradient is there, and the gradient freed.

Knows when to update and what to refuse; the update itself is the optimizer's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.model.names import name_of, named_parameters
from stac_optimizer.other_steps import hear
from stac_optimizer.rule import Group, Rule

__all__ = ["GradientRelease"]

EACH_RANK_ALONE = (
    "would step on the gradients of each rank alone: its hooks run before gradients are averaged over ranks"
)
ORDINARY_LOOP = "train without release_gradients, with step() after backward"


class Releasable(Protocol):
    """What a release needs of an optimizer."""

    param_groups: list[dict[str, Any]]
    _release: GradientRelease | None

    def _update(self, groups: Sequence[Group], position: int | None = None) -> None:
        """Update what has a gradient in these groups, or raise before any of it has changed."""


# Note [Whose hooks]
# Parameters hold the hooks, and outlive the optimizer. So hooks and release know it weakly, and it holds the release:
# there is no cycle, and with the last reference to the optimizer its hooks are gone.
class GradientRelease:
    """The time in which an optimizer updates during backward: until :meth:`remove`, or the end of a ``with``.

    It ends with the optimizer too, which this handle does not keep alive.

    Each parameter is updated once its whole gradient of this backward is accumulated, and the gradient is freed, so
    ``.grad`` of at most one parameter is alive at a time. Weights and state are those of the ordinary loop to the bit.
    There is one exception: a first step at lr 0 whose gradients are all zeros is counted here and not there. What
    autograd computes together, such as weight and bias of one layer, it also holds together until it is accumulated.

    - ``step()`` marks the end of an iteration, and is needed: without it a second backward is refused. It has nothing
      left to update, except gradients that were set by hand. Step hooks run then, with the weights already moved.
    - ``zero_grad()`` finds nothing to do. Schedulers work: the learning rate is read at each update.
    - ``state_dict`` and ``load_state_dict`` work, also between backward and step. Copies of the optimizer, by deepcopy
      or pickle, are without release.
    - What needs all gradients at once cannot work. Clipping by the global norm finds no gradients and, in torch, says
      nothing. Gradient accumulation, a GradScaler, closures and ``error_if_nonfinite`` are refused. To change one
      gradient by itself, register a hook of your own on its parameter before the release.
    - Where a gradient comes too early, before ranks have averaged it, the release is refused.
    - Another optimizer over the same parameters finds no gradients; where it steps in the place of this one, it raises.
    - A backward that raises half-way leaves the parameters that it had reached updated.
    - A weight that is used in several reentrant checkpoints is refused, for each is a backward of its own; give
      ``torch.utils.checkpoint`` ``use_reentrant=False``.
    - A weight that the backward under way still needs, as a constant beside its own gradient, is autograd's error. What
      reads it behind autograd's back, through ``weight.data``, may read the new one.

    Args:
        optimizer: whose parameters are to be updated.
        rules: its rules, by the name that groups hold.
        model: the module that holds all of them.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a parameter of the optimizer is not in ``model``.
        RuntimeError: something that a release cannot serve; nothing was changed. In backward and from ``step()``: as
            above, or a gradient that cannot be applied.
    """

    def __init__(self, optimizer: Releasable, rules: Mapping[str, Rule], model: nn.Module) -> None:
        _refuse_model(optimizer, rules, model)
        self._optimizer, self._rules = weakref.ref(optimizer), rules
        self._updated: set[Tensor] = set()
        indexed = [(param, index) for index, group in enumerate(optimizer.param_groups) for param in group["params"]]
        handles = [
            _hooked(param, partial(_apply, self._optimizer, index, position))
            for position, (param, index) in enumerate(indexed)
        ]
        self._end = weakref.finalize(optimizer, _remove, handles, self._updated)
        optimizer._release = self
        hear(self)

    def __enter__(self) -> GradientRelease:
        if self._optimizer() is None:
            raise RuntimeError(
                "the optimizer of this release is gone, and the release with it; keep the optimizer in a variable"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Go back to the ordinary loop. To do so again changes nothing."""
        self._end()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None

    def end_iteration(self, optimizer: Releasable, closure: object) -> None:
        """What the optimizer's step asks first.

        Raises:
            RuntimeError: what asks for this step expects it to do what backward has done already.
        """
        # What a GradScaler hands over; it takes these away only after a step that succeeds.
        handed_over = vars(optimizer)
        if handed_over.pop("found_inf", None) is not None:
            handed_over.pop("grad_scale", None)
            raise RuntimeError(
                "a GradScaler steps while gradients are released: backward has applied them already, still multiplied "
                "by its scale and not checked for infinity. Go back to the weights before this backward; train in "
                f"bfloat16 without a scaler (or with enabled=False), or {ORDINARY_LOOP}"
            )
        if closure is not None:
            raise RuntimeError(
                "step got a closure while gradients are released: the closure's backward would itself update, before "
                f"the step knows its loss. Call backward and then step() without a closure, or {ORDINARY_LOOP}"
            )
        _refuse_ranks()  # they may have come after the release
        for param in self._updated:
            if param.grad is not None:
                _refuse_second(optimizer, param)
        self._updated.clear()

    def problem_of_step(self, other: Optimizer) -> str | None:
        """What is wrong where another optimizer has stepped in the place of this one.

        Once this one has stepped, alone or within a wrapper, nothing is left of the iteration.
        """
        optimizer = self._optimizer()
        if optimizer is None or optimizer._release is not self or not self._updated:
            return None
        params = (param for group in other.param_groups for param in group["params"])
        missed = next((param for param in params if param in self._updated and param.grad is None), None)
        if missed is None:
            return None
        return (
            f"{type(other).__name__} has found no gradient of {_name(optimizer, missed)}: backward has applied it for "
            f"{type(optimizer).__name__}, which releases gradients, and freed it. Before another optimizer trains the "
            "same parameters, call remove() on what release_gradients returned, or drop all references to that "
            "optimizer, also a scheduler's"
        )

    def apply(self, optimizer: Releasable, index: int, position: int, param: Tensor) -> None:
        """Update one parameter, whose gradient is there.

        Args:
            optimizer: the release's.
            index: of its group, which load_state_dict replaces by another dict.
            position: its place among all parameters.
            param: the parameter.
        """
        group = optimizer.param_groups[index]
        _refuse_group(group, self._rules)  # a checkpoint may have brought another flag
        if param.grad is None:
            raise RuntimeError(
                f"the gradient of {_name(optimizer, param)} is gone before it could be applied: another hook, perhaps "
                "the release of another optimizer, has freed it. Remove that one first"
            )
        if param in self._updated:
            _refuse_second(optimizer, param)
        optimizer._update([{**group, "params": [param]}], position)
        self._updated.add(param)
        param.grad = None


def _hooked(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    trains = param.requires_grad
    # torch puts hooks only on what requires grad, and what is frozen now may thaw while they are there.
    param.requires_grad_(True)
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(trains)
    return handle


def _apply(owner: weakref.ref[Releasable], index: int, position: int, param: Tensor) -> None:
    """The hook of a parameter."""
    optimizer = owner()
    if optimizer is not None and optimizer._release is not None:
        optimizer._release.apply(optimizer, index, position, param)


def _remove(handles: Iterable[RemovableHandle], updated: set[Tensor]) -> None:
    for handle in handles:
        handle.remove()
    updated.clear()  # or a handle that is kept would keep parameters


def _refuse_second(optimizer: Releasable, param: Tensor) -> None:
    raise RuntimeError(
        f"{_name(optimizer, param)} has a second gradient since the last step(), and the first is applied and gone: "
        "released gradients cannot be accumulated. Call step() after each backward (zero_grad() drops what is left "
        f"now); to accumulate over several, {ORDINARY_LOOP}. Each reentrant torch.utils.checkpoint is a backward of "
        "its own: pass use_reentrant=False"
    )


def _name(optimizer: Releasable, param: Tensor) -> str:
    return repr(name_of(optimizer.param_groups, param))


def _refuse_model(optimizer: Releasable, rules: Mapping[str, Rule], model: nn.Module) -> None:
    """Raise where a release of this optimizer's gradients would not give the ordinary trajectory."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the module that the optimizer trains, got {type(model).__name__}")
    if optimizer._release is not None:
        raise RuntimeError("gradients are released already; remove() the handle that release_gradients returned first")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            where = f"holds DistributedDataParallel as {name!r}" if name else "is DistributedDataParallel"
            raise RuntimeError(f"model {where}, and release_gradients {EACH_RANK_ALONE}; {ORDINARY_LOOP}")
    _refuse_ranks()
    for group in optimizer.param_groups:
        _refuse_group(group, rules)
    held = set(model.parameters())
    for name, param, _ in named_parameters(optimizer.param_groups):
        if param not in held:
            raise ValueError(f"model lacks the optimizer's parameter {name!r}; pass the module that holds all of them")
        if is_sharded(param):
            raise RuntimeError(
                f"{name!r} is a DTensor, as FSDP2 makes them, and never runs the hooks of release_gradients on its "
                f"own gradient; {ORDINARY_LOOP}"
            )
        if param.grad is not None:
            raise RuntimeError(
                f"{name!r} has a gradient already, to which the next backward would add; call step(), if it is to "
                "count, and zero_grad() before release_gradients"
            )


def _refuse_ranks() -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        size = distributed.get_world_size()
        raise RuntimeError(
            f"torch.distributed runs on {size} ranks, and release_gradients {EACH_RANK_ALONE}; {ORDINARY_LOOP}"
        )


def _refuse_group(group: Group, rules: Mapping[str, Rule]) -> None:
    if rules[group["rule"]].is_guest:
        raise RuntimeError(
            f"release_gradients steps one parameter at a time, and {group['rule']} ({group.get('stac_role')}) is a "
            f"foreign optimizer, which may need all gradients at once; {ORDINARY_LOOP}"
        )
    for flag, reason, way_out in (
        (
            "differentiable",
            "a recorded step must not change weights that the backward under way still needs",
            "Pass differentiable=False",
        ),
        (
            "error_if_nonfinite",
            "it promises that nothing changes where any gradient is bad, and earlier ones are gone",
            "Pass error_if_nonfinite=False",
        ),
        ("vote", "ranks vote in step, on all averages together", "Build the optimizer without vote"),
    ):
        if group.get(flag):
            raise RuntimeError(
                f"release_gradients does not work with {flag}={group[flag]!r} "
                f"({group.get('stac_role', group['rule'])}): {reason}. {way_out}, or {ORDINARY_LOOP}"
            )
