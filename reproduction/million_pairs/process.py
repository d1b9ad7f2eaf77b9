"""One stage of `million_pairs` in a separate process: `python -m reproduction.million_pairs.process`."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from pema.experiments.peak import status
from pema.signature import signature
from reproduction.benchmarks.timing import significant
from reproduction.million_pairs.options import Setting, Stage
from reproduction.million_pairs.source import prepare
from reproduction.million_pairs.stages import KINDS
from reproduction.paper_shape.peak import Peak

OUT = "out.json"


def measure(setting: Setting, stage: Stage, folder: Path) -> dict[str, Any]:
    """Return the result of a stage with its signature."""
    torch.set_num_threads(setting.threads)
    before, wall, processor = status("RssAnon"), time.perf_counter(), time.process_time()
    with Peak(torch.device("cpu")) as peak:
        figures, floor = KINDS[stage.kind](setting, stage, folder)
    result = {
        "stage": stage.name,
        "seconds": significant(time.perf_counter() - wall),
        "processor_seconds": significant(time.process_time() - processor),
        "imported_bytes": before,
        "peak_anonymous_bytes": before + peak.anonymous,
        **figures,
    }
    result["floor_seconds"] = significant(floor())
    config = setting.to_dict() | {"benchmark": "million_pairs"}
    load = [round(load, 2) for load in os.getloadavg()]
    return result | {"load_average": load, "signature": signature(config, setting.seed)}


def main() -> None:
    """Write the PLM and its texts, or measure a stage and write the result to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", help="prepare, or the name of a stage")
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    setting = Setting(**given.setting)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "prepare":
        prepare(setting, given.folder)
    else:
        result = measure(setting, Stage.named(given.what), given.folder)
        (given.folder / OUT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
