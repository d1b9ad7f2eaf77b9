"""The one way in which pema talks to a person: progress and notes on stderr, results on stdout."""

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
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="dim")


@contextlib.contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar with rate and time left while the block runs.

    Yields a function `advance(n, note="")` that moves the bar by `n` units and shows `note` behind it. Nothing is
    drawn where stderr is not a terminal.
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
    """Tell the person at the terminal something that is not a result."""
    stderr.print(printable(text), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    r"""`text` with `\x1b` and so on in place of what a terminal obeys; line breaks and tabs stay.

    Names and messages come from files and servers of others.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]
