"""The proxy's representations of texts that grow, with a decoding session for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pema.owner.contract import PLM, Session
from pema.owner.local.session import Step, advance_together
from pema.owner.openai_api.reading import Reading


@dataclass
class _Followed:
    """A text: the session that reads it, and the proxy's tokens that it has read."""

    session: Session
    tokens: tuple[int, ...]


class TextFollower:
    """The representations of texts that are written token by token; see `contract.Follower`.

    While the proxy's tokens of a text only grow, each is read once, in one pass for all texts. A text whose last tokens
    become others (a word that two of the API's tokens make) is read anew.
    """

    def __init__(self, proxy: PLM, reading: Reading, prompts: Sequence[Sequence[int]]) -> None:
        self._proxy, self._reading = proxy, reading
        self._prompts = [reading.prompt(prompt) for prompt in prompts]
        self._texts: dict[int, _Followed] = {}

    def reach(self, written: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Read the texts up to what was written; see `contract.Follower.reach`."""
        for ended in self._texts.keys() - written.keys():
            self._texts.pop(ended).session.close()
        window, tokens = self._proxy.description.max_length, self._reading.written(list(written.values()))
        contexts = {n: self._prompts[n] + each for n, each in zip(written, tokens, strict=True)}
        contexts = {n: context for n, context in contexts.items() if len(context) < window}
        for n, context in contexts.items():
            text = self._texts.get(n)
            if text is not None and context[: len(text.tokens)] == text.tokens:
                continue
            if text is not None:
                text.session.close()
            self._texts[n] = _Followed(self._proxy.open_session([context]), context)
        texts = {n: self._texts[n] for n in contexts}
        while behind := [n for n, text in texts.items() if len(text.tokens) < len(contexts[n])]:
            nexts = {n: contexts[n][len(texts[n].tokens)] for n in behind}
            advance_together([Step(texts[n].session, [token]) for n, token in nexts.items()])
            for n, token in nexts.items():
                texts[n].tokens += (token,)
        return {n: text.session.representations[0] for n, text in texts.items()}

    def close(self) -> None:
        """Close all sessions; further calls do nothing."""
        while self._texts:
            self._texts.popitem()[1].session.close()
