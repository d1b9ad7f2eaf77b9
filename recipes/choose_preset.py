"""Choose preset `best` on dev data of real tasks: held-out perplexity of the mixture, and BLEU.

    python -m recipes.choose_preset DATA --plm PLM -o runs/presets

Every candidate is trained on the demo's sentences, CoCoA-MT (formal) and 400 pairs of Multi30k, teacher contexts, seed
0, and scored on their dev data with the fitted schedule. Results go to `results/presets/PLM.json`; test data are not
touched.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pema.evaluation.perplexity import perplexity
from pema.experiments.adaptation import adapt, adapter_of, memory_of
from pema.experiments.data import Data, support_data
from pema.experiments.setting import Setting
from pema.files import write_json
from pema.generation.schedule import load_schedule
from pema.memory.build import build_memory
from pema.owner.local import LocalPLM
from pema.signature import signature
from pema.tasks.registry import get_task
from recipes.data import cocoa, multi30k

RESULTS = Path(__file__).parent.parent / "results" / "presets"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--plm", default="embedded")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/presets"), help="memories and adapters")
    args = parser.parse_args()
    plm = LocalPLM.load(args.plm, dtype="float32")
    name = plm.description.name
    captions = multi30k(args.data)
    rows = []
    for data in (support_data(), cocoa(args.data), replace(captions, train=captions.train[:400])):
        folder = args.output / name / data.name
        held_out = build_memory(plm, list(data.dev), get_task(data.task), folder / "dev")
        alone = adapt(plm, data, Setting(), folder, part="dev")
        rows.append(line(data, "PLM alone", perplexity(held_out.view(), held_out.head()), alone))
        for label, changes in CANDIDATES.items():
            setting = Setting("paper", changes=changes)
            memory, _ = memory_of(plm, data, setting, folder)
            adapter, _ = adapter_of(memory, setting, folder)
            schedule = load_schedule(folder / "adapters" / setting.adapter_key)
            found = perplexity(held_out.view(), held_out.head(), adapter, schedule)
            rows.append(line(data, label, found, adapt(plm, data, setting, folder, part="dev")))
            print(name, rows[-1], flush=True)
    config = {"candidates": CANDIDATES, "plm": plm.description.to_dict()}
    write_json(RESULTS / f"{name}.json", {"rows": rows, "signature": signature(config, 0)})


def line(data: Data, label: str, found: float, result: dict[str, float]) -> dict[str, object]:
    """One candidate on one task's dev data."""
    kept = {k: result[k] for k in ("bleu", "chrf", "formality_accuracy", "train_seconds", "best_epoch") if k in result}
    return {"data": data.name, "candidate": label, "dev_perplexity": round(found, 3), **kept}


if __name__ == "__main__":
    main()
