"""Command line of the benchmarks: `python -m reproduction.benchmarks`.

Each benchmark writes one line of the results file, which replaces its previous line with the same PLM and corpus.
With `--corpus none` the sentences are synthetic. With `--device cuda` building, training and generation are measured
there, at the shapes of large PLMs with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pema.files import read_json
from reproduction.benchmarks.options import ON_ACCELERATOR, Options
from reproduction.benchmarks.process import NAMES, ON_DEVICE
from reproduction.child import run_module
from reproduction.lines import put_run
from reproduction.tables.benchmarks import FILE

CONSOLE = Console(highlight=False)
WIDTH = 170
"""Width of the tables if the output is not a terminal."""


def child(what: str, options: Options, folder: Path, **more: str) -> dict[str, Any]:
    """Run `reproduction.benchmarks.process` and read its result."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    given = ["--options", json.dumps(options.to_dict()), "--folder", str(folder), "--out", str(out)]
    given += [text for name, value in more.items() for text in (f"--{name}", value)]
    run_module("reproduction.benchmarks.process", [what, *given], options.threads)
    return read_json(out)


def name_of(result: Mapping[str, Any]) -> str:
    """Return the name of the run in the results: the benchmark, with PLM, corpus and device if they are not usual."""
    config, usual = result["signature"]["config"], Options().to_dict()
    named = ("plm", "corpus", "device")
    return ", ".join([result["benchmark"], *(config[name] for name in named if config[name] != usual[name])])


def table_of(results: list[dict[str, Any]]) -> Table:
    """Build a table with one line per comparison."""
    table = Table(title="Benchmarks")
    for title in ("", "what", "measured", "against", "ratio", "aim", ""):
        table.add_column(title, justify="right" if title in ("measured", "ratio", "aim") else "left")
    for result in results:
        for line in result["summary"]:
            verdict = {True: "met", False: "missed", None: ""}[line["met"]]
            measured = f"{line['value']:,.4g} {line['unit']}"
            cells = (line["what"], measured, line["against"], f"{line['ratio']:.4g}", line["aim"], verdict)
            table.add_row(result["benchmark"], *cells)
        table.add_section()
    return table


def memory_table_of(results: list[dict[str, Any]]) -> Table:
    """Build a table with one line per process."""
    table = Table(title="Peak memory above that of importing")
    for title in ("", "part", "MB"):
        table.add_column(title, justify="right" if title == "MB" else "left")
    for result in results:
        for part, size in result["peak_memory"]["parts_bytes"].items():
            table.add_row(result["benchmark"], part, f"{size / 1e6:,.0f}")
    return table


def main() -> None:
    """Run the requested benchmarks, and write and print the results."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.benchmarks", description=__doc__)
    parser.add_argument("--plm", help="the PLM: embedded, a folder, or opt-1.3b (random weights)")
    parser.add_argument("--corpus", help="TSV of source and target, demo, restaurants, or none")
    parser.add_argument("--device", default=Options.device, help="device of PLM and training")
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="results file; other results in it are kept")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="run only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    parser.add_argument("--repeats", type=int, help="timed rounds")
    parser.add_argument("--examples", type=int, help="maximum number of examples")
    parser.add_argument("--sgd-seconds", type=float, help="maximum time of a gradient descent")
    parser.add_argument("--options", default="{}", help="JSON of further fields of benchmarks.options.Options")
    given = parser.parse_args()
    names = ("plm", "corpus", "device", "threads", "repeats", "examples", "sgd_seconds")
    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    for name in ("plm", "corpus"):
        if name in chosen and Path(chosen[name]).exists():
            chosen[name] = str(Path(chosen[name]).resolve())
    usual = Options() if given.device == "cpu" else ON_ACCELERATOR
    options = Options.from_dict(usual.to_dict() | chosen | json.loads(given.options))
    results = []
    with tempfile.TemporaryDirectory(prefix="pema-benchmarks-") as name:
        folder = Path(name)
        with CONSOLE.status("preparing the inputs") as status:
            parts = {}
            if given.device == "cpu":
                child("prepare", options, folder)
                parts = child("list", options, folder)
            imports = child("imports", options, folder)["resident_bytes"]
            for benchmark in given.only or (NAMES if given.device == "cpu" else ON_DEVICE):
                status.update(f"{benchmark}: timing")
                result = child(benchmark, options, folder)
                whole = result.pop("resident_bytes") - imports
                sizes = {}
                for part in parts.get(benchmark, ()):
                    status.update(f"{benchmark}: peak memory of {part}")
                    once = dataclasses.replace(options, repeats=1, published_steps=2)
                    measured = child("part", once, folder, name=benchmark, part=part)
                    sizes[part] = measured["resident_bytes"] - imports
                result["peak_memory"] = {
                    "how": "peak resident memory of a process for each, less that of one that only imports",
                    "imports_bytes": imports,
                    "whole_benchmark_bytes": whole,
                    "parts_bytes": sizes,
                }
                put_run(given.output, name_of(result), result)
                results.append(result)
    console = CONSOLE if CONSOLE.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(table_of(results))
    console.print(memory_table_of(results))


if __name__ == "__main__":
    main()
