"""Hear of the steps of all optimizers of the process, where one that is forgotten would spoil what another does."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

__all__ = ["hear"]


class Listener(Protocol):
    """Who hears."""

    def problem_of_step(self, other: Optimizer) -> str | None:
        """What is wrong, where that optimizer has stepped."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def hear(listener: Listener) -> None:
    """Let every optimizer's step raise what this finds wrong after it, for as long as it lives."""
    _listeners.add(listener)
    _register()


@cache
def _register() -> None:
    # Once, and for good: torch goes through these hooks one by one, and none may go while it does, as one would that
    # ended with an optimizer that the garbage collector finds just then.
    register_optimizer_step_post_hook(_tell)


def _tell(other: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():  # when one listens is no matter of the time that a step is traced
        return
    problems = [listener.problem_of_step(other) for listener in list(_listeners)]
    problem = next(filter(None, problems), None)
    if problem is not None:
        raise RuntimeError(problem)
