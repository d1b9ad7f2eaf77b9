"""Adapters of SmolLM2-135M from log-probabilities that are rounded, and from those of its likeliest k tokens only.

    python -m reproduction.experiments.rounding WORK

llama.cpp's server gives the log-probabilities of SmolLM2-135M (Q4_1), each once; WORK keeps them. They are rounded and
truncated here, as an API may do it: the LM head is recovered from the rounded ones, f of each context from those of
chosen or of the likeliest tokens, and an adapter is trained on these f, beside one on the vectors of transformers.
Results go to `reproduction/results/rounding.jsonl`; finished ones are kept. It needs the packaged PLM `smollm2-135m`
and xllamacpp.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pema
from pema.experiments.data import restaurant_data
from pema.files import digest
from pema.owner.client.connection import KEY
from pema.owner.contract import PLM
from pema.owner.head import Head
from pema.owner.llamacpp.probe import LIKELIEST, deviation_of
from pema.owner.llamacpp.process import Settings, start
from pema.owner.logprobs.api import About, LogProbAPI, TopK
from pema.owner.logprobs.config import RecoveryConfig
from pema.owner.logprobs.opening import open_api
from pema.owner.logprobs.plm import LogProbPLM
from pema.owner.logprobs.recover import recover_from
from pema.owner.opening import open_plm
from pema.owner.sources.names import gguf_file
from pema.signature import signature
from reproduction.experiments.log_probabilities import ROUND
from reproduction.experiments.owners import DEV, SMALL, TEMPLATE, TRAIN, WEIGHT
from reproduction.lines import put_run, read_runs
from reproduction.tables.rounding import EXACT, FILE, LINES, TRUE, label

SEEDS = 3
"""Trainings of a line; of one of the likeliest k tokens the first of them, which has the same random numbers."""

QUERIES = 1158
"""Maximum number of requests of a recovery: 2 d + 6."""


class Recorded:
    """The answers of llama.cpp's server, each requested once and kept in a file."""

    def __init__(self, file: Path, plm: PLM) -> None:
        about = plm.description
        self.about = About("llama.cpp", SMALL, about.vocabulary_size, about.d, about.max_length)
        self._tokenizer = plm.tokenizer
        self._kept = sqlite3.connect(file, isolation_level=None)
        self._kept.execute("PRAGMA synchronous = OFF")
        self._kept.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, tokens BLOB, given BLOB)")

    def likeliest(self, context: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Return the likeliest next tokens and their log-probabilities, (count,)."""
        V = self.about.vocabulary_size or 0
        size = LIKELIEST if count <= LIKELIEST else V

        def ask() -> tuple[Tensor, Tensor]:
            tokens, values = self._server.likeliest([context], size, cached=True)
            return tokens[0], values[0]

        tokens, values = self._once({"likeliest": size, "context": list(context)}, ask)
        return tokens[:count], values[:count]

    def chosen(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Return the log-probabilities of chosen next tokens up to a constant, (k,)."""

        def ask() -> tuple[Tensor, Tensor]:
            values = self._server.chosen([context], tokens, cached=True)
            assert values is not None
            return torch.tensor(tokens), values[0]

        return self._once({"chosen": list(tokens), "context": list(context)}, ask)[1]

    @cached_property
    def _server(self) -> LogProbAPI:
        """The server, which ends with this object; it is started for the first answer that is missing."""
        file = gguf_file(SMALL)
        assert file is not None
        assert self.about.context is not None
        assert self.about.vocabulary_size is not None
        process = start(Settings.of(file[1], self.about.context, self.about.vocabulary_size))
        weakref.finalize(self, process.stop)
        os.environ[KEY] = process.key
        return open_api(process.url, self._tokenizer)

    def _once(self, request: dict[str, Any], ask: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        key = digest(request)
        row = self._kept.execute("SELECT tokens, given FROM answers WHERE request = ?", [key]).fetchone()
        if row is None:
            tokens, values = ask()
            row = (tokens.int().numpy().tobytes(), values.float().numpy().tobytes())
            self._kept.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", [key, *row])
        tokens, values = (
            torch.frombuffer(bytearray(blob), dtype=dtype)
            for blob, dtype in zip(row, (torch.int32, torch.float32), strict=True)
        )
        return tokens.long(), values


@dataclass(frozen=True)
class Chosen:
    """An API that rounds, and gives the log-probabilities of chosen tokens; see `pema.owner.logprobs.api.LogProbAPI`.

    Attributes:
        recorded: the answers.
        rounding: how they are rounded, a name in `ROUND`.
        most: maximum number of log-probabilities of a position.
    """

    recorded: Recorded
    rounding: str
    most: int
    where: str = "the record"
    entry_bytes: int = 96

    @property
    def about(self) -> About:
        """What the server says of its model."""
        return self.recorded.about

    def tokens(self, text: str) -> None:
        """See `LogProbAPI.tokens`."""

    def chat(self, messages: Sequence[dict[str, str]]) -> None:
        """See `LogProbAPI.chat`."""

    def likeliest(self, contexts: Sequence[Sequence[int]], count: int, *, cached: bool) -> TopK:
        """See `LogProbAPI.likeliest`."""
        rows = [self.recorded.likeliest(context, count) for context in contexts]
        return TopK(torch.stack([tokens for tokens, _ in rows]), self._rounded([values for _, values in rows]))

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> Tensor | None:
        """See `LogProbAPI.chosen`."""
        return self._rounded([self.recorded.chosen(context, tokens) for context in contexts])

    def _rounded(self, rows: list[Tensor]) -> Tensor:
        return ROUND[self.rounding](torch.stack(rows)).double()


class Likeliest(Chosen):
    """An API that rounds, and gives the log-probabilities of the likeliest tokens, at most `most`."""

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> None:
        """See `LogProbAPI.chosen`."""

    def along(self, tokens: Sequence[int], start: int, count: int) -> TopK:
        """See `ReadsSequences.along`."""
        return self.likeliest([tokens[:end] for end in range(start, len(tokens) + 1)], count, cached=True)


def adapted(plm: PLM, folder: Path, seeds: int) -> tuple[dict[str, Any], tuple[Head, Tensor]]:
    """Adapt a PLM with some seeds; return the figures, and its head with f of the dev contexts."""
    data, task = restaurant_data(), replace(pema.get_task("data-to-text"), template=pema.Template(TEMPLATE, chat=False))
    memory = pema.build_memory(plm, data.train[:TRAIN], task, folder / "memory", contexts="teacher")
    dev = pema.build_memory(plm, data.dev[:DEV], task, folder / "dev", contexts="teacher", dtype="float32")
    head, perplexities = plm.head(), []
    for seed in range(seeds):
        adapter, _ = pema.train(memory, pema.preset("best", seed=seed), folder / f"adapter-{seed}", resume=True)
        perplexities.append(pema.perplexity(dev.view(), head, adapter, pema.Constant(WEIGHT)))
    f = torch.cat([batch.representations.clone() for batch in dev.view().batches(512)])
    figures = {"pairs": memory.pairs, "dev_pairs": dev.pairs, "perplexities": perplexities}
    return figures | {"alone": pema.perplexity(dev.view(), head)}, (head, f)


def deviation(given: tuple[Head, Tensor], true: tuple[Head, Tensor]) -> float:
    """Return how much head(f) differs from the exact logits of the same contexts, as a share of their deviation."""
    parts = zip(*(torch.split(f, 64) for _, f in (given, true)), strict=True)
    logits = [(given[0](one.float()), true[0](other.float())) for one, other in parts]
    return deviation_of(*(torch.cat(side).double() for side in zip(*logits, strict=True)))


def recovered(recorded: Recorded, rounding: str, plm: PLM, work: Path) -> Head:
    """Return the head that is recovered from rounded log-probabilities, once."""
    V = plm.description.vocabulary_size
    folder = work / f"head {rounding}"
    if not folder.exists():
        about = asdict(
            recover_from(Chosen(recorded, rounding, V), plm.tokenizer, folder, RecoveryConfig(queries=QUERIES))
        )
        names = ("d", "gap", "queries", "deviation", "largest_error")
        signed = signature({"recovery": rounding, "plm": SMALL}, 0)
        put_run(FILE, rounding, {name: about[name] for name in names} | {"signature": signed})
    return Head.load(folder)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    plm = open_plm(SMALL)
    V, tokenizer = plm.description.vocabulary_size, plm.tokenizer
    recorded = Recorded(work / "answers.sqlite", plm)

    def opened(rounding: str, k: int | None) -> PLM:
        head = recovered(recorded, rounding, plm, work)
        if k is None:
            return LogProbPLM(SMALL, head, tokenizer, Chosen(recorded, rounding, V))
        return LogProbPLM(SMALL, head, tokenizer, Likeliest(recorded, rounding, k))

    exact: dict[bool, tuple[Head, Tensor]] = {}
    for rounding, k in LINES:
        name, likeliest = label(rounding, k), k is not None
        done = name in read_runs(FILE)
        if done and likeliest in exact:
            continue
        each = plm if rounding == TRUE else opened(rounding, k)
        figures, given = adapted(each, work / name, 1 if likeliest else SEEDS)
        # What the server answers depends a little on the requests before it: each way has its own exact line.
        reference = exact.setdefault(likeliest, given) if rounding == EXACT else exact[likeliest]
        if not done:
            figures["deviation"] = deviation(given, exact[False] if given is reference else reference)
            counts = {"line": name, "train": TRAIN, "dev": DEV, "plm": SMALL}
            put_run(FILE, name, figures | {"signature": signature(counts, 0)})


if __name__ == "__main__":
    main()
