"""Threads that share out pieces of an update on the CPU, and wait for one another once.

Note [Few joins]. torch shares out every operation on 32,768 elements or more: its threads wait for one another at the
end of each, thousands of times a step. Each wait lasts until the last thread has its turn, so beside other processes,
such as those that load data, a step took 20 times as long. Here each thread runs all operations on a piece by itself,
then those on the next that nobody has begun. What is not worth it goes in pieces that torch does not share out.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeAlias

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import PLAIN_TYPES
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.torch_private import has_dispatch_modes, has_function_modes

__all__ = ["Task", "run_all", "threads_for"]

Task: TypeAlias = Callable[[Scratch], None]
"""Work on what no other task writes to. It gets memory for temporaries that is its thread's."""

# More would wait for memory, and each has temporaries of its own.
MOST_THREADS = 16


def threads_for(lists: Iterable[Sequence[Tensor]]) -> int:
    """How many threads may share out the work on these: as many as torch would take, or 1, the calling one.

    What watches operations, and inference mode, belong to the calling thread, and others would not see them.
    """
    threads = torch.get_num_threads()
    if threads == 1 or has_dispatch_modes() or has_function_modes() or torch.is_inference_mode_enabled():
        return 1
    are_plain = all(
        PLAIN_TYPES.issuperset(map(type, tensors)) and all(tensor.is_cpu for tensor in tensors) for tensors in lists
    )
    return min(threads, MOST_THREADS) if are_plain and _is_thread_local() else 1


def run_all(tasks: Sequence[Task], threads: int) -> None:
    """Run tasks, in any order, without gradient recording.

    Args:
        tasks: what is to run.
        threads: the most that take part; with 1 the calling thread does all, else others.

    Raises:
        BaseException: what a task raised. None runs any more, and those that had not begun do not.
    """
    pending = deque(tasks)
    if threads == 1:
        _work(pending)
        return
    futures = [_pool().submit(_work, pending) for _ in range(min(threads, len(tasks)))]
    try:
        for future in futures:
            future.result()
    finally:  # also where the user interrupts
        pending.clear()
        wait(futures)


def _work(pending: deque[Task]) -> None:
    scratch = Scratch()
    try:
        with torch.no_grad():
            while pending:
                try:
                    task = pending.popleft()
                except IndexError:  # another thread took the last
                    return
                task(scratch)
    except BaseException:
        pending.clear()
        raise


@functools.cache
def _is_thread_local() -> bool:
    """Whether each thread has a number of its own of threads to share operations out to, as with OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="stac_optimizer", initializer=_begin_thread)


def _begin_thread() -> None:
    """Let this thread run operations by itself, and all others as before."""
    with BEGINNING:
        # Asked first: only then has torch set what new threads get, which it would else do at the first operation.
        of_new_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of new ones
        restoring = threading.Thread(target=torch.set_num_threads, args=(of_new_threads,))
        restoring.start()
        restoring.join()


BEGINNING = threading.Lock()


def _forget_threads() -> None:
    """After a fork: the child has none of the threads."""
    global BEGINNING  # noqa: PLW0603 - a thread that is not there may hold it
    BEGINNING = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
