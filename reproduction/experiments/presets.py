"""The choice of preset `best` on dev data of real tasks: perplexity of the mixture, and BLEU.

    python -m reproduction.experiments.presets DATA -o runs

Every candidate is trained on the demo's sentences, CoCoA-MT (formal) and 400 pairs of Multi30k, teacher contexts, seed
0, embedded PLM, and scored on their dev data with the constant weight that suits it best there. Results go to
`reproduction/results/presets/`; runs that are finished in the folder of `-o` are skipped. Test data are not touched.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pema.evaluation.evaluate import FORMALITY
from pema.experiments.data import Data, support_data
from pema.experiments.experiment import Entry, Experiment
from pema.methods.contract import Budget
from pema.methods.pema import PEMA
from pema.methods.plm_alone import PLMAlone
from pema.tasks.registry import get_task
from reproduction.data.real import cocoa, multi30k
from reproduction.folders import run_into
from reproduction.lines import SUFFIX
from reproduction.tables.presets import FOLDER

GELU = {"residual": True, "activation": "gelu", "kappa": 0.0, "rank": 2048, "epochs": 12, "fit_rank": True}
CURVED = GELU | {"optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.05, "decay": "cosine", "dropout": 0.25}
CANDIDATES: dict[str, dict[str, object]] = {
    "paper": {},
    "linear, pca, kappa 0": {"init": "pca", "kappa": 0.0},
    "gelu": CURVED,
    "gelu, half the learning rate": CURVED | {"learning_rate": 5e-4},
    "gelu, seen vocabulary": CURVED | {"vocabulary": "seen"},
    "gelu, 0.3 of the learning rate": CURVED | {"learning_rate": 3e-4},
}
WEIGHTS = {"lambda_max": [0.3, 0.5, 0.7, 0.9]}


def experiment(data: Data) -> Experiment:
    """Return the comparison of all candidates on the dev data."""
    annotated = {"test": data.annotated["dev"]} if "dev" in data.annotated else {}
    task = get_task(data.task)
    alone = Entry("PLM alone", PLMAlone, {}, {}, {})
    candidates = (
        Entry(label, PEMA, {"preset": "paper", "schedule": "constant"} | changes, WEIGHTS, {})
        for label, changes in CANDIDATES.items()
    )
    return Experiment(
        name=data.name,
        title=f"Candidates for preset best, dev data of {data.name}",
        kind="compare",
        task=task,
        plm="embedded",
        plm_dtype="float32",
        seeds=(0,),
        metrics=(*task.metrics, *([FORMALITY] if annotated else [])),
        references=("paper",),
        data=replace(data, test=data.dev, annotated=annotated),
        budget=Budget(),
        entries=(alone, *candidates),
    )


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="memories and adapters")
    args = parser.parse_args()
    captions = multi30k(args.data, 400)
    for data in (support_data(), cocoa(args.data), captions):
        run_into(FOLDER / f"{data.name}{SUFFIX}", experiment(data), args.output)


if __name__ == "__main__":
    main()
