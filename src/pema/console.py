"""Console output: progress and notes on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, soft_wrap=True)

UNLIMITED = 1 << 16
"""Maximum width of a table that is not printed on a terminal."""


LINE_SECONDS = 30.0
"""Seconds between lines of progress in a log."""

_listener: Callable[..., None] | None = None
"""What is told of notes and progress instead of printing them; see `redirect`."""


class _Rate(ProgressColumn):
    """A column that shows units per second, on average since the bar was drawn.

    The library's own rate counts the last seconds from one step of the bar to the next; where steps come in bursts, as
    the answers of a batch do, it shows the rate within a burst.
    """

    def render(self, task: Task) -> Text:
        return Text(_rate_text(task), style="dim")


class _Left(ProgressColumn):
    """A column that shows the estimated time left."""

    def render(self, task: Task) -> Text:
        return Text(_left_text(task), style="progress.remaining")


def _rate(task: Task) -> float | None:
    """Return the units per second since the bar was drawn, without those that were done before."""
    steps, elapsed = task.completed - task.fields["before"], task.finished_time or task.elapsed
    return steps / elapsed if steps > 0 and elapsed else None


def _rate_text(task: Task) -> str:
    rate = _rate(task)
    if rate is None:
        return ""
    # A slow rate needs a digit that is not zero.
    return f"{rate:,.0f} {task.fields['unit']}/s" if rate >= 10 else f"{rate:.2g} {task.fields['unit']}/s"


def _left_text(task: Task) -> str:
    rate = _rate(task)
    if rate is None or task.remaining is None:
        return "-:--:--"
    return str(timedelta(seconds=math.ceil(task.remaining / rate)))


def _line(task: Task) -> str:
    """Return the progress in one line, for a log."""
    total = "" if task.total is None else f" of {task.total:,.0f} ({task.percentage:.0f}%)"
    left = "" if task.total is None else f"{_left_text(task)} left"
    amount = f"{task.completed:,.0f}{total} {task.fields['unit']}"
    parts = [amount, _rate_text(task), left, str(task.fields["note"])]
    return f"{task.description}: {', '.join(part for part in parts if part)}"


@contextlib.contextmanager
def progress(description: str, total: float | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and remaining time while the block runs.

    Yields a function `advance(n, note="", earlier=False)` that advances the bar by `n` units and shows `note` after
    it. Units of an `earlier` run do not count for the rate. If stderr is not a terminal, a line is printed every
    `LINE_SECONDS` instead.
    """
    if (tell := _listener) is not None:
        tell("begin", description, total, unit)
        try:
            yield lambda n, note="", *, earlier=False: tell("advance", float(n), note, earlier)
        finally:
            tell("end")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _Left(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    shown = stderr.is_terminal  # which the library finds out anew each time, from the environment
    with Progress(*columns, console=stderr, transient=True, disable=stderr.quiet or not shown) as bars:
        task = bars.add_task(description, total=total, unit=unit, note="", before=0.0)
        printed = [bars.get_time()]

        def advance(n: float, note: str = "", *, earlier: bool = False) -> None:
            before = bars.tasks[0].fields["before"] + (n if earlier else 0.0)
            bars.update(task, advance=n, note=note, before=before)
            if not shown and bars.get_time() - printed[0] >= LINE_SECONDS:
                printed[0] = bars.get_time()
                stderr.print(printable(_line(bars.tasks[0])), markup=False, soft_wrap=True)

        yield advance


@contextlib.contextmanager
def keeping(text: str) -> Iterator[None]:
    """Tell a user who interrupts the block what is kept and how to continue: `text`, without a full stop."""
    try:
        yield
    except Exception:
        raise
    except BaseException as stop:  # KeyboardInterrupt, or a signal in the command line
        stop.add_note(text)
        raise


def redirect(listener: Callable[..., None]) -> None:
    """Print no notes and no progress from here on, but tell `listener` of them, which `pema.relay` describes."""
    global _listener
    _listener = listener


def silence() -> None:
    """Print nothing from here on: another process of this command does."""
    stderr.quiet = stdout.quiet = True


def print_table(table: Table) -> None:
    """Print a table on stdout: folded to the width of a terminal, complete in a file or a pipe."""
    if stdout.is_terminal:
        stdout.print(table)
        return
    widest = Measurement.get(stdout, stdout.options.update(max_width=UNLIMITED), table).maximum
    Console(file=stdout.file, width=widest).print(table)


def note(text: str) -> None:
    """Print a note for the user, which is not a result, to stderr."""
    if _listener is not None:
        _listener("note", text)
        return
    stderr.print(printable(text), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    r"""Escape the control characters of `text` (as `\x1b`), except line breaks and tabs.

    Names and messages may come from untrusted files and servers.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1]
