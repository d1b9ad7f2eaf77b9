"""Rows of Markdown tables, and the part of a page that is made between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pema.files import writing

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


def row(cells: Iterable[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |\n"


def head(cells: Iterable[str]) -> str:
    """The head of a table."""
    cells = list(cells)
    return row(cells) + row(["---"] * len(cells))


def source(result: Mapping[str, Any], command: str) -> str:
    """Which command made a result, on which machine."""
    signature = result["signature"]
    machine = signature["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
    return f"Made by `{command}` on {where}, torch {signature['versions']['torch']}.\n"


def digits_of(name: str) -> int:
    """Digits behind the point of a metric's scores: it goes to 1, or to 100."""
    return 2 if name in ("formality_accuracy", "accuracy") else 1


def score_text(name: str, value: float) -> str:
    """A score with the digits that its scale asks for."""
    return f"{value:.{digits_of(name)}f}"


def parts_of(page: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    current, after = rest.split(END)
    return before, current, after


def replace_block(page: Path, block: str) -> None:
    """Write a page anew with `block` between its markers."""
    before, _, after = parts_of(page)
    write(page, (before + BEGIN + block + END + after).encode())


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with writing(path) as partial:
        partial.write_bytes(content)
