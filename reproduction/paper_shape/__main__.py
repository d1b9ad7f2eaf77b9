"""Memory and time at the paper's shape: `python -m reproduction.paper_shape [--shapes NAME ...] [--methods NAME ...]`.

Full fine-tuning, LoRA, Offsite-Tuning, kNN-LM and PEMA at OPT's shapes with random weights, each in a separate process,
one after another. Existing results are kept and skipped; methods that did not fit are tried again. A method that does
not fit into the free memory is recorded as such, with its minimum memory by arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pema.files import read_json
from reproduction.child import run_module
from reproduction.lines import put_run, read_runs
from reproduction.paper_shape.options import METHODS, SHAPES, Setting, Shape, memory_pairs
from reproduction.tables.paper_shape import FILE, page

OUT = "out.json"


def child(what: str, shape: Shape, method: str, setting: Setting, folder: Path) -> None:
    """Run `reproduction.paper_shape.process`."""
    given = ["--method", method, "--folder", str(folder), "--shape", json.dumps(dataclasses.asdict(shape))]
    given += ["--setting", json.dumps(setting.to_dict())]
    run_module("reproduction.paper_shape.process", [what, *given], setting.threads)


def stored(path: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """Read existing results, by name.

    Raises:
        SystemExit: they were measured with another setting.
    """
    runs = read_runs(path)
    for run in runs.values():
        before = Setting.of(run).to_dict()
        for name, value in setting.to_dict().items():
            if before[name] != value:
                raise SystemExit(f"{path} was measured with {name}={before[name]!r}, not {value!r}: give another -o.")
    return runs


def measure_all(shapes: list[Shape], methods: list[str], setting: Setting, path: Path) -> None:
    """Measure the results missing from `path`, and write the file after each method."""
    results = stored(path, setting)
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="pema-paper-shape-") as place:
            folder = Path(place)
            for method in methods:
                name = f"{shape.name}, {method}"
                if results.get(name, {}).get("fits"):
                    print(f"{name}: already measured", file=sys.stderr)
                    continue
                if memory_pairs(method, setting):
                    # In a separate process, so that writing it is not part of the method's peak.
                    child("memory", shape, method, setting, folder)
                child("measure", shape, method, setting, folder)
                result = read_json(folder / OUT)
                put_run(path, name, result)
                print(f"{name}: {result.get('why') or progress_text(result)}", file=sys.stderr)


def progress_text(result: dict[str, Any]) -> str:
    """Return a line of progress."""
    peak = {name: round(value / 1e6) for name, value in result["peak_bytes"].items() if value is not None}
    return f"peak {peak} MB, {result['seconds']} s"


def main() -> None:
    """Measure the requested methods and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduction.paper_shape",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="only these shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these methods")
    parser.add_argument("--threads", type=int, default=Setting.threads, help="threads of torch")
    parser.add_argument("--device", default=Setting.device, help="cpu, cuda, or auto")
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="the results file")
    given = parser.parse_args()
    setting = Setting(threads=given.threads, device=given.device)
    measure_all([SHAPES[name] for name in given.shapes], given.methods, setting, given.output)
    print(page(list(read_runs(given.output).values())))


if __name__ == "__main__":
    main()
