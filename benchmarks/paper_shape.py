"""Memory and time at the paper's shape: `python -m benchmarks.paper_shape [--shapes NAME ...] [--methods NAME ...]`.

Full fine-tuning, LoRA, Offsite-Tuning, kNN-LM and PEMA at OPT's shapes with random weights, each in a process of its
own, one after another. What the results file holds is kept and skipped; what did not fit is tried again. A method that
does not fit into the memory that is free is recorded as such, with what it needs at least by arithmetic.
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

from benchmarks.paper_options import METHODS, SHAPES, Setting, Shape, memory_pairs
from benchmarks.paper_table import page

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "paper_shape.json"
OUT = "out.json"


def child(what: str, shape: Shape, method: str, setting: Setting, folder: Path) -> None:
    """Run `benchmarks.paper_process`."""
    command = [sys.executable, "-m", "benchmarks.paper_process", what, "--method", method, "--folder", str(folder)]
    command += ["--shape", json.dumps(dataclasses.asdict(shape)), "--setting", json.dumps(setting.to_dict())]
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} at {shape.name} failed with {done.returncode}:\n{done.stderr}")


def stored(path: Path, setting: Setting) -> list[dict[str, Any]]:
    """The results that are there already."""
    if not path.exists():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in setting.to_dict().items():
        if found["setting"].get(name) != value:
            raise SystemExit(
                f"{path} was measured with {name}={found['setting'].get(name)!r}, not {value!r}: give another -o."
            )
    return list(found["results"])


def measure_all(shapes: list[Shape], methods: list[str], setting: Setting, path: Path) -> list[dict[str, Any]]:
    """Measure what `path` lacks; after each method it is written anew."""
    results = {(found["shape"], found["method"]): found for found in stored(path, setting)}
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="pema-paper-shape-") as name:
            folder = Path(name)
            for method in methods:
                if results.get((shape.name, method), {}).get("fits"):
                    print(f"{shape.name}, {method}: measured already", file=sys.stderr)
                    continue
                if memory_pairs(method, setting):
                    # In a process of its own, so that writing it is not in the method's peak.
                    child("memory", shape, method, setting, folder)
                child("measure", shape, method, setting, folder)
                found = json.loads((folder / OUT).read_text(encoding="utf-8"))
                results[shape.name, method] = found
                write(path, setting, list(results.values()))
                print(f"{shape.name}, {method}: {found.get('why') or said(found)}", file=sys.stderr)
    return list(results.values())


def said(found: dict[str, Any]) -> str:
    """A line of progress."""
    peak = {name: round(value / 1e6) for name, value in found["peak_bytes"].items() if value is not None}
    return f"peak {peak} MB, {found['seconds']} s"


def write(path: Path, setting: Setting, results: list[dict[str, Any]]) -> None:
    """Replace the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = {"benchmark": "paper_shape", "setting": setting.to_dict(), "results": results}
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Measure what was asked for and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_shape",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="only these shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these methods")
    parser.add_argument("--threads", type=int, default=Setting.threads, help="threads of torch")
    parser.add_argument("--device", default=Setting.device, help="cpu, cuda, or auto")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="the results file")
    given = parser.parse_args()
    setting = Setting(threads=given.threads, device=given.device)
    measure_all([SHAPES[name] for name in given.shapes], given.methods, setting, given.output)
    print(page(json.loads(given.output.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
