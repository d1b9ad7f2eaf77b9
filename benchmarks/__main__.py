"""Run the benchmarks: `python -m benchmarks [--plm embedded|FOLDER] [--corpus TSV|none] [-o FOLDER] [--only NAME ...]`.

With `--corpus none` the sentences are made up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.options import DEMO, Options
from benchmarks.process import NAMES

ROOT = Path(__file__).resolve().parent
CONSOLE = Console(highlight=False)
WIDTH = 170
"""Of the tables where the output is not a terminal."""


def child(what: str, options: Options, folder: Path, **more: str) -> dict[str, Any]:
    """Run `benchmarks.process` and read what it found."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.process", what]
    command += ["--options", json.dumps(options.to_dict()), "--folder", str(folder), "--out", str(out)]
    command += [text for name, value in more.items() for text in (f"--{name}", value)]
    # BLAS and OpenMP read their number of threads when they are loaded.
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:4])} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def table_of(results: list[dict[str, Any]]) -> Table:
    """One line per comparison."""
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
    """One line per process."""
    table = Table(title="Peak memory above that of importing")
    for title in ("", "part", "MB"):
        table.add_column(title, justify="right" if title == "MB" else "left")
    for result in results:
        for part, size in result["peak_memory"]["parts_bytes"].items():
            table.add_row(result["benchmark"], part, f"{size / 1e6:,.0f}")
    return table


def main() -> None:
    """Run what was asked for, write the results, print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--plm", default="embedded", help="the PLM: embedded, or a folder")
    parser.add_argument("--corpus", default=DEMO, help="TSV of source and target; the demo's sentences; or none")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="run only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="timed rounds")
    parser.add_argument("--examples", type=int, default=Options.examples, help="most examples of the corpus")
    parser.add_argument(
        "--sgd-seconds", type=float, default=Options.sgd_seconds, help="most time of a gradient descent"
    )
    parser.add_argument("--options", default="{}", help="JSON of further fields of benchmarks.options.Options")
    given = parser.parse_args()
    chosen = {name: getattr(given, name) for name in ("plm", "corpus", "threads", "repeats", "examples", "sgd_seconds")}
    for name in ("plm", "corpus"):
        if Path(chosen[name]).exists():
            chosen[name] = str(Path(chosen[name]).resolve())
    options = Options.from_dict(Options().to_dict() | chosen | json.loads(given.options))
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="pema-benchmarks-") as name:
        folder = Path(name)
        with CONSOLE.status("preparing the inputs") as status:
            child("prepare", options, folder)
            parts = child("list", options, folder)
            imports = child("imports", options, folder)["resident_bytes"]
            for benchmark in given.only:
                status.update(f"{benchmark}: timing")
                result = child(benchmark, options, folder)
                whole = result.pop("resident_bytes") - imports
                sizes = {}
                for part in parts[benchmark]:
                    status.update(f"{benchmark}: peak memory of {part}")
                    once = dataclasses.replace(options, repeats=1, published_steps=2)
                    found = child("part", once, folder, name=benchmark, part=part)
                    sizes[part] = found["resident_bytes"] - imports
                result["peak_memory"] = {
                    "how": "ru_maxrss of a process for each, less that of one that only imports",
                    "imports_bytes": imports,
                    "whole_benchmark_bytes": whole,
                    "parts_bytes": sizes,
                }
                text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
                (given.output / f"{benchmark}.json").write_text(text, encoding="utf-8")
                results.append(result)
    console = CONSOLE if CONSOLE.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(table_of(results))
    console.print(memory_table_of(results))


if __name__ == "__main__":
    main()
