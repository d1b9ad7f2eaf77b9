"""Rows of Markdown tables, and the part of a page that is made between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pema.experiments.reader import record
from pema.experiments.records import Signature
from pema.files import writing

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


def row(cells: Iterable[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |\n"


def head(cells: Iterable[str]) -> str:
    """The head of a table."""
    cells = list(cells)
    return row(cells) + row(["---"] * len(cells))


def source(signature: Signature, command: str) -> str:
    """Which command made a result, on which machine."""
    machine = signature.machine
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
    return f"Made by `{command}` on {where}, torch {signature.versions['torch']}.\n"


def signature_of(result: Mapping[str, Any]) -> Signature:
    """The signature of a result that is no run of a comparison.

    Raises:
        DataError: it has none, or a damaged one.
    """
    return record(Signature, result.get("signature"), f"the result {result.get('run')!r}")


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
