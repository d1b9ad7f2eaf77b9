"""Checks of what is requested of a PLM, the same for every engine: the messages name the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from pema.errors import DataError


def require_sequences(sequences: Sequence[Sequence[int]], starts: Sequence[int], max_length: int) -> None:
    """Refuse sequences of `teacher` contexts that are too long, or have no token in front of the target or in it."""
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        if len(sequence) > max_length:
            raise DataError(
                f"sequence {i} has {len(sequence)} tokens, the PLM's context window holds {max_length}: "
                "shorten or leave out that example."
            )
        if not 1 <= start < len(sequence):
            raise DataError(
                f"sequence {i} has {len(sequence)} tokens and its target starts at {start}: "
                "there must be a token in front of the target and one in it."
            )


def require_prompts(prompts: Sequence[Sequence[int]], steps: Sequence[int], max_length: int) -> None:
    """Refuse prompts of `predicted` contexts that are empty, have no step, or are too long with their steps."""
    for i, (prompt, count) in enumerate(zip(prompts, steps, strict=True)):
        if len(prompt) == 0:
            raise DataError(f"prompt {i} is empty: a context needs at least one token.")
        if count < 1:
            raise DataError(f"prompt {i} has {count} steps: request at least one.")
        if len(prompt) + count > max_length:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens and {count} steps, the PLM's context window holds "
                f"{max_length}: shorten the prompt or request fewer steps."
            )


def require_session(prompts: Sequence[Sequence[int]], max_length: int, vocabulary_size: int) -> None:
    """Refuse prompts that cannot begin a decoding session."""
    if not prompts:
        raise DataError("a decoding session needs at least one prompt.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {i} is empty: a context needs at least one token.")
        if len(prompt) >= max_length:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, the PLM's context window holds {max_length} with at "
                "least one to come: shorten it."
            )
        wrong = next((token for token in prompt if not 0 <= token < vocabulary_size), None)
        if wrong is not None:
            raise DataError(f"prompt {i} contains token {wrong}, outside the vocabulary of {vocabulary_size} tokens.")


def require_step(
    tokens: Sequence[int], rows: Sequence[int], lengths: Sequence[int], max_length: int, vocabulary_size: int
) -> None:
    """Refuse a step of a decoding session.

    Args:
        tokens: one token per new row.
        rows: the row that each continues.
        lengths: number of tokens of the current rows.
        max_length: maximum number of tokens of a context.
        vocabulary_size: number of tokens that exist.
    """
    if not tokens or len(tokens) != len(rows):
        raise DataError(f"{len(tokens)} tokens for {len(rows)} rows: give one token per row, for at least one row.")
    for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        if not 0 <= row < len(lengths):
            raise DataError(f"row {i} continues row {row}, the session has {len(lengths)} rows.")
        if not 0 <= token < vocabulary_size:
            raise DataError(f"row {i} is given token {token}, outside the vocabulary of {vocabulary_size} tokens.")
        if lengths[row] >= max_length:
            raise DataError(
                f"row {i} has {lengths[row]} tokens and fills the PLM's context window: it cannot continue."
            )
