"""Real input: the PLM alone, the presets, both context modes and the schedules on CoCoA-MT, Multi30k and WMT22.

    python -m recipes.real_input DATA --plm PLM -o runs/real_input

DATA holds the folders `cocoa-mt-en-de`, `multi30k-en-de` and `wmt22-en-de`. Results go to
`results/real_input/PLM/DATASET/SETTING.test.json` with the hypotheses beside them; finished ones are skipped.
Settings are chosen on dev (`--part dev`), reported on test.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from pema.evaluation.evaluate import get_metric
from pema.evaluation.significance import paired_bootstrap
from pema.experiments.adaptation import adapt
from pema.experiments.data import Data
from pema.experiments.setting import Setting
from pema.files import write_json
from pema.owner.local import LocalPLM
from pema.signature import signature
from pema.tasks.readers import read_lines
from recipes.data import cocoa, multi30k, wmt22

RESULTS = Path(__file__).parent.parent / "results" / "real_input"


def settings(seeds: int) -> Iterator[Setting]:
    """The PLM alone, both presets in both context modes, and the schedules compared in teacher mode."""
    yield Setting()
    for seed in range(seeds):
        for preset, schedule in product(("paper", "best"), ("unrolling", "constant", "linear", "fitted")):
            yield Setting(preset, schedule=schedule, seed=seed)  # type: ignore[arg-type]
        yield Setting("paper", "predicted", schedule="unrolling", seed=seed)
        for targets, schedule in product(("position", "aligned"), ("unrolling", "fitted")):
            yield Setting("best", "predicted", targets, schedule=schedule, seed=seed)  # type: ignore[arg-type]


def fewer_settings(seeds: int) -> Iterator[Setting]:
    """For a large memory: the PLM alone, both presets in teacher mode, `best` in the paper's mode."""
    yield Setting()
    for seed in range(seeds):
        for preset, schedule in product(("paper", "best"), ("unrolling", "constant", "fitted")):
            yield Setting(preset, schedule=schedule, seed=seed)  # type: ignore[arg-type]
    for seed in range(seeds):
        yield Setting("best", "predicted", "aligned", schedule="unrolling", seed=seed)


def significance(data: Data, folder: Path, plm: LocalPLM) -> None:
    """Paired bootstrap on test, seed 0: every setting against the PLM alone, and best against paper."""
    references = [e.target for e in data.test]
    outputs = {path.name.removesuffix(".test.txt"): read_lines(path) for path in folder.glob("*.txt")}
    metrics = {"bleu": get_metric("bleu")}
    if "test" in data.annotated:
        metrics["formality_accuracy"] = get_metric("formality_accuracy", data.annotated["test"])
    comparisons = []
    paper, best = Setting("paper", schedule="unrolling").key, Setting("best").key
    pairs = [("plm", key) for key in sorted(outputs) if key != "plm" and "seed0" in key] + [(paper, best)]
    for baseline, system in pairs:
        for name, metric in metrics.items():
            found = paired_bootstrap(metric, outputs[baseline], outputs[system], references)
            comparisons.append({"metric": name, "baseline": baseline, "system": system, "found": asdict(found)})
    config = {"data": data.name, "data_sha256": data.digest(), "plm": plm.description.to_dict()}
    write_json(folder / "significance.json", {"comparisons": comparisons, "signature": signature(config, 0)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--plm", default="embedded")
    parser.add_argument("--only", nargs="*", default=["cocoa", "multi30k", "wmt22", "multi30k-4000"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/real_input"), help="memories and adapters")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plm = LocalPLM.load(args.plm, dtype="float32")
    name = plm.description.name
    makers = {
        "cocoa": cocoa,
        "multi30k": multi30k,
        "wmt22": lambda folder: wmt22(folder, plm.tokenizer),
        "multi30k-4000": lambda folder: multi30k(folder, 4000),
    }
    for which in args.only:
        data = makers[which](args.data)
        work, kept = args.output / name / data.name, RESULTS / name / data.name
        kept.mkdir(parents=True, exist_ok=True)
        for setting in (fewer_settings if which == "multi30k-4000" else settings)(args.seeds):
            result = adapt(plm, data, setting, work)
            for ending in (".json", ".txt"):
                found = work / "results" / f"{setting.key}.test{ending}"
                shutil.copyfile(found, kept / found.name)
            scores = {k: result[k] for k in ("bleu", "chrf", "formality_accuracy", "train_seconds") if k in result}
            print(name, data.name, setting.key, scores, flush=True)
        significance(data, kept, plm)


if __name__ == "__main__":
    main()
