"""Console output: progress and notes on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """A column that shows units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="dim")


@contextlib.contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and remaining time while the block runs.

    Yields a function `advance(n, note="")` that advances the bar by `n` units and shows `note` after it. Nothing is
    drawn if stderr is not a terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task(description, total=total, unit=unit, note="")

        def advance(n: float, note: str = "") -> None:
            bars.update(task, advance=n, note=note)

        yield advance


def note(text: str) -> None:
    """Print a note for the user, which is not a result, to stderr."""
    stderr.print(printable(text), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    r"""Escape the control characters of `text` (as `\x1b`), except line breaks and tabs.

    Names and messages may come from untrusted files and servers.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1]
