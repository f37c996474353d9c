"""What the examples' command lines check alike, so that a slip ends in one clear line: whole numbers and devices."""

from __future__ import annotations

import argparse

import torch

__all__ = ["at_least_one", "usable_device"]


def at_least_one(text: str) -> int:
    """Read a whole number of 1 or more; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def usable_device(text: str) -> str:
    """Check that torch can put a tensor on a device; for the ``type`` of an option.

    Raises:
        ArgumentTypeError: it cannot, as with a device that this build of torch or this machine has not.
    """
    try:
        torch.empty(1, device=text)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"torch cannot use the device {text!r} here: {reason}") from error
    return text
