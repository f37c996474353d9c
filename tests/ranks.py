"""Real processes: a function runs on several ranks of a gloo group over loopback, and fails as a whole.

A fork server imports torch once, so a group of four starts in a fraction of a second, and each test gets fresh ones.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["run_ranks"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks_imports"])
LEAVE_TIMEOUT = 10.0  # seconds that a rank gets to end once it has reported


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``function(*arguments)`` on every rank of a process group.

    Args:
        function: of a module's top level, like all that it is given and returns.
        world_size: how many processes.
        arguments: for the function, the same on every rank.
        timeout: seconds for all of it; collectives get half of them, so that they end first.

    Returns:
        What it returned, by rank.

    Raises:
        AssertionError: with the traceback of every rank that raised, died, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        receivers: list[Connection] = []
        processes = []
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            group: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=timeout / 2)}
            group["init_method"] = f"file://{folder}/store"
            process = CONTEXT.Process(target=_work, args=(function, arguments, group, sender), daemon=True)
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            outcomes = _collect(receivers, timeout)
            for process, receiver in zip(processes, receivers, strict=True):
                if receiver.closed:
                    # A rank that is killed while it writes its coverage leaves half a file.
                    process.join(LEAVE_TIMEOUT)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
    assert not failures, "\n".join([f"{len(failures)} of {world_size} ranks failed", *failures])
    return [value for value, _ in outcomes]


def _collect(receivers: list[Connection], timeout: float) -> list[tuple[Any, str | None]]:
    """For each rank its value and error; waits for all of them, also after the first error."""
    deadline = time.monotonic() + timeout
    outcomes: list[tuple[Any, str | None]] = [(None, f"not done after {timeout:g} s")] * len(receivers)
    pending = {id(receiver): rank for rank, receiver in enumerate(receivers)}
    while pending and time.monotonic() < deadline:
        waiting = [receiver for receiver in receivers if id(receiver) in pending]
        for ready in wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(ready, Connection)
            rank = pending.pop(id(ready))
            try:
                outcomes[rank] = pickle.loads(ready.recv_bytes())
            except EOFError:
                outcomes[rank] = (None, "died without a word")
            ready.close()
    return outcomes


def _work(function: Callable[..., Any], arguments: tuple[Any, ...], group: dict[str, Any], sender: Connection) -> None:
    """One rank's life."""
    import torch  # noqa: PLC0415 - imported by the fork server before
    import torch.distributed as dist  # noqa: PLC0415

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`torch\.jit.*` is deprecated", DeprecationWarning)  # torch's own
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    outcome: tuple[Any, str | None]
    try:
        dist.init_process_group("gloo", **group)
        outcome = (function(*arguments), None)
        dist.barrier()
    except BaseException:
        outcome = (None, traceback.format_exc())
    # By value: a connection's own pickling would share the memory of tensors with a process that ends now.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
