"""Docstrings are written as torch writes them, Google style with roles, math and tables of RST; pages are Markdown.

A griffe extension: it translates what the docstrings of this package use. Math becomes MathML, which browsers set by
themselves, so that pages need no script. What a strict build must not pass in silence is a warning.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

warn = logging.getLogger("mkdocs.docstrings").warning

# Modules whose exports a user may meet; the reference shows them.
PUBLIC = re.compile(r"stac_optimizer(\.(model\.selectors|optim|recipes|rule|wrappers))?")

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`([\w.]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
MATH = re.compile(r"^\.\. math::\n((?: +.*\n?|\n(?= ))+)", flags=re.MULTILINE)
BORDER = r"=+(?: +=+)+"
TABLE = re.compile(rf"^({BORDER})\n(.*)\n{BORDER}\n((?:.*\n)+?){BORDER}$", flags=re.MULTILINE)


class FromRST(griffe.Extension):
    """Rewrites every docstring before it is parsed, and asks for one where a public name has none."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every object once all are there, so that names can be resolved."""
        if obj.docstring is not None:
            obj.docstring.value = _markdown(obj.docstring.value, obj)
        for name in obj.exports or () if PUBLIC.fullmatch(obj.path) else ():
            try:
                has_docstring = obj.members[str(name)].has_docstring
            except (KeyError, griffe.AliasResolutionError):
                has_docstring = False
            if not has_docstring:
                warn("%s.%s is public and has no docstring", obj.path, name)


def _markdown(text: str, obj: griffe.Object) -> str:
    def reference(match: re.Match[str]) -> str:
        name, owner = match[1], obj if obj.is_class else obj.parent
        try:
            members = owner.all_members if owner is not None and owner.is_class else {}  # inherited ones too
            path = members[name].canonical_path if name in members else obj.resolve(name)
        except griffe.NameResolutionError:
            path = name
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    def inline(text: str) -> str:
        # The span, for Markdown takes what begins with <math> for a block.
        text = INLINE_MATH.sub(lambda match: f"<span>{_mathml(match[1], 'inline')}</span>", text)
        return ROLE.sub(reference, text)

    def table(match: re.Match[str]) -> str:
        starts = [column.start() for column in re.finditer("=+", match[1])]
        rows: list[list[str]] = []
        for line in (match[2], *match[3].splitlines()):
            ends = [*(start - 1 for start in starts[1:]), len(line)]
            cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
            if cells[0]:
                rows.append(cells)
            else:  # the row before goes on
                rows[-1] = [f"{before} {cell}".strip() for before, cell in zip(rows[-1], cells, strict=True)]
        rows.insert(1, ["---"] * len(starts))
        return "\n".join("| " + " | ".join(inline(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)

    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the name by which griffe knows doctests
    text = MATH.sub(lambda match: f'<div class="math">{_mathml(_rows(match[1]), "block")}</div>\n\n', text)
    return inline(TABLE.sub(table, text))


def _rows(tex: str) -> str:
    r"""An equation of several lines, aligned where it says so. Lines that end in ``\quad`` stand by themselves."""
    tex = re.sub(r"\\quad *\n", r"\\\\\n", tex)
    if r"\\" in tex and "&" not in tex:
        tex = "& " + tex.replace(r"\\", r"\\ & ")
    return rf"\begin{{align*}}{tex}\end{{align*}}" if "&" in tex else tex


def _mathml(tex: str, display: str) -> str:
    for command, sign in (r"\_", "_"), (r"\langle", "⟨"), (r"\rangle", "⟩"):  # which the converter does not know
        tex = tex.replace(command, sign)
    mathml = convert(tex.strip(), display=display)
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        warn("MathML has no word for part of %s", tex.strip())
    return mathml.replace("_", "&#95;").replace("*", "&#42;")  # which Markdown would read
