"""Decoding sessions on a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pema.errors import DataError
from pema.owner.contract import Session
from pema.owner.local.growing import CachedContexts, GrowingContexts
from pema.owner.local.running import Runner
from pema.owner.requests import require_step


class LocalSession:
    """A decoding session on a model in this process; see `contract.Session`."""

    def __init__(
        self,
        contexts: GrowingContexts,
        lengths: Sequence[int],
        *,
        max_length: int,
        vocabulary_size: int,
        device: torch.device,
    ) -> None:
        self._contexts: GrowingContexts | None = contexts
        self._lengths = list(lengths)
        self._max_length, self._vocabulary_size = max_length, vocabulary_size
        self._device = device
        self._representations = self._run(contexts)

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's current context, on the CPU."""
        return self._representations

    @property
    def held_bytes(self) -> int:
        """Bytes that the owner keeps for the session."""
        return 0 if self._contexts is None else self._contexts.held_bytes + self._representations.nbytes

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Advance the session; see `contract.Session.advance`."""
        contexts = self._extend(tokens, parents)
        self._representations = self._run(contexts)

    def _extend(self, tokens: Sequence[int], parents: Sequence[int] | None) -> GrowingContexts:
        if self._contexts is None:
            raise DataError("the session is closed: open another.")
        rows = range(len(self._lengths)) if parents is None else parents
        require_step(tokens, rows, self._lengths, self._max_length, self._vocabulary_size)
        chosen = torch.tensor(tokens, device=self._device)
        kept = None if parents is None or list(rows) == list(range(len(self._lengths))) else torch.tensor(rows)
        with torch.inference_mode():
            self._contexts.extend(chosen, None if kept is None else kept.to(self._device))
        self._lengths = [self._lengths[row] + 1 for row in rows]
        return self._contexts

    def close(self) -> None:
        """Close the session; see `contract.Session.close`."""
        self._contexts = None

    @torch.inference_mode()
    def _run(self, contexts: GrowingContexts) -> Tensor:
        f, _ = contexts.run(logits=False)
        # Kept on the owner's side for repeated requests, so it must not be a view of the model's state.
        return f.detach().cpu().clone()


@dataclass(frozen=True)
class Step:
    """A step of a session: the arguments of its `advance`."""

    session: Session
    tokens: Sequence[int]
    parents: Sequence[int] | None = None


@torch.inference_mode()
def advance_together(steps: Sequence[Step]) -> None:
    """Advance several sessions of one PLM, in one forward pass if their caches can be joined.

    The representations of a session do not depend on the others: in float32 they agree to rounding with those of a
    separate step. After an error every session may be inconsistent, so all of them must be closed.

    Raises:
        DataError: a session refuses its step.
    """
    joined: dict[tuple[Runner, bytes], list[tuple[LocalSession, CachedContexts]]] = {}
    for step in steps:
        # A wrapper around a local session (the mask) changes its output, not how it advances.
        session = getattr(step.session, "inner", step.session)
        if not isinstance(session, LocalSession):
            step.session.advance(step.tokens, step.parents)
            continue
        contexts = session._extend(step.tokens, step.parents)
        part = contexts.joinable()
        if part is not None:
            joined.setdefault((part.runner, part.encoding), []).append((session, part))
        else:
            session._representations = session._run(contexts)
    for pairs in joined.values():
        if len(pairs) == 1:
            session, part = pairs[0]
            session._representations = session._run(part)
            continue
        results = CachedContexts.run_together([part for _, part in pairs])
        for (session, _), f in zip(pairs, results, strict=True):
            session._representations = f.cpu().clone()
