"""The README's and the docstrings' examples run, and the tables say what the code does."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import stac_optimizer
from stac_optimizer import STAC
from tests.runs import stepped
from tests.support import assert_same_bits, set_gradients

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
MODULES = ["stac_optimizer", *(m.name for m in pkgutil.walk_packages(stac_optimizer.__path__, "stac_optimizer."))]


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, the README's or another page's."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_python_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    (shown,) = (block.splitlines() for block in blocks("text") if block.startswith("layer "))
    assert printed[: len(shown)] == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for code in blocks("python", page.read_text(encoding="utf-8")):
        exec(compile(code, page.name, "exec"), namespace)


def test_readme_way_back_goes_on_as_adamw() -> None:
    """The cap goes on to the bit, the trunk begins anew. All of the state dict, which AdamW takes, bears no step."""
    (code,) = (code for code in blocks("python") if "# and back" in code)
    model, optimizer = stepped(weight_decay=1e-2, cap_lr=1e-3)
    namespace: dict[str, Any] = {"torch": torch, "copy": copy, "model": copy.deepcopy(model), "optimizer": None}
    namespace["optimizer"] = STAC(namespace["model"], weight_decay=1e-2, cap_lr=1e-3)
    namespace["optimizer"].load_state_dict(optimizer.state_dict())
    exec(compile(code[code.rindex("adamw = ") :], "README.md", "exec"), namespace)
    runs = (model, optimizer), (namespace["model"], namespace["adamw"])
    for seed in range(3):
        for each, stepping in runs:
            set_gradients(each, seed)
            stepping.step()
    names = {name for name, _ in model.named_parameters() if name.startswith("3.")}
    assert {id(model.get_parameter(name)) for name in names} == set(map(id, optimizer.partition.cap_parameters))
    for name in names:
        assert_same_bits(namespace["model"].get_parameter(name), model.get_parameter(name))

    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    adamw = torch.optim.AdamW(groups)
    adamw.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg_sq"):
        adamw.step()


def test_readme_has_no_placeholder() -> None:
    assert "@@" not in README


def test_readme_shell_commands_use_the_constraints() -> None:
    commands = [command for command in blocks("bash") if "venv" in command]
    assert len(commands) == 2
    for command in commands:
        assert "-c constraints.txt" in command
        assert len(command.splitlines()) == 1


def test_readme_lists_every_argument_and_public_name() -> None:
    arguments = list(inspect.signature(STAC).parameters)[1:]
    table = README[README.index("## Arguments") : README.index("## Tuning")]
    assert [name for name in arguments if f"`{name}`" not in table] == []
    assert [
        name
        for name in stac_optimizer.__all__
        if not re.search(rf"\b{name}\b\W", README) and name not in ("STACLayer", "__version__")
    ] == []


def test_every_argument_is_documented() -> None:
    documentation = inspect.getdoc(STAC) or ""
    assert [name for name in inspect.signature(STAC).parameters if f"\n    {name}:" not in documentation] == []


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_optimizer_and_the_partition_have_an_example() -> None:
    for documented in (STAC, STAC.release_gradients, stac_optimizer.partition_trainable_layers):
        assert ">>>" in (inspect.getdoc(documented) or "")
