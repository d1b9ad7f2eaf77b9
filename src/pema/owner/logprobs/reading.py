"""f of a context from its log-probabilities: of fixed chosen tokens if the API returns these, else of the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pema.console import note
from pema.errors import OwnerError
from pema.owner.head import Head
from pema.owner.llamacpp.recovery import Recovery, enough
from pema.owner.logprobs.api import LogProbAPI, ReadsSequences, TopK


def require_enough(api: LogProbAPI, head: Head, name: str) -> None:
    """Refuse what does not determine f, and say so if it does only while nothing is rounded; nothing is requested.

    Args:
        api: the API.
        head: the LM head.
        name: name of the head, for messages.

    Raises:
        OwnerError: the logits have a soft cap, or the API returns too few log-probabilities.
    """
    if head.soft_cap is not None:
        raise OwnerError(
            f"{name} has a soft cap on its logits, so f cannot be recovered from log-probabilities: use an owner that "
            "gives representations (docs/owners.md)."
        )
    if api.most <= head.d + 1 or head.vocabulary_size <= head.d + 1:
        raise OwnerError(
            f"{api.where} returns the log-probabilities of {api.most:,} tokens, and those of {head.d + 2:,} or more "
            f"determine the {head.d:,} numbers of f: start vLLM with --max-logprobs -1, or use another way "
            "(docs/owners.md)."
        )
    if api.most < min(enough(head.d), head.vocabulary_size):
        note(
            f"{api.where} returns the log-probabilities of {api.most:,} tokens: they determine the {head.d:,} numbers "
            f"of f, and enlarge the rounding of log-probabilities; {enough(head.d):,} or more do not (vLLM: "
            f"--max-logprobs {enough(head.d)})."
        )


class Reading:
    """Recovers f through an API.

    Attributes:
        count: number of log-probabilities of a position.
    """

    def __init__(self, api: LogProbAPI, head: Head, ordinary: Sequence[int]) -> None:
        """Choose the tokens.

        Args:
            api: the API.
            head: the LM head.
            ordinary: tokens that are complete texts, at most `enough(head.d)` of them.
        """
        self._api, self._head = api, head
        self.count = min(enough(head.d), api.most, head.vocabulary_size)
        self._chosen = None
        if not isinstance(api, ReadsSequences):
            tokens = list(ordinary)
            self._chosen = Recovery.solving(head, tokens, head.weight[tokens].float())

    def last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        """Return f of each context, (rows, d) float32."""
        if self._chosen is not None:
            values = self._api.chosen(contexts, self._chosen.tokens, cached=cached)
            if values is not None:
                return self._chosen(values)
        return self._solve(self._api.likeliest(contexts, self.count, cached=cached))

    def along(self, tokens: Sequence[int], start: int) -> Tensor | None:
        """Return f of tokens[:start], ..., tokens, (n, d) float32; None if that takes a request for each."""
        api = self._api
        return self._solve(api.along(tokens, start, self.count)) if isinstance(api, ReadsSequences) else None

    def _solve(self, given: TopK) -> Tensor:
        """Solve a system for each position: least squares against the rows of W_hd of its likeliest tokens."""
        head = self._head
        if int(given.tokens.max()) >= head.vocabulary_size:
            raise OwnerError(
                f"{self._api.where} answered with token {int(given.tokens.max())}, outside the vocabulary of "
                f"{head.vocabulary_size} tokens."
            )
        rows = []
        for tokens, values in zip(given.tokens, given.values, strict=True):
            system = torch.cat([head.scale * head.weight[tokens].float(), -torch.ones(len(tokens), 1)], dim=1).double()
            offset = 0.0 if head.bias is None else head.scale * head.bias[tokens].double()
            rows.append(torch.linalg.lstsq(system, (values - offset)[:, None]).solution[: head.d, 0])
        return torch.stack(rows).float()
