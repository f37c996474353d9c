"""What a step that fails on its way has changed: put back where that is little, else told in its error.

Memory may run out, or the user interrupt, at any operation. The error keeps its type, for users catch
``torch.OutOfMemoryError`` to go on with the next batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stac_optimizer.model.names import listed, named_parameters
from stac_optimizer.rule import COUNTER, Group, Rule, StepInputs
from stac_optimizer.tensors.kinds import PLAIN_TYPES
from stac_optimizer.tensors.torch_private import has_dispatch_modes

__all__ = ["Attempt"]

# Names of each kind that a message tells.
MOST_NAMES = 8
# What refusals say by themselves.
TOLD = ("Nothing was changed", "It was not changed")
# From here on float32 does not tell whether one was added.
COUNTED = 2**24


class Steppable(Protocol):
    """What an attempt asks of an optimizer."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _voters: Any


# Note [Traces of writes]
# torch counts the writes to a tensor, which tells what a rule has reached. Not what kernels on a device write by
# address, what is written to the parts of a DTensor, and, where a mode sees all operations, what those on lists write:
# there everything that the rule may have begun with counts as reached.
class _Versions(NamedTuple):
    """The counts of writes to the tensors of a rule's step (Note [Traces of writes]).

    Args:
        counters: of the counters, of the first alone where all are counted at once.
        rest: of the weights, and of each kind of state; None where they do not tell.
    """

    counters: list[int]
    rest: list[list[int]] | None


class Attempt:
    """A step under way, as a context: what leaves it as an exception is told what has changed.

    Args:
        optimizer: whose step.
        groups: those to step.
        rules: by the name that groups hold.
        made: parameters, and keys of their state, that this step makes; filled while it gathers them.
        position: of a parameter that is stepped in backward; None where all are stepped.
    """

    def __init__(
        self,
        optimizer: Steppable,
        groups: Sequence[Group],
        rules: Mapping[str, Rule],
        made: list[tuple[Tensor, str]],
        position: int | None,
    ) -> None:
        self._optimizer, self._groups, self._rules, self._made = optimizer, groups, rules, made
        self._in_backward = position is not None
        self._done: list[list[Tensor]] = []
        self._guests: list[Tensor] = []
        self._now: StepInputs | None = None
        self._before: _Versions | None = None

    def __enter__(self) -> Attempt:
        self._made.clear()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            _add(error, self._settled())

    def begin_guests(self) -> None:
        """Foreign optimizers step next. What they write to, beside their parameters, is not known."""
        of_guests = [group["params"] for group in self._groups if self._rules[group["rule"]].is_guest]
        self._guests = [param for params in of_guests for param in params if param.grad is not None]

    def end_guests(self) -> None:
        """They have stepped."""
        self._done.append(self._guests)
        self._guests = []

    def begin(self, inputs: StepInputs) -> None:
        """A rule steps next; the one before it has."""
        if torch.compiler.is_compiling():
            return
        if self._now is not None:
            self._done.append(self._now.params)
        self._now = inputs
        self._before = self._versions(inputs)

    def _versions(self, inputs: StepInputs) -> _Versions | None:
        if has_dispatch_modes():
            return None
        group, (counters, *states) = inputs.group, inputs.states.values()
        is_plain = PLAIN_TYPES.issuperset(map(type, inputs.params))
        if is_plain and self._rules[group["rule"]].counts_at_once:
            counters = counters[:1]
        rest: list[list[int]] | None = None
        try:
            if is_plain and not (group["fused"] and not inputs.params[0].is_cpu):
                # An attribute a tensor, for there may be thousands.
                rest = [[tensor._version for tensor in tensors] for tensors in (inputs.params, *states)]
            return _Versions([counter._version for counter in counters], rest)
        except RuntimeError:  # tensors of inference mode have none
            return None

    def _settled(self) -> str:
        """Put back what alone has moved, and tell what is not as before."""
        begun = [*self._guests, *self._begun()]
        done = [param for params in self._done for param in params]
        reached = {id(param) for param in (*begun, *done)}
        self._take_state_back(reached)
        if not reached:
            return "Nothing was changed" + (" but what this backward had reached before" if self._in_backward else "")
        stepped = [param for group in self._groups for param in group["params"] if param.grad is not None]
        rest = [param for param in stepped if id(param) not in reached]
        names = {id(param): name for name, param, _ in named_parameters(self._optimizer.param_groups)}
        told = [
            f"{what}: {listed([names[id(param)] for param in params], MOST_NAMES)}"
            for what, params in (("updated", done), ("perhaps in part", begun), ("as before", rest))
            if params
        ]
        others = "" if self._optimizer._voters is None else "; end the other ranks, which may wait for this one"
        # A foreign optimizer may have refused before it wrote, which nothing tells for sure.
        unless = "unless the foreign optimizer refused before it wrote, " if self._guests and not done else ""
        advice = f"{unless}go back to a checkpoint, or go on at your own risk{others}"
        return f"The step had begun ({'; '.join(told)}): {advice}"

    def _take_state_back(self, reached: Container[int]) -> None:
        """Remove state that this step has made of parameters that it has not reached."""
        state = self._optimizer.state
        for param, key in self._made:
            if id(param) not in reached:
                state[param].pop(key, None)
        for param in [param for group in self._groups for param in group["params"] if not state.get(param, True)]:
            del state[param]

    def _begun(self) -> list[Tensor]:
        """What the rule under way may have written to, once counters that had moved alone are put back."""
        inputs, before = self._now, self._before
        if inputs is None:
            return []
        now = self._versions(inputs)
        if before is None or now is None:
            return inputs.params
        counters = inputs.states[COUNTER.key]
        moves = [new - old for new, old in zip(now.counters, before.counters, strict=True)]
        moves *= len(counters) // len(moves)
        if before.rest is None or now.rest is None:
            return [param for param, moved in zip(inputs.params, moves, strict=True) if moved]
        changed = [
            [new != old for new, old in zip(*pair, strict=True)] for pair in zip(now.rest, before.rest, strict=True)
        ]
        written = [any(flags) for flags in zip(*changed, strict=True)]
        counted = [
            step for step, moved, is_begun in zip(counters, moves, written, strict=True) if moved and not is_begun
        ]
        can_restore = self._rules[inputs.group["rule"]].counts_at_once and moves[0] == 1 and inputs.found_inf is None
        if counted and not (can_restore and _uncounted(counted)):
            written = [flag or bool(moved) for flag, moved in zip(written, moves, strict=True)]
        return [param for param, flag in zip(inputs.params, written, strict=True) if flag]


def _uncounted(counters: Iterable[Tensor]) -> bool:
    """Take one off each counter again; False, and nothing done, where that would not give what it was."""
    counters = list(counters)
    try:
        if any(counter.item() >= COUNTED for counter in counters):
            return False
        with torch.no_grad():
            torch._foreach_sub_(counters, 1)
    except RuntimeError:  # a device that failed for good, or a stream that is captured
        return False
    return True


def _add(error: BaseException, text: str) -> None:
    """Let an error's message end in this."""
    message = str(error)
    if any(told in message for told in TOLD):
        return
    if error.args and error.args[0] == message:
        error.args = (f"{message.rstrip().rstrip('.')}. {text}", *error.args[1:])
    elif not error.args:
        error.args = (text,)
    elif hasattr(error, "add_note"):  # since Python 3.11; of an error that words its arguments by itself
        error.add_note(text)
    else:
        error.args = (*error.args, text)
