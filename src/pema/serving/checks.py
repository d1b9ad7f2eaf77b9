"""Checks of requests against the PLM and the limits, before they wait: no request can spoil the batch of another."""

from __future__ import annotations

from collections.abc import Sequence

from pema.owner.contract import STEP_BUCKET, PLMDescription
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal


class Checks:
    """The limits of one PLM on one server.

    Attributes:
        window: maximum tokens of a context.
    """

    def __init__(self, description: PLMDescription, limits: Limits) -> None:
        self._vocabulary = description.vocabulary_size
        self._limits = limits
        most = description.max_length if limits.sequence_tokens is None else limits.sequence_tokens
        # A context that fills the window must fit into a request of its own.
        self.window = min(description.max_length, most, limits.batch_tokens)

    def represent(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> int:
        """Check a represent request, and return its number of tokens.

        Raises:
            Refusal: 422, the PLM cannot answer it; 413, it is too much at a time.
        """
        _same_length("sequences", sequences, "starts", starts)
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if not 1 <= start < len(sequence):
                raise _invalid(
                    f"sequences[{i}] has {len(sequence)} tokens and starts[{i}] is {start}.",
                    "At least one token must precede the target, and one be in it.",
                )
            self._fits(f"sequences[{i}]", len(sequence))
        return self._all("sequences", sequences, 0)

    def predict(self, prompts: Sequence[Sequence[int]], steps: Sequence[int]) -> int:
        """Check a predict request, and return its number of tokens, steps included.

        Raises:
            Refusal: 422, the PLM cannot answer it; 413, it is too much at a time.
        """
        _same_length("prompts", prompts, "steps", steps)
        for i, (prompt, count) in enumerate(zip(prompts, steps, strict=True)):
            if not prompt or count < 1:
                raise _invalid(
                    f"prompts[{i}] has {len(prompt)} tokens and steps[{i}] is {count}.", "Both must be at least 1."
                )
            self._fits(f"prompts[{i}] with its steps", len(prompt) + count)
            if count % STEP_BUCKET and len(prompt) + count != self.window:
                raise Refusal(
                    422,
                    "steps_not_padded",
                    f"steps[{i}] is {count}: an exact number would reveal the length of a target.",
                    f"Round up to a multiple of {STEP_BUCKET}, or fill the context of {self.window} tokens.",
                )
        return self._all("prompts", prompts, sum(steps))

    def prompts(self, prompts: Sequence[Sequence[int]]) -> int:
        """Check the prompts of a new session, and return their number of tokens.

        Raises:
            Refusal: 422, the PLM cannot start with them; 413, they are too many.
        """
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise _invalid(f"prompts[{i}] is empty.", "A context needs at least one token.")
            self._fits(f"prompts[{i}] with one more token", len(prompt) + 1)
        self.rows(len(prompts))
        padded = len(prompts) * max(map(len, prompts))
        if padded > self._limits.batch_tokens:
            raise _too_much(
                f"The prompts have {padded} tokens, padded to the longest; {self._limits.batch_tokens} are allowed."
            )
        return self._all("prompts", prompts, 0)

    def step(self, tokens: Sequence[int], parents: Sequence[int] | None, lengths: Sequence[int]) -> list[int]:
        """Check a step of a session whose contexts have these lengths, and return the lengths after it.

        Raises:
            Refusal: 422, a token or a row does not exist, or a context is full; 413, too many rows.
        """
        rows = len(lengths)
        if parents is None and len(tokens) != rows:
            raise _invalid(
                f"tokens has {len(tokens)} entries, the session {rows} rows.", "Give one per row, or parents."
            )
        if parents is not None:
            _same_length("tokens", tokens, "parents", parents)
            if max(parents) >= rows:
                raise _invalid(f"parents names row {max(parents)}, the session has {rows}.", "Count rows from 0.")
        self.rows(len(tokens))
        self._known("tokens", tokens)
        after = [lengths[parent] + 1 for parent in (range(rows) if parents is None else parents)]
        self._fits(f"row {after.index(max(after))}", max(after))
        return after

    def rows(self, count: int) -> None:
        """Check the number of rows of a session.

        Raises:
            Refusal: 413, too many.
        """
        if count > self._limits.session_rows:
            raise _too_much(f"The session would have {count} rows, {self._limits.session_rows} are allowed.")

    def _fits(self, what: str, length: int) -> None:
        if length > self.window:
            raise Refusal(
                422,
                "too_long",
                f"{what} has {length} tokens, the maximum of a context is {self.window}.",
                "Shorten it.",
            )

    def _all(self, what: str, sequences: Sequence[Sequence[int]], steps: int) -> int:
        if len(sequences) > self._limits.batch_sequences:
            raise _too_much(f"{len(sequences)} {what} are sent, {self._limits.batch_sequences} are allowed.")
        total = sum(map(len, sequences)) + steps
        if total > self._limits.batch_tokens:
            raise _too_much(f"{total} tokens are requested, {self._limits.batch_tokens} are allowed.")
        for i, sequence in enumerate(sequences):
            self._known(f"{what}[{i}]", sequence)
        return total

    def _known(self, what: str, tokens: Sequence[int]) -> None:
        worst = max(tokens)
        if worst >= self._vocabulary:
            raise Refusal(
                422,
                "unknown_token",
                f"{what} contains token {worst}, the vocabulary ends at {self._vocabulary - 1}.",
                "Use the tokenizer of this PLM (GET /v1/tokenizer).",
            )


def _same_length(one: str, values: Sequence[object], other: str, others: Sequence[object]) -> None:
    if len(values) != len(others):
        raise _invalid(f"{one} has {len(values)} entries, {other} {len(others)}.", "Give one for each.")


def _invalid(message: str, remedy: str) -> Refusal:
    return Refusal(422, "invalid", message, remedy)


def _too_much(message: str) -> Refusal:
    return Refusal(413, "too_much", message, "Send fewer per request; GET /v1/plm shows the limits.")
