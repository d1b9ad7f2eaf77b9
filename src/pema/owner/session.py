"""A decoding session on a model in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pema.errors import DataError
from pema.owner.growing import Growing


class LocalSession:
    """See `contract.Session`."""

    def __init__(
        self, contexts: Growing, lengths: Sequence[int], *, max_length: int, vocabulary_size: int, device: torch.device
    ) -> None:
        self._contexts: Growing | None = contexts
        self._lengths = list(lengths)
        self._max_length, self._vocabulary_size = max_length, vocabulary_size
        self._device = device
        self._representations = self._run(contexts)

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's context as it stands, on the CPU."""
        return self._representations

    @property
    def held_bytes(self) -> int:
        """What the owner keeps for the session."""
        return 0 if self._contexts is None else self._contexts.held_bytes + self._representations.nbytes

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See `contract.Session.advance`."""
        if self._contexts is None:
            raise DataError("the session is closed: open another.")
        rows = range(len(self._lengths)) if parents is None else parents
        self._check(tokens, rows)
        chosen = torch.tensor(tokens, device=self._device)
        with torch.inference_mode():
            kept = None if parents is None or list(rows) == list(range(len(self._lengths))) else torch.tensor(rows)
            self._contexts.extend(chosen, None if kept is None else kept.to(self._device))
            self._lengths = [self._lengths[row] + 1 for row in rows]
            self._representations = self._run(self._contexts)

    def close(self) -> None:
        """See `contract.Session.close`."""
        self._contexts = None

    def _check(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        if not tokens or len(tokens) != len(rows):
            raise DataError(f"{len(tokens)} tokens for {len(rows)} rows: give one token per row, for at least one row.")
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            if not 0 <= row < len(self._lengths):
                raise DataError(f"row {i} continues row {row}, the session has {len(self._lengths)} rows.")
            if not 0 <= token < self._vocabulary_size:
                raise DataError(
                    f"row {i} is given token {token}, outside the vocabulary of {self._vocabulary_size} tokens."
                )
            if self._lengths[row] >= self._max_length:
                raise DataError(
                    f"row {i} has {self._lengths[row]} tokens and fills the PLM's context window: it cannot go on."
                )

    @torch.inference_mode()
    def _run(self, contexts: Growing) -> Tensor:
        f, _ = contexts.run(logits=False)
        # Kept on the owner's side for a client that asks again, so it must not be a view of what the model holds.
        return f.detach().cpu().clone()
