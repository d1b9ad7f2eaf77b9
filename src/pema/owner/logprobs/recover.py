"""Recovery of an LM head from log-probabilities: W' with W' z = logits up to a constant, for an unknown basis of z.

Of n contexts, the centred log-probabilities are a product U_d S_d V_d^T of rank d. With the singular vectors U_d of the
contexts, all rows of W' = V_d S_d / sqrt(n) are sums over the answers, a block of tokens at a time; z of the contexts
is sqrt(n) U_d. (arXiv 2403.06634)
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.console import keeping, note, progress
from pema.errors import ConfigError, OwnerError
from pema.files import clear, remove, seal, writing
from pema.owner.bundle import write_bundle
from pema.owner.client.connection import Connection
from pema.owner.head import Head
from pema.owner.llamacpp.material import RECOVERED
from pema.owner.llamacpp.probe import TOLERANCE, deviation_of
from pema.owner.llamacpp.recovery import Recovery, enough
from pema.owner.llamacpp.tokenisation import TEXTS, end_tokens, ordinary_tokens
from pema.owner.loading import tokenizer_fingerprint
from pema.owner.logprobs import spectrum
from pema.owner.logprobs.answers import Answers, random_contexts
from pema.owner.logprobs.api import LogProbAPI
from pema.owner.logprobs.config import RecoveryConfig
from pema.owner.logprobs.opening import open_api, read_tokenizer
from pema.owner.logprobs.spectrum import Spectrum
from pema.schema import known

BEND = 0.1
"""Largest share of the remainder that may be a curve of the logits; see `spectrum.bend`."""

NOISE = 1e-4
"""Deviation below which the remainder is rounding of float32, whatever its form."""

HELD_OUT = (*TEXTS[1:4], "The weather in the mountains changes", "Once upon a time, in a", "1, 2, 3, 4,")
"""Texts that the head is tested on."""

_SMALLEST, _GROWTH = 64, 1.25


@dataclass(frozen=True)
class Recovered:
    """A recovered head.

    Attributes:
        folder: its head bundle, with the tokenizer's files.
        model: name of the model at the API.
        vocabulary_size: number of tokens.
        d: width of a representation, as the spectrum shows it.
        gap: how many times larger singular value d is than the next.
        queries: number of requests that it took.
        deviation: root mean square deviation of W' z from the logits of texts, as a share of their standard deviation.
        largest_error: largest error of a log-probability of these texts.
        seconds: time of this run.
    """

    folder: str
    model: str
    vocabulary_size: int
    d: int
    gap: float
    queries: int
    deviation: float
    largest_error: float
    seconds: float


def recover_head(
    url: str,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    output: str | Path,
    *,
    connection: Connection | None = None,
    **settings: Any,  # noqa: ANN401
) -> Recovered:
    """Recover the LM head of a model from its log-probabilities, for APIs whose terms allow it.

    What was requested is kept in `output`.queries until the head is written: the same call continues.

    Args:
        url: address of a server of llama.cpp, or of an OpenAI-compatible one that returns the log-probabilities of all
            tokens (vLLM with `--max-logprobs -1`); `?model=NAME` chooses one of several models.
        tokenizer: the model's tokenizer, or where its files are: see `read_tokenizer`.
        output: folder for the head bundle and the tokenizer's files; `logprobs+URL#OUTPUT` is then the name of the PLM.
        connection: connection to the server; default: one to its address.
        settings: fields of `RecoveryConfig`.

    Raises:
        ConfigError: no number of queries is given, or it is too small to begin with; the message says how many are
            needed. Or `output` exists.
        OwnerError: the API returns too few log-probabilities, they are not linear in d numbers (a soft cap), or rounded
            so much that d cannot be seen.
        MismatchError: the API has another tokenizer, or the stored answers are of another model.
    """
    known(RecoveryConfig, settings)
    config = RecoveryConfig(**settings)
    _refuse_existing(Path(output))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = read_tokenizer(tokenizer)
    return recover_from(open_api(url, tokenizer, connection), tokenizer, Path(output), config)


def recover_from(
    api: LogProbAPI, tokenizer: PreTrainedTokenizerBase, output: Path, config: RecoveryConfig
) -> Recovered:
    """Recover the LM head of a model behind an open API; see `recover_head`."""
    _refuse_existing(output)
    began = time.monotonic()
    task = _Task(api, tokenizer, config, output)
    queries = task.require_possible()
    with keeping(f"what the API has answered is kept in {task.folder}: the same command continues after it"):
        return task.run(queries, began)


def _refuse_existing(output: Path) -> None:
    clear(output)
    if output.exists():
        raise ConfigError(f"{output} exists already: choose another folder for the recovered head.")


class _Task:
    """The recovery of one head."""

    def __init__(
        self, api: LogProbAPI, tokenizer: PreTrainedTokenizerBase, config: RecoveryConfig, output: Path
    ) -> None:
        self._api, self._tokenizer, self._config, self._output = api, tokenizer, config, output
        self._V = api.about.vocabulary_size or api.most
        self.folder = output.with_name(f"{output.name}.queries")
        self._test = [list(tokenizer(text).input_ids) for text in HELD_OUT]

    def require_possible(self) -> int:
        """Return the maximum number of queries, and say how many are needed; see `recover_head` for the refusals."""
        api, about, V = self._api, self._api.about, self._V
        if api.most < max(V, len(self._tokenizer) - len(self._tokenizer.added_tokens_decoder)):
            raise OwnerError(
                f"{api.where} returns the log-probabilities of the {api.most:,} likeliest tokens, and recovering an LM "
                f"head needs those of all {max(V, len(self._tokenizer)):,}: start vLLM with --max-logprobs -1, or use "
                "another way (docs/owners.md)."
            )
        if about.d is None:
            need = "1.1 d + 30 requests for a width of d (models of 1 to 10 billion weights have 2,048 to 4,096)"
        else:
            need = f"{self._first() + len(self._test):,} requests for its width of {about.d:,}"
        need = (
            f"the LM head of {about.model} needs about {need}, each for the log-probabilities of all {V:,} tokens "
            f"({V * api.entry_bytes / 1e6:,.1f} MB); twice as many where they are rounded to few digits"
        )
        if self._config.queries is None:
            most = self._first() + len(self._test) if about.d else 5000
            raise ConfigError(f"{need}. Nothing was requested: give the maximum number, such as queries={most}.")
        least = (self._first() if about.d else _SMALLEST) + len(self._test)
        if self._config.queries < least:
            raise ConfigError(f"{need}; queries={self._config.queries:,} is too few, nothing was requested.")
        note(f"{need}. At most {self._config.queries:,} are sent.")
        return self._config.queries - len(self._test)

    def run(self, queries: int, began: float) -> Recovered:
        """Request, recover, test and write the head."""
        about, tokenizer = self._api.about, self._tokenizer
        identity = {
            "model": f"{about.engine} {about.model}",
            "vocabulary size": self._V,
            "width": about.d,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "seed": self._config.seed,
        }
        answers = Answers(self.folder, identity)
        tested = len(self._test)
        ordinary = ordinary_tokens(tokenizer, end_tokens(tokenizer, []), self._V, self._V)
        contexts = [*self._test, *random_contexts(ordinary, tokenizer("").input_ids, queries, self._config.seed)]
        count = self._first() if about.d else _SMALLEST
        with progress("Recovering", None, "queries") as advance:
            advance(len(answers), earlier=True)
            while True:
                while len(answers) < tested + min(count, queries):
                    answers.add(self._all(contexts[len(answers)]))
                    advance(1)
                rows = range(tested, len(answers))

                def columns(start: int, stop: int, rows: Sequence[int] = rows) -> Tensor:
                    return answers.columns(rows, start, stop)

                found = Spectrum.of(columns, len(rows), self._V)
                d, gap = found.gap()
                if gap >= spectrum.SURE or len(rows) >= queries:
                    break
                count = int(len(rows) * _GROWTH) + 1
        bent = spectrum.bend(columns, found, d or spectrum.widest(len(rows)), self._V)
        self._require_gap(len(rows), d, gap, bent)
        head = Head(_rows(columns, found, d, self._V))
        deviation, largest = self._measure(head, answers, ordinary)
        self._require_accurate(deviation, bent, d)
        result = Recovered(
            folder=str(self._output),
            model=about.model,
            vocabulary_size=self._V,
            d=d,
            gap=gap,
            queries=len(answers),
            deviation=deviation,
            largest_error=largest,
            seconds=time.monotonic() - began,
        )
        self._write(head, result)
        return result

    def _first(self) -> int:
        """Return the number of contexts after which the gap of a known d is visible."""
        return int(1.1 * (self._api.about.d or 0)) + 24

    def _all(self, context: Sequence[int]) -> Tensor:
        """Request the log-probabilities of all tokens, (V,)."""
        tokens, values = self._api.likeliest([context], self._V, cached=False)
        if sorted(tokens[0].tolist()) != [*range(self._V)]:
            raise OwnerError(f"{self._api.where} answered with other tokens than 0 to {self._V - 1:,}, each once.")
        result = torch.empty(self._V, dtype=torch.float64)
        result[tokens[0]] = values[0]
        return result

    def _require_gap(self, n: int, d: int, gap: float, bent: float) -> None:
        if gap >= spectrum.LEAST:
            return
        if bent > BEND:
            raise self._capped(bent)
        raise OwnerError(
            f"the log-probabilities of {n:,} contexts do not show how many numbers a representation of "
            f"{self._api.about.model} has: the largest gap between singular values is {gap:.2f}, at least "
            f"{spectrum.LEAST} is needed. They are too few (d is at most {spectrum.widest(n):,} with so many), rounded "
            "to too few digits, or changed by the API. Give more queries (what was answered is kept), and run the "
            "engine in float32 if you can."
        )

    def _require_accurate(self, deviation: float, bent: float, d: int) -> None:
        if bent > BEND and deviation > NOISE:
            raise self._capped(bent)
        if deviation > TOLERANCE:
            raise OwnerError(
                f"the head of {d:,} numbers that was recovered from {self._api.where} differs from the "
                f"log-probabilities of texts by {deviation:.0%}, at most {TOLERANCE:.0%} is accepted: give more "
                "queries (what was answered is kept)."
            )

    def _capped(self, bent: float) -> OwnerError:
        return OwnerError(
            f"{self._api.about.model} has a soft cap on its logits, or the API bends them: {bent:.0%} of what a linear "
            "head leaves over is a curve of the logits. Such a head cannot be recovered from log-probabilities: use a "
            "model without one, or one whose owner gives representations (docs/owners.md)."
        )

    def _measure(self, head: Head, answers: Answers, ordinary: Sequence[int]) -> tuple[float, float]:
        """Recover z of the texts from some tokens, and compare W' z with the log-probabilities of all."""
        size = min(enough(head.d), len(ordinary))
        chosen = sorted(torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(1))[:size].tolist())
        tokens = [ordinary[place] for place in chosen]
        recovery = Recovery.solving(head, tokens, head.weight[tokens])
        if recovery is None:
            raise OwnerError(
                f"{len(tokens):,} ordinary tokens of {self._api.about.model} do not determine {head.d:,} numbers: its "
                "vocabulary is too small."
            )
        expected = answers.columns(range(len(self._test)), 0, self._V)
        logits = (recovery(expected[:, tokens]) @ head.weight.T).double()
        largest = (logits.log_softmax(dim=1) - expected.log_softmax(dim=1)).abs().max()
        return deviation_of(logits, expected), float(largest)

    def _write(self, head: Head, result: Recovered) -> None:
        with writing(self._output) as new:
            write_bundle(head.state_dict(), head.settings, head.fingerprint, new)
            self._tokenizer.save_pretrained(new)
            (new / RECOVERED).write_text(json.dumps(seal(asdict(result)), indent=2) + "\n", encoding="utf-8")
        with contextlib.suppress(OSError):
            remove(self.folder)


def _rows(columns: spectrum.Columns, found: Spectrum, d: int, V: int) -> Tensor:
    """Return W', (V, d) float32, in the basis in which the numbers of f are uncorrelated and around 1."""
    basis = found.vectors[:, :d] * len(found.values) ** -0.5
    weight = torch.empty(V, d)
    for start in range(0, V, spectrum.BLOCK):
        stop = min(start + spectrum.BLOCK, V)
        weight[start:stop] = columns(start, stop).T @ basis
    return weight
