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
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.tensors import cutting
from stac_optimizer.tensors.kinds import PLAIN_TYPES
from stac_optimizer.tensors.pieces import is_recorded
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.torch_private import has_dispatch_modes, has_function_modes

__all__ = ["Shares", "Task", "run_all", "shares", "threads_for"]

# More would wait for memory, and each has temporaries of its own.
MOST_THREADS = 16
# So many elements for each thread are worth to wake it; torch runs operations on less than 32,768 in the calling one.
SHARED_NUMEL, SERIAL_NUMEL = 256 * 1024, 31 * 1024
# The least of a block that is shared out: for less, Python, which runs one thread at a time, is the limit.
LEAST_NUMEL = 64 * 1024
# The most of all threads' blocks together: their temporaries take 16 MiB in float32, under a mask twice that.
TOGETHER_NUMEL = 4 * 1024 * 1024


class Task(NamedTuple):
    """Work on what no other task writes to.

    Args:
        run: is given memory for temporaries that is its thread's.
        numel: about how many elements it works on.
    """

    run: Callable[[Scratch], None]
    numel: int


class Shares(NamedTuple):
    """How an update is shared out.

    Args:
        threads: how many take part; with 1 the calling one does all, else others.
        numel: the most elements of a block; None for those of the device.
    """

    threads: int
    numel: int | None


def shares(lists: Sequence[Sequence[Tensor]], *, least: int | None = None, most: int | None = None) -> Shares:
    """Say how an update is shared out.

    Args:
        lists: parameters, gradients and state.
        least: the least elements of a block that is shared out, by default where Python takes as long as the work.
        most: the most of any block, by default those of the device.
    """
    if is_recorded() or torch.get_num_threads() == 1:
        return Shares(1, most)
    params = lists[0]
    total = sum([param.numel() for param in params])
    if total < 2 * SHARED_NUMEL:  # asked first, for there may be thousands of small ones
        is_serial = all(param.is_cpu for param in params)
        return Shares(1, min(most or cutting.BLOCK_NUMEL, SERIAL_NUMEL) if is_serial else most)
    threads = min(threads_for(lists), total // SHARED_NUMEL)
    if threads == 1:
        return Shares(1, most)
    most = most or min(cutting.BLOCK_NUMEL, TOGETHER_NUMEL // threads)
    # Some blocks for each, so that all end at about the same time.
    return Shares(threads, min(most, max(least or LEAST_NUMEL, total // (4 * threads))))


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


def run_all(tasks: Sequence[Task], shared: Shares) -> None:
    """Run tasks, in any order, without gradient recording.

    Raises:
        BaseException: what a task raised. None runs any more, and those that had not begun do not.
    """
    # Small ones in turn: threads that are often in Python wait for one another.
    dealt = cutting.filled(tasks, [task.numel for task in tasks], shared.numel or 1)
    pending = deque(dealt)
    if shared.threads == 1:
        _work(pending)
        return
    pool = _pool(shared.threads)
    futures = [pool.submit(_work, pending) for _ in range(min(shared.threads, len(pending)))]
    try:
        for future in futures:
            future.result()
    finally:  # also where the user interrupts
        pending.clear()
        wait(futures)


def _work(pending: deque[list[Task]]) -> None:
    scratch = Scratch()
    try:
        with torch.no_grad():
            while pending:
                try:
                    tasks = pending.popleft()
                except IndexError:  # another thread took the last
                    return
                for task in tasks:
                    task.run(scratch)
    except BaseException:
        pending.clear()
        raise


@functools.cache
def _is_thread_local() -> bool:
    """Whether each thread has a number of its own of threads to share operations out to, as with OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, all of which have begun: meanwhile new ones of others would get the wrong number."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="stac_optimizer", initializer=_begin_thread)
    meeting = threading.Barrier(threads)
    wait([pool.submit(meeting.wait) for _ in range(threads)])
    return pool


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
