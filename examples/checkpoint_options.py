"""The options about checkpoints of an example that can stop, save and resume."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from command_line import Parser, at_least_one

__all__ = ["add_checkpoint_options", "check_checkpoint_options", "is_due"]


def add_checkpoint_options(parser: Parser, kind: str, path: Callable[[str], Path]) -> None:
    """Give a parser the options; a checkpoint is one of a kind: a file, or a folder."""
    parser.add_argument("--stop-at", type=at_least_one, help="stop after this step of the schedule (default: its end)")
    parser.add_argument("--save", type=path, metavar="PATH", help=f"write a checkpoint to this {kind} at the end")
    parser.add_argument("--save-every", type=at_least_one, metavar="N", help="write it after every N steps too")
    parser.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="PATH",
        help="go on from this checkpoint, under its settings; without PATH from the one of --save, if there is one yet",
    )


def check_checkpoint_options(parser: Parser, options: argparse.Namespace, exists: Callable[[Path], object]) -> None:
    """Refuse what cannot be meant, and leave in ``options.resume`` the checkpoint to continue from, or None."""
    for name, given in (("--save-every", options.save_every), ("--resume without PATH", options.resume is True)):
        if given and options.save is None:
            parser.error(f"{name} needs --save PATH")
    if options.resume is True:
        # So that one command begins the run, and given again after a kill goes on with it.
        options.resume = options.save if exists(options.save) else None


def is_due(options: argparse.Namespace, step: int, stop: int) -> bool:
    """Whether a checkpoint is to be written after this step, beside the one at the end."""
    return options.save_every is not None and step % options.save_every == 0 and step < stop
