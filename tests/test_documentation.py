"""The examples of README, pages and docstrings run, links lead somewhere, and the tables say what the code does."""

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
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKING = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"))]
MODULES = ["stac_optimizer", *(m.name for m in pkgutil.walk_packages(stac_optimizer.__path__, "stac_optimizer."))]
LAST_LINE = 260
SHOWN = "https://github.com/smturtle2/stac-optimizer/blob/main/"  # where the README, which an index shows too, links to


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    """What is linked to, in the line or by a definition of its own."""
    return re.findall(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", text, flags=re.MULTILINE)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(name: str, text: str) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for code in blocks("python", text):
        exec(compile(code, name, "exec"), namespace)


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")], ids=named)
def test_python_of_a_page_runs_from_top_to_bottom(path: Path) -> None:
    run(path.name, path.read_text(encoding="utf-8"))


def test_printed_partition_is_the_one_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("overrides-and-selectors.md")
    run("overrides-and-selectors.md", text)
    (shown,) = blocks("text", text)
    assert capsys.readouterr().out == shown


def test_documented_way_back_goes_on_as_adamw() -> None:
    """The cap goes on to the bit, the trunk begins anew. All of the state dict, which AdamW takes, bears no step."""
    (code,) = (code for code in blocks("python", page("checkpoints.md")) if "# and back" in code)
    model, optimizer = stepped(weight_decay=1e-2, cap_lr=1e-3)
    namespace: dict[str, Any] = {"torch": torch, "copy": copy, "model": copy.deepcopy(model), "optimizer": None}
    namespace["optimizer"] = STAC(namespace["model"], weight_decay=1e-2, cap_lr=1e-3)
    namespace["optimizer"].load_state_dict(optimizer.state_dict())
    exec(compile(code[code.rindex("adamw = ") :], "checkpoints.md", "exec"), namespace)
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


def test_readme_is_short_and_whole() -> None:
    assert len(README.splitlines()) <= LAST_LINE
    assert "@@" not in README


def test_links_of_the_readme_lead_somewhere_from_a_package_index() -> None:
    assert [link for link in links(README) if not link.startswith("https://")] == []
    defined, used = re.findall(r"^\[([^\]]+)\]: ", README, flags=re.MULTILINE), re.findall(r"\]\[([^\]]+)\]", README)
    assert set(defined) == set(used)


def test_shell_commands_use_the_constraints() -> None:
    commands = [command for command in blocks("bash", README) if "venv" in command]
    assert len(commands) == 2
    for command in commands:
        assert "-c constraints.txt" in command
        assert len(command.splitlines()) == 1


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub and the site name them in addresses."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKING, ids=named)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for link in links(text.replace(SHOWN, "")):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_readme_lists_every_argument() -> None:
    arguments = list(inspect.signature(STAC).parameters)[1:]
    table = README[README.index("## Arguments") : README.index("## Traps")]
    assert [name for name in arguments if f"`{name}`" not in table] == []


def test_pages_speak_of_every_public_name() -> None:
    guides = "\n".join(path.read_text(encoding="utf-8") for path in PAGES if path.parent != DOCS / "reference")
    names = set(stac_optimizer.__all__) - {"STACLayer", "__version__"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b\W", guides)] == []


def test_table_of_classes_has_every_class() -> None:
    classes = page("optimizers.md").partition("## The classes")[2]
    assert [name for name in stac_optimizer.optim.__all__ if f"\n| `{name}` |" not in classes] == []


def test_reference_has_every_public_name() -> None:
    """By itself, or as one of a module's; whether each has a docstring the site's strict build asks."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    shown = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    for path in filter(MODULES.__contains__, tuple(shown)):
        shown += [f"{path}.{name}" for name in importlib.import_module(path).__all__]
    objects = [pkgutil.resolve_name(path) for path in shown]
    public = {name: getattr(stac_optimizer, name) for name in stac_optimizer.__all__ if name != "__version__"}
    assert [name for name, each in public.items() if not any(each is other for other in objects)] == []


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
