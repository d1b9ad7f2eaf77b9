"""One benchmark, or one part of one, in a separate process started by `__main__`.

Peak memory is the peak resident size of such a process, minus that of a process that only imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from pema.experiments.peak import resident
from reproduction.benchmarks.options import DEMO, NONE, RESTAURANTS, Options

NAMES = ("building", "prefix", "reconstruction", "joint_training", "generation", "serving")

ON_DEVICE = ("building", "joint_training", "generation")
"""Benchmarks of what runs on an accelerator."""


def load(options: Options) -> dict[str, Any]:
    """Import every benchmark of the device, so that each process starts from the same memory; set torch's threads."""
    import torch

    torch.set_num_threads(options.threads)
    names = NAMES if options.device == "cpu" else ON_DEVICE
    return {name: importlib.import_module(f"reproduction.benchmarks.{name}") for name in names}


def measure(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """Return the result of one benchmark with its signature, without its peak memory."""
    import torch

    from pema.signature import signature

    module = load(options)[name]
    started = time.perf_counter()
    result: dict[str, Any] = module.run(options, folder)
    config = options.to_dict() | {"benchmark": name}
    if config["corpus"] not in (DEMO, RESTAURANTS, NONE):
        config["corpus"] = Path(config["corpus"]).name
    config["plm"] = Path(config["plm"]).name
    if options.device != "cpu":
        result["device_bytes"] = torch.cuda.max_memory_allocated()
        result["device"] = torch.cuda.get_device_name()
    return {
        "benchmark": name,
        "summary": result.pop("summary"),
        **result,
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "seconds": round(time.perf_counter() - started, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "signature": signature(config, options.seed),
    }


def prepare(options: Options, folder: Path) -> None:
    """Write the inputs of several processes."""
    load(options)
    from reproduction.benchmarks.inputs import plm_memory, synthetic_memory

    plm_memory(options, folder)
    for shape in options.shapes:
        synthetic_memory(options, shape, folder)


def main() -> None:
    """Run one task and write its result as JSON to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("imports", "prepare", "list", "part", *NAMES))
    parser.add_argument("--name", choices=NAMES)
    parser.add_argument("--part")
    parser.add_argument("--options", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    options = Options.from_dict(json.loads(given.options))
    result: dict[str, Any] = {}
    if given.what == "prepare":
        prepare(options, given.folder)
    elif given.what == "imports":
        load(options)
    elif given.what == "list":
        modules = load(options)
        result = {name: list(module.parts(options, given.folder)) for name, module in modules.items()}
    elif given.what == "part":
        load(options)[given.name].parts(options, given.folder)[given.part]()
    else:
        result = measure(given.what, options, given.folder)
    given.out.write_text(json.dumps(result | {"resident_bytes": resident()[1]}), encoding="utf-8")


if __name__ == "__main__":
    main()
