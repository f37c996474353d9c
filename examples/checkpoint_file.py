"""A checkpoint in one file that no kill can lose: a new one is written beside it, then takes its place in one move."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint", "sync_folder"]


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; whenever the process dies, ``path`` holds the whole of the old one or of the new one."""
    path = path.resolve()  # beside the file that a link names, for the move would replace the link
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that the next save overwrites what a killed one has left.
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_checkpoint(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read a checkpoint of an example that writes these keys.

    Raises:
        ValueError: there is none, or what is there is damaged or comes from another program.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as error:  # bytes that are no checkpoint may fail in any way
        raise ValueError(f"{path} is damaged or no checkpoint: torch.load raised {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != set(keys):
        raise ValueError(f"{path} is no checkpoint of this example")
    return checkpoint


def sync_folder(folder: Path) -> None:
    """Let moves in a folder outlast a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
