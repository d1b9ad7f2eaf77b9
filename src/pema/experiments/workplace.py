"""What runs leave for one another: what the owner prepared, what was trained, and how it does on dev."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema.console import note
from pema.experiments.experiment import CPU, EXAMPLES, PLM, Experiment, made
from pema.experiments.training_process import TRAINED, train_in_process
from pema.files import digest, read_json, write_json, writing
from pema.methods.contract import AdaptedModel, Job, Method, TrainingReport
from pema.methods.decoding import decoding_for
from pema.methods.registry import method_name
from pema.own import is_own, source_digest
from pema.owner.local import LocalPLM

PREPARED, DEV = "prepared.json", "dev.json"
SHORT = 12
"""Digits of a digest that name a folder."""


@dataclass(frozen=True)
class Place:
    """One setting with one seed: what is given, and where its stages lie.

    Attributes:
        method: the method with its settings.
        job: what it is given.
        prepared: folder of what the PLM owner made.
        trained: folder of what training left.
    """

    method: Method
    job: Job
    prepared: Path
    trained: Path


class Workplace:
    """The folder of an experiment's work; what is finished there is used, whatever experiment made it."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self._folder, self._experiment = folder, experiment
        self._plm: tuple[str, LocalPLM] | None = None
        self._decoding: dict[str, dict[str, Any]] = {}

    def plm(self, settings: Mapping[str, Any]) -> LocalPLM:
        """The PLM of a run; the last one stays loaded."""
        name = settings.get(PLM, self._experiment.plm)
        if self._plm is None or self._plm[0] != name:
            self._plm = (
                name,
                LocalPLM.load(
                    name,
                    dtype=self._experiment.plm_dtype,
                    device_map=None if self._experiment.device == CPU else self._experiment.device,
                ),
            )
        return self._plm[1]

    def decoding(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decoding settings of a run: the same for all methods that adapt the same PLM."""
        name = settings.get(PLM, self._experiment.plm)
        if name not in self._decoding:
            experiment = self._experiment
            self._decoding[name] = decoding_for(
                self.plm(settings), experiment.task.template, experiment.data.train, experiment.decoding
            )
        return self._decoding[name]

    def place(self, method: type[Method], settings: Mapping[str, Any], seed: int) -> Place:
        """Where the run of these settings lies; equal names are equal in everything that a stage depends on."""
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
        one = made(method, settings)
        given: dict[str, Any] = {
            "plm": [description.fingerprint, description.tokenizer_fingerprint, experiment.plm_dtype],
            **experiment.task.template.record(self.plm(settings).tokenizer),
            "train": [example.to_list() for example in train],
        }
        if experiment.device != CPU:
            given["device"] = experiment.device
        prepared: dict[str, Any] = {"given": given, "prepared_by": one.prepared_by}
        if not one.shared:
            prepared |= {"method": one.name, "seed": seed}
        called = method_name(method)
        source = source_digest(called) if is_own(called) else None
        if source is not None and method.prepare.__module__ == method.__module__:
            prepared |= {"own": source}
        budget = {key: value for key, value in vars(experiment.budget).items() if key != "trials"}
        trained = prepared | {"method": one.name, "trained_by": one.trained_by, "seed": seed, "budget": budget}
        if source is not None:
            trained |= {"own": source}
        return Place(
            one,
            job,
            self._folder / "prepared" / digest(prepared)[:SHORT],
            self._folder / "trained" / f"{one.name}-{digest(trained)[:SHORT]}",
        )

    def figures(self, place: Place, plm: LocalPLM) -> dict[str, Any]:
        """What preparing and training cost; what is not finished is done now."""
        prepared, method = {"prepare_seconds": 0.0}, place.method
        if method.prepared_by is not None:
            if not (place.prepared / PREPARED).exists():
                with writing(place.prepared) as temporary:
                    temporary.mkdir()
                    started = time.perf_counter()
                    method.prepare(plm, place.job, temporary)
                    seconds = round(time.perf_counter() - started, 3)
                    write_json(temporary / PREPARED, {"prepare_seconds": seconds})
            prepared = read_json(place.prepared / PREPARED)
        if not (place.trained / TRAINED).exists():
            report = TrainingReport.from_dict(train_in_process(method, place.job, place.prepared, place.trained))
            if report.divergence:
                note(f"{method.name} with {place.method.settings()}: {report.divergence}")
        return prepared | read_json(place.trained / TRAINED)

    def open(self, place: Place, plm: LocalPLM) -> AdaptedModel:
        """The adapted PLM of a place whose stages are done."""
        return place.method.open(plm, place.job, place.prepared, place.trained)

    def dev_perplexity(self, place: Place, plm: LocalPLM, adapted: AdaptedModel | None = None) -> float | None:
        """Perplexity of the dev targets, kept beside what was trained; None where it is infinite, as in JSON.

        Args:
            place: the run.
            plm: its PLM.
            adapted: the adapted PLM where it is open already.
        """
        dev = [example.to_list() for example in place.job.dev]
        file = place.trained / f"{digest({'settings': place.method.settings(), 'dev': dev})[:SHORT]}.{DEV}"
        if not file.exists():
            if adapted is None:
                self.figures(place, plm)
                with self.open(place, plm) as opened:
                    perplexity = opened.perplexity(place.job.dev)
            else:
                perplexity = adapted.perplexity(place.job.dev)
            write_json(file, {"dev_perplexity": perplexity if math.isfinite(perplexity) else None})
        found: float | None = read_json(file)["dev_perplexity"]
        return found
