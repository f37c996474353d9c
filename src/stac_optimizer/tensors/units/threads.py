"""Threads that share out pieces of an update on the CPU, and wait for one another once.

Note [Few joins]. torch shares out every operation on 32,768 elements or more: its threads wait for one another at the
end of each, thousands of times a step. Each wait lasts until the last thread has its turn, so beside other processes,
such as those that load data, a step took 20 times as long. Here each thread runs all operations on a piece by itself,
then those on the next that nobody has begun. What is not worth it goes in pieces that torch does not share out.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from stac_optimizer.tensors.kinds import PLAIN_TYPES
from stac_optimizer.tensors.layouts import overlap
from stac_optimizer.tensors.scratch import Scratch
from stac_optimizer.tensors.torch_private import has_dispatch_modes, has_function_modes
from stac_optimizer.tensors.units import cutting
from stac_optimizer.tensors.units.pieces import is_recorded

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


def threads_for(lists: Sequence[Sequence[Tensor]]) -> int:
    """How many threads may share out the work on these: as many as torch would take, or 1, the calling one.

    What watches operations, and inference mode, belong to the calling thread, and others would not see them. Threads
    take over the cores that the calling one may run on, which OpenMP may have bound to one. Parameters that share
    memory are updated one after the other.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):
        threads = min(threads, len(os.sched_getaffinity(0)))
    if threads == 1 or has_dispatch_modes() or has_function_modes() or torch.is_inference_mode_enabled():
        return 1
    are_plain = all(
        PLAIN_TYPES.issuperset(map(type, tensors)) and all(tensor.is_cpu for tensor in tensors) for tensors in lists
    )
    return threads if are_plain and _is_thread_local() and not overlap(lists[0]) else 1


def run_all(tasks: Sequence[Task], shared: Shares) -> None:
    """Run tasks, in any order, without gradient recording.

    Raises:
        BaseException: what a task raised. None runs any more, and those that had not begun do not.
    """
    # Small ones in turn: threads that are often in Python wait for one another.
    pending = deque(cutting.filled(tasks, [task.numel for task in tasks], shared.numel or 1))
    futures: list[Future[None]] = []
    failed: list[BaseException] = []
    try:
        if shared.threads > 1 and pending:
            THREADS.submit(min(shared.threads, len(pending)), pending, failed, futures)
        if not futures and pending:
            _work(pending, failed)
        wait(futures)
    finally:  # also where the user interrupts
        pending.clear()
        wait(futures)
    if failed:
        error = failed[0]
        failed.clear()
        try:
            raise error
        finally:
            del error  # which holds this frame, and all that it holds


def _work(pending: deque[list[Task]], failed: list[BaseException]) -> None:
    """Run tasks until there are no more. What they raise is noted, for a future would keep it."""
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
    except BaseException as error:
        pending.clear()
        failed.append(error)


@functools.cache
def _is_thread_local() -> bool:
    """Whether each thread has a number of its own of threads to share operations out to, as with OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


class _Threads:
    """The threads, which begin when they are first needed, and are more once more are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._number = 0

    def submit(
        self, threads: int, pending: deque[list[Task]], failed: list[BaseException], futures: list[Future[None]]
    ) -> None:
        """Let so many threads begin to work, in copies of the calling one's context, which holds torch's configuration.

        Args:
            threads: how many.
            pending: what is to be done.
            failed: gets what goes wrong.
            futures: get an entry for each; fewer where no thread can begin, as once the interpreter ends.
        """
        try:
            with self._lock:
                if self._pool is None or self._number < threads:
                    self._begin(max(threads, min(torch.get_num_threads(), MOST_THREADS)))
                pool = self._pool
            assert pool is not None
            for _ in range(threads):
                futures.append(pool.submit(contextvars.copy_context().run, _work, pending, failed))
        except RuntimeError:  # those that have begun do all
            return

    def _begin(self, number: int) -> None:
        """Begin anew, with all at once: meanwhile new threads of others would get the wrong number."""
        before, self._pool = self._pool, None
        if before is not None:
            before.shutdown(wait=False)
        pool = ThreadPoolExecutor(number, thread_name_prefix="stac_optimizer", initializer=_begin_thread)
        meeting = threading.Barrier(number)
        try:
            begun = [pool.submit(meeting.wait) for _ in range(number)]
        except BaseException:
            meeting.abort()
            pool.shutdown(wait=False)
            raise
        wait(begun)
        self._pool, self._number = pool, number


THREADS = _Threads()


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
    """After a fork: the child has none of the threads, and one that is not there may hold a lock."""
    global BEGINNING, THREADS
    BEGINNING, THREADS = threading.Lock(), _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
