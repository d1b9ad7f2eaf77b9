"""PEMA with the owners that people have, on descriptions of restaurants.

    python -m reproduction.experiments.owners WORK

SmolLM2-135M is adapted with its true representations (transformers), with the vectors of llama.cpp, and with what
llama.cpp's log-probabilities alone show. Gemma 3 270M behind an API with 20 log-probabilities is the closed model: as
it is, with five examples in the prompt, by the proxy SmolLM2-135M, with its true representations, and the proxy without
the API. WORK keeps the recovered head, memories and adapters. Results go to `reproduction/results/owners.jsonl`;
finished ones are kept. It needs the packaged PLMs `smollm2-135m` and `gemma3-270m`, xllamacpp and openai.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pema
from pema.evaluation.evaluate import evaluate
from pema.experiments.data import restaurant_data
from pema.generation.decoding import generate_counted
from pema.owner.client.connection import KEY
from pema.owner.contract import PLM
from pema.owner.llamacpp.process import Server, Settings, start
from pema.owner.openai_api.config import APIConfig
from pema.owner.openai_api.plm import ProxyPLM
from pema.owner.opening import open_plm
from pema.owner.sources.names import gguf_file
from pema.signature import signature
from reproduction.lines import put_run, read_runs
from reproduction.tables.owners import FILE, LABELS

SMALL, CLOSED = "smollm2-135m", "gemma3-270m"
TRAIN, DEV, TEST, SHOTS = 100, 20, 30, 5
WEIGHT = 0.9
"""Constant weight of the adapter in all mixtures."""

TEMPLATE = "Describe this restaurant in one or two sentences: \n{source}\nDescription:"
ENDING: dict[str, Any] = {"max_new_tokens": 64, "stop": ("\n",)}
QUERIES = 700
WINDOW, VOCABULARY = 2048, 262_144


class Bench:
    """The task, the data, and what is measured on them."""

    def __init__(self, work: Path) -> None:
        self.work, self._data = work, restaurant_data()
        self.task = replace(pema.get_task("data-to-text"), template=pema.Template(TEMPLATE, chat=False))

    def scores(self, plm: PLM, adapter: pema.Adapter | None = None, shots: int = 0) -> dict[str, float]:
        """Return the metrics of the test texts."""
        test, task = self._data.test[:TEST], self.task
        if shots:
            solved = [f"{TEMPLATE.replace('{source}', each.source)} {each.target}" for each in self._data.train[:shots]]
            template = pema.Template("\n\n".join([*solved, TEMPLATE]), chat=False)
            task = replace(task, template=template)
        schedule = None if adapter is None else pema.Constant(WEIGHT)
        sources = [each.source for each in test]
        written = generate_counted(plm, adapter, sources, task, schedule, **ENDING)
        references = [[each.target, *each.alternatives] for each in test]
        metrics = evaluate(self.task, written.texts, references, sources=sources, metrics=["bleu", "slot_errors"])
        return {name: score.value for name, score in metrics.items()}

    def adapted(self, name: str, plm: PLM, likelihoods: bool = True, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
        """Adapt a PLM and return its metrics, with the perplexity on dev if the PLM gives likelihoods."""
        folder = self.work / name
        memory = pema.build_memory(plm, self._data.train[:TRAIN], self.task, folder / "memory")
        adapter, figures = pema.train(memory, pema.preset("best", **changes), folder / "adapter", resume=True)
        result: dict[str, Any] = {"pairs": memory.pairs, "held_out": figures["held_out_cross_entropy"]}
        if likelihoods:
            dev = pema.build_memory(plm, self._data.dev[:DEV], self.task, folder / "dev")
            result["perplexity"] = pema.perplexity(dev.view(), plm.head(), adapter, pema.Constant(WEIGHT))
        return result | self.scores(plm, adapter)


SERVERS: list[Server] = []
"""Servers that were started: one ends with its last reference."""


def recovered(work: Path) -> PLM:
    """Return SmolLM2 with its log-probabilities alone; its server ends with this process."""
    about = open_plm(SMALL)
    file = gguf_file(SMALL)
    assert file is not None
    server = start(Settings.of(file[1], about.description.max_length, about.description.vocabulary_size))
    SERVERS.append(server)
    os.environ[KEY] = server.key
    if not (work / "head").exists():
        pema.recover_head(server.url, about.tokenizer, work / "head", queries=QUERIES)
    return open_plm(f"logprobs+{server.url}#{work / 'head'}")


def closed(work: Path) -> ProxyPLM:
    """Return Gemma behind an API with 20 log-probabilities, by proxy; its server ends with this process."""
    file = gguf_file(CLOSED)
    assert file is not None
    server = start(Settings.of(file[1], WINDOW, VOCABULARY))
    SERVERS.append(server)
    os.environ["CLOSED_KEY"] = server.key
    config = APIConfig(
        base_url=f"{server.url}/v1",
        model=CLOSED,
        tokenizer=CLOSED,
        proxy=SMALL,
        endpoint="completions",
        key="CLOSED_KEY",
        cache=work / "answers.sqlite",
    )
    return ProxyPLM(config, open_plm(SMALL))


def runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what each line of the tables measures."""
    api: list[ProxyPLM] = []

    def model() -> ProxyPLM:
        if not api:
            api.append(closed(bench.work))
        return api[0]

    measured: list[Callable[[], dict[str, Any]]] = [
        lambda: bench.scores(open_plm(SMALL)),
        lambda: bench.adapted("true", open_plm(SMALL)),
        lambda: bench.adapted("llamacpp", open_plm(f"llamacpp:{SMALL}")),
        lambda: bench.adapted("logprobs", recovered(bench.work)),
        lambda: bench.scores(model()),
        lambda: bench.scores(model(), shots=SHOTS),
        lambda: bench.adapted("closed-true", open_plm(CLOSED)),
        lambda: bench.adapted("proxy", model(), likelihoods=False),
        lambda: bench.adapted("proxy-own", model(), likelihoods=False, vocabulary="own"),
    ]
    return dict(zip(LABELS, measured, strict=True))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    for label, measure in runs(Bench(work)).items():
        if label in read_runs(FILE):
            continue
        counts = {"train": TRAIN, "dev": DEV, "test": TEST}
        put_run(FILE, label, measure() | {"signature": signature({"line": label, **counts}, 0)})
        gc.collect()  # ends the server of the last line
    SERVERS.clear()


if __name__ == "__main__":
    main()
