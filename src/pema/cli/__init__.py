"""The command line: one file per verb. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done, 1 failure (one line on stderr), 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM; typer would turn a KeyboardInterrupt into an exit without a message."""


def main() -> None:
    """Run the `pema` command."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with _interruptible():
        _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> None:
    from pema.console import printable, stderr
    from pema.errors import ConfigError, PemaError
    from pema.processes import is_first_to_fail

    try:
        from pema.cli.app import app

        app(args=arguments, prog_name="pema")
    except Interrupted as stop:
        number: int = stop.args[0]
        kept = "; ".join(getattr(stop, "__notes__", ["nothing is left half written"]))
        what = "interrupted" if number == signal.SIGINT else "terminated"
        stderr.quiet = not is_first_to_fail()
        stderr.print(printable(f"pema: {what}; {kept}."), markup=False, soft_wrap=True)
        sys.exit(128 + number)
    except Exception as error:
        if debug:
            raise
        stderr.quiet = not is_first_to_fail()
        if isinstance(error, PemaError):
            stderr.print(printable(f"pema: {error}"), markup=False, soft_wrap=True)
        else:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"unexpected {line} (--debug shows where)"
            if "torch" in sys.modules and _lacks_memory(error):
                text = f"there is not enough memory: use a smaller batch (--batch-size, --batch-tokens). {line}"
            stderr.print(printable(f"pema: {text}"), markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _lacks_memory(error: Exception) -> bool:
    from pema.devices import lacks_memory

    return lacks_memory(error)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM inside the block, so that everything is put away before the exit."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
