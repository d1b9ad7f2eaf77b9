"""Writer of every page, table and plot of committed results: `python -m reproduction`."""

from __future__ import annotations

import argparse

from reproduction import pages, studies


def main() -> None:
    """Write all pages."""
    argparse.ArgumentParser(prog="python -m reproduction", description=__doc__).parse_args()
    studies.write_pages()
    pages.write_pages()


if __name__ == "__main__":
    main()
