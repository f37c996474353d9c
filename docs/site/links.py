"""The README is the site's first page, and links work on GitHub, on a package index and on the site alike.

A hook of mkdocs. Pages link to files as they lie in the repository, the README to where GitHub shows them; what lies
outside of ``docs`` is shown by GitHub here too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CODE = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Put the README in the place of an index."""
    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Turn links around: those of the README to ``docs``, and those of other pages that leave it."""
    shown = f"{config.repo_url}/blob/main/"
    if page.file.src_uri == "index.md":
        return markdown.replace(f"{shown}docs/", "")
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        return match[1] if target.startswith("docs/") else f"{shown}{target}"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(turned, part) for part in parts[::2]]
    return "".join(parts)
