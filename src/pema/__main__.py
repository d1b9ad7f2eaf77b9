"""`python -m pema`: the command line."""

from __future__ import annotations

from pema.cli import main

if __name__ == "__main__":
    main()
