"""The programs on the pages of docs/, run as a reader would: again and again in one folder, and killed on the way."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from stac_optimizer import STAC

__all__ = ["Run", "block", "continued", "named_state", "own_warnings", "run"]

DOCS = Path(__file__).parents[2] / "docs"


class Killed(BaseException):
    """In the place of a signal: no handler of a trainer catches it, and nothing is saved on the way out."""


class Run(NamedTuple):
    """What a program left.

    Args:
        names: its variables.
        optimizer: the STAC that it stepped.
        steps: how often.
    """

    names: dict[str, Any]
    optimizer: STAC
    steps: int

    @property
    def model(self) -> nn.Module:
        """What it called so."""
        model: nn.Module = self.names["model"]
        return model


def block(name: str, page: str = "frameworks") -> str:
    """The program under ``<!-- name: ... -->``."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"^<!-- {name}: [^\n]* -->\n```py\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return str(code)


def run(
    name: str, folder: Path, *, kill_after: int = 0, change: Mapping[str, str] | None = None, page: str = "frameworks"
) -> Run:
    """Run a program of a page in a folder, from whatever it left there.

    Args:
        name: of the block.
        folder: made where it is missing.
        kill_after: of which step of STAC the program dies; 0: it does not.
        change: what to write in the place of what stands there, each of which must be there once.
        page: without its ending.
    """
    code = block(name, page)
    for old, new in (change or {}).items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    stepped: list[STAC] = []

    def count(optimizer: Optimizer, *_: Any) -> None:
        if isinstance(optimizer, STAC):
            stepped.append(optimizer)
            if len(stepped) == kill_after:
                raise Killed

    names: dict[str, Any] = {"__name__": "program"}
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    handle = register_optimizer_step_post_hook(count)
    try:
        os.chdir(folder)
        exec(compile(code, f"{page}.md: {name}", "exec"), names)
    except Killed:
        pass
    finally:
        os.chdir(before)
        handle.remove()
    return Run(names, stepped[-1], len(stepped))


def continued(name: str, folder: Path, kill_after: int, change: Mapping[str, str] | None = None) -> tuple[Run, Run]:
    """A program that ran to its end, and one that was killed and started again."""
    whole = run(name, folder / "whole", change=change)
    killed = run(name, folder / "killed", kill_after=kill_after, change=change)
    again = run(name, folder / "killed", change=change)
    assert killed.steps == kill_after < whole.steps
    assert 0 < again.steps < whole.steps
    return whole, again


def named_state(optimizer: STAC) -> dict[str, dict[str, torch.Tensor]]:
    """The state by names of parameters, and the learning rates by names of groups."""
    groups = optimizer.param_groups
    state = {
        name: dict(optimizer.state[param])
        for group in groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    return {**state, "lr": {group["name"]: torch.as_tensor(group["lr"]) for group in groups}}


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """What this package warns of meanwhile, in place of warnings."""
    messages: list[str] = []

    class Recorder:
        @staticmethod
        def warn(message: str, *_: Any, **__: Any) -> None:
            messages.append(message)

    with mock.patch("stac_optimizer.validation.warnings", Recorder):
        yield messages
