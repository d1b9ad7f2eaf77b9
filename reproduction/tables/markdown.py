"""Rows of Markdown tables, and the generated part of a page between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pema.experiments.reader import record
from pema.experiments.records import Signature
from pema.files import writing

BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


def row(cells: Iterable[str]) -> str:
    """Return one row of a table."""
    return "| " + " | ".join(cells) + " |\n"


def head(cells: Iterable[str]) -> str:
    """Return the head of a table."""
    cells = list(cells)
    return row(cells) + row(["---"] * len(cells))


def source(signature: Signature, command: str) -> str:
    """Return a line with the command and the machine of a result."""
    machine = signature.machine
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
    if machine.get("accelerator"):
        where += f", {machine['accelerator']}"
    return f"Made by `{command}` on {where}, torch {signature.versions['torch']}.\n"


def signature_of(result: Mapping[str, Any]) -> Signature:
    """Return the signature of a result that is not a run of a comparison.

    Raises:
        DataError: it has none, or a damaged one.
    """
    return record(Signature, result.get("signature"), f"the result {result.get('run')!r}")


def parts_of(page: Path) -> tuple[str, str, str]:
    """Return the parts of a page before, between and after its markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    current, after = rest.split(END)
    return before, current, after


def replace_block(page: Path, block: str) -> None:
    """Replace the text between the markers of a page by `block`."""
    before, _, after = parts_of(page)
    write(page, (before + BEGIN + block + END + after).encode())


def write(path: Path, content: bytes) -> None:
    """Write a file, atomically."""
    with writing(path) as partial:
        partial.write_bytes(content)
