"""What the site is built of beside docs: the README is its home, and the API reference lists the names of pema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import pema

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")

API = """# API

What `import pema` gives. Shapes, units, errors and sources stand with each name; [architecture](architecture.md)
describes the rooms behind it.
"""


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401
    """Add the home page and the API reference."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=links(readme, ROOT)))
    names = [f"\n::: {getattr(pema, name).__module__}.{name}\n" for name in sorted(pema.__all__) if name[0] != "_"]
    files.append(File.generated(config, "api.md", content=API + "".join(names)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Name files outside docs, which are no pages."""
    return links(markdown, (ROOT / "docs" / page.file.src_uri).parent) if page.file.abs_src_path else markdown


def links(markdown: str, folder: Path) -> str:
    """Links as seen from docs; a file outside docs is named instead."""

    def seen(match: re.Match[str]) -> str:
        text, target, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        if folder != ROOT and target.is_relative_to(ROOT / "docs"):
            return match[0]
        if target.is_relative_to(ROOT / "docs"):
            return f"[{text}]({target.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        return f"{text} (`{target.relative_to(ROOT).as_posix()}`)"

    return LINK.sub(seen, markdown)
