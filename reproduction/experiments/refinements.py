"""What could make preset `best` better on top of what it is: ensembles, neighbours, smoothing, penalties of repetition.

    python -m reproduction.experiments.refinements DATA -o runs/refinements

DATA is the folder of `python -m reproduction.data.real`. The PLM, the task and the 1,000 training texts are those of
the comparison on NL2Bash; the weight is 1. Adapters of three seeds are trained. The ensemble is the mean of their h_pd,
which is one adapter of three times the rank: A has the rows of all, B_pd their columns divided by three; it copies as
the first one does. Everything is measured on the 50 dev texts of the comparison. Results go to
`reproduction/results/refinements.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.sampled import SampledCrossEntropy
from pema.adapter.schedule import Constant
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.perplexity import target_log_probs
from pema.experiments.config import read_config
from pema.experiments.experiment import Experiment
from pema.generation.decoding import generate_counted
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.methods.knn_index import Index, Neighbours
from pema.methods.knn_mixture import SHARES, MixtureSettings, plugged
from pema.owner.contract import PLM
from pema.owner.opening import open_plm
from pema.signature import signature
from pema.tasks.example import Example
from reproduction.lines import put_run
from reproduction.paths import CONFIGS
from reproduction.tables.refinements import DATA, DECODING, ENSEMBLE, FILE, NEIGHBOURS, SMOOTHED

SEEDS, SMOOTHING = (0, 1, 2), 0.1
METRICS = ("bleu", "chrf")
K, WEIGHTS = 16, (0.1, 0.2, 0.3, 0.4, 0.5)
"""Number of neighbours; weights of their distribution, of which the likeliest on dev is taken."""


class Smoothed(SampledCrossEntropy):
    """Label smoothing: (1 - e) CE + e (log Z - mean of all logits), which is CE + e (x_y - mean of all logits)."""

    def chunk(self, h: Tensor, y: Tensor, dh: Tensor | None) -> Tensor:
        """See `CrossEntropy.chunk`; for a head without bias, scale and soft cap, whose targets are all in the core."""
        assert (self.complete, self.bias, self.soft_cap, self.scale) == (True, None, None, 1)
        losses = super().chunk(h, y, dh)
        if dh is None:
            return losses
        direction = self.W_hd[y].float() - self._head_weight.float().mean(0)
        dh += SMOOTHING * direction
        return losses + SMOOTHING * (h.float() * direction).sum(1)


def merged(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose h_pd is the mean of those of `adapters`, and which copies as the first one does."""
    first = adapters[0]
    tensors = dict(first.state_dict())
    tensors["A"] = torch.cat([each.A.detach() for each in adapters])
    tensors["B_pd"] = torch.cat([each.B_pd.detach() for each in adapters], dim=1) / len(adapters)
    config = dataclasses.replace(first.config, rank=sum(each.config.rank for each in adapters))
    return Adapter.of(config, tensors, "merged")


class Trial:
    """A PLM, the memories of its training and dev texts, and what is measured of an adapter.

    Attributes:
        train: the memory that adapters are trained on.
    """

    def __init__(self, experiment: Experiment, plm: PLM, folder: Path) -> None:
        self.plm, self.task, self.folder = plm, experiment.task, folder
        self.dev = experiment.data.dev
        self.train, self.held_out = (
            build_memory(plm, self._first(examples), self.task, folder / name, contexts="teacher")
            for name, examples in (("train", experiment.data.train), ("dev", self.dev))
        )
        self.head = plm.head()

    @staticmethod
    def _first(examples: Sequence[Example]) -> list[Example]:
        return [dataclasses.replace(example, alternatives=()) for example in examples]

    def adapted(self, seed: int) -> Adapter:
        """Train `best` with a seed."""
        return train(self.train, preset("best", seed=seed), self.folder / f"adapter-{seed}", resume=True)[0]

    def smoothed(self) -> Adapter:
        """Train `best` with label smoothing."""
        with patch("pema.adapter.joint.SampledCrossEntropy", Smoothed):
            return train(self.train, preset("best", seed=0), self.folder / "smoothed", resume=True)[0]

    def log_probs(self, adapter: Adapter) -> Tensor:
        """Return log P_PEMA of the dev targets, (n,)."""
        return torch.cat(list(target_log_probs(self.held_out.view(), self.head, adapter)))

    def texts(self, adapter: Adapter, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
        """Generate for the dev sources, and return the scores and the number of texts that were cut."""
        started = time.process_time()
        generated = generate_counted(self.plm, adapter, self.dev, self.task, Constant(1.0), **settings)
        scores = evaluate(self.task, generated.texts, [one.references for one in self.dev], metrics=METRICS)
        return {
            "scores": {name: round(score.value, 2) for name, score in scores.items()},
            "texts": len(self.dev),
            "cut": generated.finish_reasons.count("length"),
            "seconds": round(time.process_time() - started, 1),
            "samples": generated.texts[:8],
        }

    def neighbours(self, adapter: Adapter, index: Index) -> tuple[MixtureSettings, float]:
        """Return the likeliest mixture of kNN-LM's distribution with P_PEMA on dev, and its cross-entropy in nats."""
        f, targets = _pairs(self.held_out)
        found = index.search(f, K)
        log_pema = self.log_probs(adapter)
        best = MixtureSettings(K, 1.0, 0.0), -float(log_pema.mean())
        for share in SHARES:
            temperature = share * float(found.distances.mean())
            log_knn = _log_knn(found, targets, temperature)
            for weight in WEIGHTS:
                log_p = torch.logaddexp(log_pema + math.log(1 - weight), log_knn + math.log(weight))
                if -float(log_p.mean()) < best[1]:
                    best = MixtureSettings(K, temperature, weight), -float(log_p.mean())
        return best


def _pairs(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return all f, (n, d), and targets, (n,), in the order of the memory."""
    batches = list(memory.view().batches(1 << 12))
    f, targets = (torch.cat([getattr(b, name) for b in batches]) for name in ("representations", "targets"))
    return f, targets


def _log_knn(found: Neighbours, targets: Tensor, temperature: float) -> Tensor:
    """Return log P_kNN of targets, (n,), without a distribution over V for each."""
    shares = torch.softmax(-found.distances / temperature, dim=-1)
    return (shares * (found.targets == targets[:, None])).sum(-1).log()


def measured(trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the figures of each variant."""
    adapters = [trial.adapted(seed) for seed in SEEDS]
    for seed, adapter in zip(SEEDS, adapters, strict=True):
        yield f"seed {seed}", _entropy(trial.log_probs(adapter)) | trial.texts(adapter)
    ensemble = merged(adapters)
    yield ENSEMBLE, _entropy(trial.log_probs(ensemble)) | trial.texts(ensemble)
    yield SMOOTHED, _entropy(trial.log_probs(smooth := trial.smoothed())) | trial.texts(smooth)
    first = adapters[0]
    index = Index.build(trial.train, "Flat")
    chosen, entropy = trial.neighbours(first, index)
    with plugged(trial.plm.generator, index, chosen):
        figures = trial.texts(first)
    yield NEIGHBOURS, {"held_out_cross_entropy": round(entropy, 4), "mixture": chosen.to_dict()} | figures
    for name, settings in DECODING.items():
        yield name, trial.texts(first, **settings)


def _entropy(log_probs: Tensor) -> dict[str, float]:
    return {"held_out_cross_entropy": round(-float(log_probs.mean()), 4)}


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/refinements"), help="memories and adapters")
    args = parser.parse_args()
    experiment = read_config(CONFIGS / "compare" / f"{DATA}.toml", "compare", args.data)
    plm = open_plm(experiment.plm, dtype=experiment.plm_dtype)
    for name, figures in measured(Trial(experiment, plm, args.output)):
        settings = {"variant": name, "preset": "best", "plm": plm.description.name, "data": DATA}
        put_run(FILE, name, {**figures, "signature": signature(settings, 0)})


if __name__ == "__main__":
    main()
