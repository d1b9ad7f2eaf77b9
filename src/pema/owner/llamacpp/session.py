"""A decoding session on llama.cpp's server, which keeps the state of the contexts that it has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pema.errors import DataError
from pema.owner.contract import PLMDescription
from pema.owner.requests import require_step

Read = Callable[[Sequence[Sequence[int]], bool], Tensor]
"""Returns (rows, d), f of each context; the second argument says whether the engine may use the state that it keeps."""


class LlamaCppSession:
    """A decoding session; see `contract.Session`.

    Every step sends the whole contexts: the server finds what it has seen of them, and computes the rest.
    """

    def __init__(self, read: Read, prompts: Sequence[Sequence[int]], description: PLMDescription) -> None:
        self._read, self._description = read, description
        self._contexts: list[list[int]] | None = [list(prompt) for prompt in prompts]
        # States of requests for vectors may lie in the server's memory, which a completion must not continue.
        self._representations = read(self._contexts, False)

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's current context, on the CPU."""
        return self._representations

    @property
    def held_bytes(self) -> int:
        """Bytes kept on this side; those of the server are unknown."""
        return 0 if self._contexts is None else self._representations.nbytes + 8 * sum(map(len, self._contexts))

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Advance the session; see `contract.Session.advance`."""
        if self._contexts is None:
            raise DataError("the session is closed: open another.")
        rows = range(len(self._contexts)) if parents is None else parents
        lengths, about = [len(context) for context in self._contexts], self._description
        require_step(tokens, rows, lengths, about.max_length, about.vocabulary_size)
        contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._representations = self._read(contexts, True)
        self._contexts = contexts

    def close(self) -> None:
        """Close the session; see `contract.Session.close`. The server forgets its state when it needs the place."""
        self._contexts = None
