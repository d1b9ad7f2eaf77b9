"""The command line: one file a verb. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done, 1 failure (one line on stderr), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the `pema` command."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]

    from pema.cli.app import app
    from pema.console import printable, stderr
    from pema.errors import ConfigError, PemaError

    try:
        app(args=arguments, prog_name="pema")
    except KeyboardInterrupt:
        stderr.print("pema: interrupted; run the same command again to go on.", markup=False)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PemaError):
            stderr.print(printable(f"pema: {error}"), markup=False, soft_wrap=True)
        else:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            stderr.print(printable(f"pema: unexpected {line} (--debug shows where)"), markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
