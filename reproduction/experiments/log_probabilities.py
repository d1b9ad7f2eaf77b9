"""Recovery of the embedded PLM's LM head from log-probabilities: what rounding and the number of likeliest tokens do.

    python -m reproduction.experiments.log_probabilities

The PLM answers in this process, in float32, as an API would, and its log-probabilities are rounded. At most 2 d + 6
requests are allowed. f of the texts on which the head is tested is then solved from their k likeliest tokens. Results
go to `reproduction/results/log_probabilities.jsonl`; finished ones are kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.contract import PLM
from pema.owner.head import Head
from pema.owner.llamacpp.probe import deviation_of
from pema.owner.logprobs.api import About, TopK
from pema.owner.logprobs.config import RecoveryConfig
from pema.owner.logprobs.reading import Reading
from pema.owner.logprobs.recover import HELD_OUT, recover_from
from pema.owner.opening import open_plm
from pema.signature import signature
from reproduction.lines import put_run, read_runs
from reproduction.tables.log_probabilities import FILE, ROUNDINGS

ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda values: values,
    "4 decimals": lambda values: (values * 1e4).round() / 1e4,
    "2 decimals": lambda values: (values * 1e2).round() / 1e2,
    "1 decimal": lambda values: (values * 10).round() / 10,
    "bfloat16": lambda values: values.bfloat16().float(),
}


@dataclass
class InProcess:
    """A PLM in this process that answers as an API; see `pema.owner.logprobs.api.LogProbAPI`.

    Attributes:
        plm: the PLM.
        rounded: what is done to its log-probabilities.
        most: maximum number of log-probabilities of a position.
    """

    plm: PLM
    rounded: Callable[[Tensor], Tensor]
    most: int
    where: str = "this process"
    entry_bytes: int = 4
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def about(self) -> About:
        """What is known of the PLM; d has to be found out."""
        about = self.plm.description
        return About("in process", about.name, about.vocabulary_size, None, about.max_length)

    def tokens(self, text: str) -> None:
        """See `LogProbAPI.tokens`."""

    def chat(self, messages: Sequence[dict[str, str]]) -> None:
        """See `LogProbAPI.chat`."""

    def likeliest(self, contexts: Sequence[Sequence[int]], count: int, *, cached: bool) -> TopK:
        """See `LogProbAPI.likeliest`."""
        values, tokens = torch.stack([self._all(context) for context in contexts]).topk(count)
        return TopK(tokens, values.double())

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> None:
        """See `LogProbAPI.chosen`."""

    def along(self, tokens: Sequence[int], start: int, count: int) -> TopK:
        """See `ReadsSequences.along`."""
        return self.likeliest([tokens[:end] for end in range(start, len(tokens) + 1)], count, cached=False)

    def _all(self, context: Sequence[int]) -> Tensor:
        key = tuple(context)
        if key not in self._known:
            (result,) = self.plm.represent([[*context, 0]], [len(context)])
            self._known[key] = self.plm.head().float()(result.representations.float())[0].log_softmax(0)
        return self.rounded(self._known[key])


def recovery(api: InProcess, tokenizer: PreTrainedTokenizerBase, output: Path, queries: int) -> dict[str, Any]:
    """Recover the head, and return the figures of the recovery; or how it was refused."""
    try:
        recovered = recover_from(api, tokenizer, output, RecoveryConfig(queries=queries))
    except OwnerError as error:
        return {"refused": str(error)}
    names = ("d", "gap", "queries", "deviation", "largest_error")
    return {name: value for name, value in asdict(recovered).items() if name in names}


def deviation(api: InProcess, head: Head, texts: Sequence[Sequence[int]]) -> float:
    """Return the deviation of head(f) from the true logits of texts, with f from their likeliest tokens."""
    f = Reading(api, head, []).last(texts, False)
    return deviation_of(head(f), torch.stack([api._all(text) for text in texts]))


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    plm = open_plm("embedded", dtype="float32")
    tokenizer, d, V = plm.tokenizer, plm.description.d, plm.description.vocabulary_size
    texts = [list(tokenizer(text).input_ids) for text in HELD_OUT]
    known: dict[tuple[int, ...], Tensor] = {}
    for name in ROUNDINGS:
        if name in read_runs(FILE):
            continue
        api = InProcess(plm, ROUND[name], V, _known=known)
        with tempfile.TemporaryDirectory() as folder:
            result = recovery(api, tokenizer, Path(folder) / "head", 2 * d + len(texts))
            likeliest = {}
            if "refused" not in result:
                head = Head.load(Path(folder) / "head")
                for k in (d + 2, int(1.1 * d), int(1.25 * d), int(1.5 * (d + 1)) + 1):
                    likeliest[str(k)] = deviation(InProcess(plm, ROUND[name], k, _known=known), head, texts)
        signed = signature({"rounding": name, "plm": plm.description.name}, 0)
        put_run(FILE, name, result | {"likeliest": likeliest, "signature": signed})


if __name__ == "__main__":
    main()
