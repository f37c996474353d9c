"""One neutral context around an update, so that a step is the same inside any context of the user's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from stac_optimizer.model.names import name_of
from stac_optimizer.rule import Group
from stac_optimizer.tensors.kinds import is_fake
from stac_optimizer.tensors.torch_private import (
    has_dispatch_modes,
    has_function_modes,
    is_any_autocast_enabled,
    is_dry_run,
    without_autocast,
)

__all__ = ["check_writable", "copies_for_backward", "neutral"]

# Note [Ambient contexts]
# autocast chooses dtypes, the defaults of dtype and device decide what new tensors are, and what inference mode makes
# no step outside of it may write to. An update runs under none of these. What watches operations or asks something of
# them, and changes no result, stays active: profilers, modes that pass operations on, deterministic algorithms, anomaly
# detection. Closures and foreign optimizers run in the user's contexts, as they would without this package.


def neutral(groups: Sequence[Group]) -> AbstractContextManager[Any]:
    """The context for an update of these groups (Note [Ambient contexts]), which may be entered again once left.

    Fake tensors are updated under their own mode, where that is no longer active.
    """
    if torch.compiler.is_compiling():
        return _recorded(groups)
    # Asked in every step, so at little cost.
    is_usual = not (
        is_any_autocast_enabled()
        or has_function_modes()
        or torch.is_inference_mode_enabled()
        or torch.get_default_dtype() is not torch.float32
        or DEFAULT_DTYPE.updates
        or is_fake(_first(groups))
    )
    return NOTHING if is_usual else _Neutral(groups)


NOTHING = nullcontext()


def copies_for_backward(*, is_recorded: bool) -> AbstractContextManager[Any]:
    """Where a step is recorded: what an operation keeps for backward, a later one of the step may write to."""
    return saved_tensors_hooks(_copied, _as_it_is) if is_recorded else nullcontext()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _recorded(groups: Sequence[Group]) -> AbstractContextManager[Any]:
    """The same for what torch.compile records, which knows no defaults of its own."""
    param = _first(groups)
    if param is not None and torch.is_autocast_enabled(param.device.type):
        return torch.autocast(param.device.type, enabled=False)
    return nullcontext()


def _first(groups: Sequence[Group]) -> Tensor | None:
    """The first parameter; libraries that deal parameters out over ranks may leave a rank none."""
    for group in groups:  # not by next(), which torch.compile of torch 2.6 does not know
        for param in group["params"]:
            first: Tensor = param
            return first
    return None


class _DefaultDtype:
    """float32 as the default dtype, which all threads share: from the first update that needs it to the last."""

    def __init__(self) -> None:
        self.updates = 0
        self._of_user = torch.float32
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Another update begins."""
        with self._lock:
            if not self.updates:
                self._of_user = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.updates += 1

    def let_go(self) -> None:
        """It has ended."""
        with self._lock:
            self.updates -= 1
            if not self.updates:
                torch.set_default_dtype(self._of_user)


DEFAULT_DTYPE = _DefaultDtype()


class _Neutral:
    """What :func:`neutral` returns where a context is active."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups, self._contexts = groups, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as contexts:
            if is_any_autocast_enabled():
                contexts.enter_context(without_autocast())
            params = [param for group in self._groups for param in group["params"]]
            if torch.is_inference_mode_enabled() and not any(map(Tensor.is_inference, params)):
                contexts.enter_context(torch.inference_mode(mode=False))
                contexts.enter_context(torch.no_grad())
            if has_function_modes():  # a default device is one of them, and torch 2.6 cannot tell which
                contexts.enter_context(torch.device("cpu"))
            mode: Any = getattr(_first(self._groups), "fake_mode", None)
            if mode is not None and not is_dry_run():
                contexts.enter_context(mode)
            DEFAULT_DTYPE.hold()
            contexts.callback(DEFAULT_DTYPE.let_go)
            self._contexts = contexts.pop_all()

    def __exit__(self, *exception: Any) -> None:
        self._contexts.close()


def check_writable(groups: Sequence[Group], all_groups: Sequence[Group]) -> None:
    """Refuse what torch would find out in the middle of an update: that it cannot be written to in this context.

    Args:
        groups: those to step.
        all_groups: the optimizer's, which know the names.

    Raises:
        RuntimeError: an inference tensor outside of inference mode; tensors with data among those of a dry run.
    """
    if torch.compiler.is_compiling():
        return
    is_dry = (has_dispatch_modes() and is_dry_run()) or is_fake(_first(groups))
    for group in groups:
        if is_dry:
            reasons = [None if is_fake(param) else WITH_DATA for param in group["params"]]
        elif any(map(Tensor.is_inference, group["params"])) and not torch.is_inference_mode_enabled():
            reasons = [OF_INFERENCE if param.is_inference() else None for param in group["params"]]
        else:
            continue
        for param, reason in zip(group["params"], reasons, strict=True):
            if reason is not None:
                raise RuntimeError(f"{name_of(all_groups, param)!r} {reason}. Nothing was changed")


WITH_DATA = (
    "holds data, and the step is a dry run on fake tensors: build model, gradients and optimizer under one "
    "FakeTensorMode, or step outside of it"
)
OF_INFERENCE = "was made inside torch.inference_mode, and can be written to there alone: build the model outside of it"
