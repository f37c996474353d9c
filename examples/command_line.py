"""What the examples' command lines check alike, so that a slip ends in one clear line before anything is trained."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

__all__ = [
    "Parser",
    "at_least_one",
    "at_least_two",
    "check_torchrun",
    "not_negative",
    "output_file",
    "output_folder",
    "positive",
    "seed",
    "thread_count",
    "usable_device",
    "whole_number",
]

LEAVE_TO_FIRST_RANK = 10.0  # seconds


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, also under torchrun, where every rank has one to say."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and the message.

        Under torchrun every rank gets here. The first hands its message to torchrun, which prints it at the end of its
        report and ends the others; so these wait, and speak only where they fail alone.
        """
        text = f"{self.prog}: error: {message}"
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(LEAVE_TO_FIRST_RANK)
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file is None:
            sys.stderr.write(f"{text}\n")
        else:
            report = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": report}), encoding="utf-8")
        raise SystemExit(2)


def check_torchrun(parser: Parser) -> None:
    """Refuse to go on where torchrun has not started this process."""
    if "RANK" not in os.environ:
        parser.error("it runs on several processes: start it with torchrun --standalone --nproc-per-node 2")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a function for the ``type`` of an option that reads a whole number of a range."""
    allowed = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, got {text!r}")
        return number

    return read


at_least_one = whole_number(1)
at_least_two = whole_number(2)
not_negative = whole_number(0)
thread_count = whole_number(1, 1024)
seed = whole_number(0, 2**32 - 1)


def positive(text: str) -> float:
    """Read a finite number above 0; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def usable_device(text: str) -> str:
    """Check that torch can put a tensor on a device and read it back; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it cannot, as with a device that this build of torch or this machine has not.
    """
    try:
        torch.zeros(1, device=text).item()
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"torch cannot use the device {text!r} here: {reason}") from error
    return text


def output_file(text: str) -> Path:
    """Check that a file can be written, in a folder that need not exist yet; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it cannot.
    """
    path = output_folder(str(Path(text).parent)) / Path(text).name
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"must name a file, but {text!r} is none")
    return path


def output_folder(text: str) -> Path:
    """Check that a folder, which need not exist yet, can be written to; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it cannot.
    """
    path = Path(text)
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r}: {str(nearest)!r} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r}: no permission in {str(nearest)!r}")
    return path
