"""Building, training and generating by one process, and by one and two workers of a launcher and of Ray.

    python -m reproduction.experiments.scaling

On the CPU, with SmolLM2-135M-Instruct and the restaurants of the demo: every stage runs in processes of its own with
one thread each (`reproduction.experiments.scaled`), in turns, `--repeats` times. The table takes the shortest times.
Results go to `reproduction/results/scaling.jsonl`. It needs the packaged PLM `smollm2-135m`, Accelerate, Ray, and as
many idle cores as workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema.files import read_json
from pema.signature import signature
from reproduction.experiments.scaled import Stage
from reproduction.lines import put_run
from reproduction.paths import ROOT
from reproduction.tables.scaling import FILE, LAUNCHED, PROCESS, STAGES

LIMIT = 1 << 16
"""Maximum size of a result, in bytes."""


def measure(stage: Stage, output: Path, before: Path) -> dict[str, Any]:
    """Run a stage in processes of its own; returns its times, its count and the digest of what it made.

    Args:
        stage: the stage.
        output: folder of what it makes.
        before: folder of what the stage before has made, if there is one.

    Raises:
        SystemExit: it failed; the message holds what it said.
    """
    result = output.with_suffix(".json")
    command = [sys.executable, "-m"]
    if stage.engine == LAUNCHED:
        command += ["accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(stage.workers)]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command += [*(["--multi_gpu"] if stage.workers > 1 else []), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"ACCELERATE_USE_CPU": "true", "RAY_AUTH_MODE": "disabled"}
    command += ["reproduction.experiments.scaled", json.dumps(asdict(stage)), *map(str, (output, before, result))]
    command += [str(time.time())]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not result.exists():
        raise SystemExit(f"{stage} failed with {done.returncode}:\n{done.stderr}")
    return read_json(result, LIMIT)


def main() -> None:
    """Measure every stage with every engine, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plm", default="smollm2-135m", help="name of the PLM")
    parser.add_argument("--examples", type=int, default=128, help="to build a memory of")
    parser.add_argument("--texts", type=int, default=96, help="to generate")
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FILE, help="file of the results")
    args = parser.parse_args()
    config = {name: getattr(args, name) for name in ("plm", "examples", "texts", "epochs")}
    stages = [Stage(name, engine, workers, **config) for name, ways in STAGES.items() for engine, workers in ways]
    runs: dict[Stage, list[dict[str, Any]]] = {stage: [] for stage in stages}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="pema-scaling-") as name:
        for number in range(args.repeats):
            before = latest = Path(name)
            for stage in stages:
                output = Path(name) / f"{stage.name}-{stage.engine}-{stage.workers}-{number}"
                if stage.engine == PROCESS:  # comes first of its stage; the stages after it use what it makes
                    before, latest = latest, output
                runs[stage].append(measure(stage, output, before))
                times = {key: [each[key] for each in runs[stage]] for key in ("start", "work")}
                made = {key: value for key, value in runs[stage][-1].items() if key not in times}
                result = times | made | {"load_average": round(load, 1), "signature": signature(asdict(stage), 0)}
                put_run(args.output, stage.run, result)


if __name__ == "__main__":
    main()
