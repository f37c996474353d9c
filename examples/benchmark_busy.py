"""Processes that spin, to keep the cores as busy as workers that load data do. No measuring here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["spinning"]

# Each ends once its standard input does, which the system sees to however this process ends, also where it is killed.
# An interrupt at the terminal, which all get, is left to this process.
SPIN = """
import os, signal, sys, threading

def end_with_parent():
    sys.stdin.read()
    os._exit(0)

signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=end_with_parent).start()
print("spinning", flush=True)
while True:
    pass
"""


@contextmanager
def spinning(number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Let so many processes spin meanwhile; all do once the body begins, none does any more when this returns.

    They stay in this process's session: some systems share out time by sessions, and workers stay there too.
    """
    command = [sys.executable, "-I", "-S", "-c", SPIN]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(number)
        ]
        for process in processes:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("a process that was to spin ended at once")
        yield processes
