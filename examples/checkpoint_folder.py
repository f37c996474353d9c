"""A checkpoint that several ranks write together, by ``torch.distributed.checkpoint``, and that no kill can lose.

That library writes into its files in place. So a new checkpoint is written into ``partial``, beside the old one in
``checkpoint``, and takes its place when it is whole. Only these folders, and ``old``, are touched inside the given one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoint_file import sync_folder

__all__ = ["folder_to_load", "load_folder", "save_folder"]


def save_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write, all ranks together; whenever they die, ``folder_to_load`` finds a whole checkpoint if there was one."""
    if dist.get_rank() == 0:
        make_partial(path)
    dist.barrier()
    save(checkpoint, checkpoint_id=path / "partial")
    if dist.get_rank() == 0:
        put_in_place(path)
    dist.barrier()


def make_partial(path: Path) -> None:
    """Make an empty ``partial``."""
    shutil.rmtree(path / "partial", ignore_errors=True)  # what a killed save has left
    (path / "partial").mkdir(parents=True)


def put_in_place(path: Path) -> None:
    """Let ``partial``, which is whole, become ``checkpoint``; the process may die between any two lines."""
    partial, checkpoint, old = (path / name for name in ("partial", "checkpoint", "old"))
    sync_folder(partial)
    if checkpoint.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(checkpoint, old)
    os.replace(partial, checkpoint)
    sync_folder(path)
    shutil.rmtree(old, ignore_errors=True)


def folder_to_load(path: Path) -> Path | None:
    """Return the folder with the newest whole checkpoint of ``path``, or None. Between two moves it is ``old``."""
    return next((path / name for name in ("checkpoint", "old") if (path / name / ".metadata").exists()), None)


def load_folder(state: dict[str, Any], folder: Path) -> None:
    """Fill, all ranks together, a state dict.

    Raises:
        ValueError: the checkpoint is damaged or comes from another program.
    """
    try:
        FileSystemReader(folder).read_metadata()  # what is wrong with it, load would log with a traceback
        load(state, checkpoint_id=folder)
    except (CheckpointException, Exception) as error:  # the first is no Exception
        raise ValueError(f"{folder} is damaged or no checkpoint of this example: {type(error).__name__}") from error
