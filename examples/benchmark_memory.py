"""What a step allocates, in whichever thread, and what an optimizer's state holds. No timing here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# Private, for want of a public way: torch.profiler sees the thread alone that starts it. Two of them at once crash
# torch, and with profile_all_threads it tells of no memory. This older recorder runs in several threads, each its own.
from torch._C._autograd import ProfilerEvent, _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

__all__ = ["held_tensors", "transient_bytes_of"]

# Of memory alone: no shapes, no stacks, no counts of operations, no modules.
MEMORY = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())


def transient_bytes_of(function: Callable[[], object], device: torch.device) -> int:
    """Return the most that the function holds at once of what it allocates itself.

    On the CPU that is what torch allocates in the calling thread and in tasks that the function gives to a
    ``ThreadPoolExecutor`` and waits for.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorder = Recorder()
    give = ThreadPoolExecutor.submit

    def give_recorded(pool: ThreadPoolExecutor, /, *task: Any, **arguments: Any) -> Future[Any]:
        return give(pool, recorder.call, *task, **arguments)

    with patch.object(ThreadPoolExecutor, "submit", give_recorded):
        recorder.call(function)
    return recorder.peak()


class Recorder:
    """Records what calls allocate and free on the CPU, those that run at the same time in several threads too."""

    def __init__(self) -> None:
        self.events: list[ProfilerEvent] = []

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the function, recorded, and return what it returns."""
        _enable_profiler_legacy(MEMORY)
        try:
            return function(*args, **kwargs)
        finally:
            # At once, for other threads do the same.
            self.events.extend(itertools.chain.from_iterable(_disable_profiler_legacy()))

    def peak(self) -> int:
        """Replay the events of all threads in the order of time, and return the most bytes held."""
        origin = self.events[0]
        sizes = [(origin.cpu_elapsed_us(event), event.cpu_memory_usage()) for event in self.events]
        # By time alone: what one thread does within a tick of the clock stays in its order.
        changes = (size for _, size in sorted(sizes, key=itemgetter(0)))
        return max(itertools.accumulate(changes, initial=0))


def held_tensors(value: object) -> Iterator[Tensor]:
    """Find the tensors in an optimizer's state: in containers, in objects of its own and in tensor subclasses."""
    parts: Sequence[object] = ()
    if hasattr(value, "__tensor_flatten__"):
        parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    for part in parts:
        yield from held_tensors(part)
