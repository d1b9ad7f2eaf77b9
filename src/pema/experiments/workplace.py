"""The work folder of experiments, shared by runs: prepared files, trained adapters, and what they reach on dev."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema.console import note
from pema.evaluation.evaluate import LABEL_ACCURACY
from pema.experiments.experiment import CPU, EXAMPLES, PLM, Experiment, build_method
from pema.experiments.requirements import provided_by, require_provided, require_suited
from pema.experiments.training_process import TRAINED, train_in_process
from pema.files import digest, read_json, write_json, writing
from pema.methods.contract import AdaptedModel, Job, Method, Requirement, TrainingReport
from pema.methods.decoding import decoding_for
from pema.methods.lengths import require_fit
from pema.methods.registry import method_name
from pema.own import is_own, source_digest
from pema.owner import contract
from pema.owner.local import LocalPLM
from pema.owner.opening import accepted, open_plm
from pema.tasks.example import Example

PREPARED, DEV, DEV_TEXTS = "prepared.json", "dev.json", "dev_texts.json"
SHORT = 12
"""Number of digits of a digest in the name of a folder."""


@dataclass(frozen=True)
class Stages:
    """Stages of one setting with one seed: its method, its job and the folders of its files.

    Attributes:
        method: the method with its settings.
        job: input of the method.
        prepared: folder of the PLM owner's part.
        trained: folder of the trained part.
    """

    method: Method
    job: Job
    prepared: Path
    trained: Path


class Workplace:
    """Work folder of an experiment; finished stages are reused, also those of other experiments."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self._folder, self._experiment = folder, experiment
        self._plm: tuple[str, contract.PLM] | None = None
        self._provided: frozenset[Requirement] = frozenset()
        self._decoding: dict[str, dict[str, Any]] = {}

    def plm(self, settings: Mapping[str, Any]) -> contract.PLM:
        """Return the PLM of a run; the last one stays open.

        Raises:
            ConfigError: a line requires more of it than it provides.
            DataError: an example is too long for it.
            OwnerError: it cannot be opened.
        """
        name = settings.get(PLM, self._experiment.plm)
        if self._plm is None or self._plm[0] != name:
            self._plm = None
            gc.collect()  # ends a server that was started for the last one
            experiment = self._experiment
            device_map = None if experiment.device == CPU else experiment.device
            plm = open_plm(name, **accepted(name, {"dtype": experiment.plm_dtype, "device_map": device_map}))
            provided = provided_by(plm)
            require_provided(experiment, name, provided)
            require_suited(experiment, name, plm)
            require_fit(plm, experiment.task.template, experiment.data.dev, experiment.data.test)
            self._plm, self._provided = (name, plm), provided
        return self._plm[1]

    def require_all(self) -> None:
        """Open every PLM of the experiment once, and refuse what does not suit it; see `plm` and `decoding`."""
        for name in reversed(self._experiment.plms()):  # the first one stays open
            self.decoding({PLM: name})

    def owner(self, settings: Mapping[str, Any]) -> str | None:
        """Return the kind of owner of a PLM that is not in this process: its costs, and its rounding, are its own."""
        plm = self.plm(settings)
        return None if isinstance(plm, LocalPLM) else type(plm).__name__

    def decoding(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decoding settings of a run: the same for all methods that adapt the same PLM."""
        name = settings.get(PLM, self._experiment.plm)
        if name not in self._decoding:
            experiment = self._experiment
            self._decoding[name] = decoding_for(
                self.plm(settings), experiment.task.template, experiment.data.train, experiment.decoding
            )
        return self._decoding[name]

    def stages(self, method: type[Method], settings: Mapping[str, Any], seed: int) -> Stages:
        """Return the stages of a run; folders with equal names agree in everything that a stage depends on."""
        experiment, description = self._experiment, self.plm(settings).description
        train = experiment.data.train[: settings.get(EXAMPLES)]
        name = settings.get(PLM, experiment.plm)
        job = Job(
            plm=name,
            plm_dtype=experiment.plm_dtype,
            task=experiment.task,
            train=train,
            dev=experiment.data.dev,
            seed=seed,
            budget=experiment.budget,
            device=experiment.device,
            batch_tokens=experiment.batch_tokens,
            decoding=self.decoding(settings),
        )
        one = build_method(method, settings)
        given: dict[str, Any] = {
            "plm": [description.fingerprint, description.tokenizer_fingerprint, experiment.plm_dtype],
            **experiment.task.template.record(self.plm(settings).tokenizer),
            "train": [example.to_list() for example in train],
        }
        if experiment.device != CPU:
            given["device"] = experiment.device
        if owner := self.owner(settings):
            given["owner"] = owner
        prepared: dict[str, Any] = {"given": given, "prepared_by": one.prepared_by}
        budget = {key: value for key, value in vars(experiment.budget).items() if key != "trials"}
        if not one.shared:
            prepared |= {"method": one.name, "seed": seed, "budget": budget}
        called = method_name(method)
        source = source_digest(called) if is_own(called) else None
        if source is not None and method.prepare.__module__ == method.__module__:
            prepared |= {"own": source}
        trained = prepared | {"method": one.name, "trained_by": one.trained_by, "seed": seed, "budget": budget}
        if source is not None:
            trained |= {"own": source}
        return Stages(
            one,
            job,
            self._folder / "prepared" / digest(prepared)[:SHORT],
            self._folder / "trained" / f"{one.name}-{digest(trained)[:SHORT]}",
        )

    def figures(self, stages: Stages, plm: contract.PLM) -> dict[str, Any]:
        """Return the figures of preparation and training; unfinished stages are run now."""
        prepared, method = {"prepare_seconds": 0.0}, stages.method
        if method.prepared_by is not None:
            if not (stages.prepared / PREPARED).exists():
                with writing(stages.prepared) as temporary:
                    temporary.mkdir()
                    started = time.perf_counter()
                    method.prepare(plm, stages.job, temporary)
                    seconds = round(time.perf_counter() - started, 3)
                    write_json(temporary / PREPARED, {"prepare_seconds": seconds})
            prepared = read_json(stages.prepared / PREPARED)
        if not (stages.trained / TRAINED).exists():
            report = TrainingReport.from_dict(train_in_process(method, stages.job, stages.prepared, stages.trained))
            if report.divergence:
                note(f"{method.name} with {stages.method.settings()}: {report.divergence}")
        return prepared | read_json(stages.trained / TRAINED)

    def open(self, stages: Stages, plm: contract.PLM) -> AdaptedModel:
        """Open the adapted PLM of finished stages."""
        return stages.method.open(plm, stages.job, stages.prepared, stages.trained)

    def dev_perplexity(self, stages: Stages, plm: contract.PLM, adapted: AdaptedModel | None = None) -> float | None:
        """Return the perplexity of the dev targets, stored with the trained part.

        It is None if it is infinite, or if the PLM does not give the likelihoods of targets.

        Args:
            stages: stages of the run.
            plm: PLM of the run.
            adapted: the adapted PLM, if it is already open.
        """
        if "likelihoods" not in self._provided:
            return None
        dev = [example.to_list() for example in stages.job.dev]
        file = stages.trained / f"{digest({'settings': stages.method.settings(), 'dev': dev})[:SHORT]}.{DEV}"
        if not file.exists():
            if adapted is None:
                self.figures(stages, plm)
                with self.open(stages, plm) as opened:
                    perplexity = opened.perplexity(stages.job.dev)
            else:
                perplexity = adapted.perplexity(stages.job.dev)
            write_json(file, {"dev_perplexity": perplexity if math.isfinite(perplexity) else None})
        stored: float | None = read_json(file)["dev_perplexity"]
        return stored

    def dev_texts(self, stages: Stages, plm: contract.PLM) -> list[str]:
        """Return the texts for the dev examples of the choice, stored with the trained part.

        If candidates are chosen by `label_accuracy`, they are labels chosen by likelihood.
        """
        file = self.dev_texts_file(stages)
        if not file.exists():
            self.figures(stages, plm)
            examples = [stages.job.dev[i] for i in self._experiment.choice_numbers]
            with self.open(stages, plm) as adapted:
                if self._experiment.choice_metric == LABEL_ACCURACY:
                    texts = self.labels(adapted, examples)
                else:
                    texts = adapted.generate(examples, batch_size=self._experiment.batch_size).texts
            write_json(file, {"texts": texts})
        stored: list[str] = read_json(file)["texts"]
        return stored

    def labels(self, adapted: AdaptedModel, examples: Sequence[Example]) -> list[str]:
        """Return the label of each example that is chosen by likelihood."""
        experiment = self._experiment
        chosen = adapted.classify(
            examples, experiment.data.choices, batch_size=experiment.batch_size, probabilities=False
        )
        return chosen.choices

    def dev_texts_file(self, stages: Stages) -> Path:
        """Return the file of `dev_texts`, which depends on everything that the texts depend on."""
        given = {
            "settings": stages.method.settings(),
            "dev": [stages.job.dev[i].to_list() for i in self._experiment.choice_numbers],
            "decoding": stages.job.decoding,
        }
        if self._experiment.choice_metric == LABEL_ACCURACY:
            given["labels"] = self._experiment.data.choices
        return stages.trained / f"{digest(given)[:SHORT]}.{DEV_TEXTS}"
