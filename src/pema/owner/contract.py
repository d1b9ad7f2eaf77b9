# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""The boundary between the PLM owner and the data owner: the only view of a PLM for the rest of the package.

A PLM can describe itself, return its head, represent contexts, and open a decoding session. All other packages use
this type only, so a model in the process and one across a network are used in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pema.errors import ConfigError, MismatchError
from pema.schema import check, from_json, option, short

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from pema.owner.head import Head

Tap = Literal["head_input", "norm_input"]
"""Location of f(c): the input of the LM head (default), or the input of the final norm."""

Contexts = Literal["teacher", "predicted"]
"""Tokens after the prompt in a context: the target's prefix, or the text that the PLM generated greedily."""

STEP_BUCKET = 8
"""`predicted` contexts are requested in multiples of this many steps, so that target lengths are not revealed."""


BATCH_TOKENS = 8192
"""Default for the maximum tokens of a PLM batch."""

ACCELERATOR_TOKENS = 65536
"""The same on an accelerator, whose products are fast only if they are large."""

BESIDE_API = "an API beside "
"""Beginning of the architecture of a PLM that consists of an API and a proxy."""


def padded(steps: int, bucket: int = STEP_BUCKET) -> int:
    """Round `steps` up to a multiple of `bucket`."""
    return -(-steps // bucket) * bucket


@dataclass(frozen=True)
class PLMDescription:
    """The description of a PLM, stored in every memory and adapter made with it.

    Attributes:
        name: hub name or folder name that it was loaded from (never an absolute path).
        architecture: class name of the transformers model.
        fingerprint: SHA-256 of the weights and the configuration; equal for two PLMs with equal outputs.
        tokenizer_fingerprint: SHA-256 of the tokenizer's vocabulary, merges and special tokens.
        head_fingerprint: SHA-256 of the head bundle.
        d: width of the head's input.
        d_tap: width of a representation at the tap (d, unless a projection lies between).
        vocabulary_size: rows of W_hd.
        tap: where representations are read.
        max_length: maximum number of tokens of a context.
        eos_token_ids: tokens that end a sequence.
        parameters: number of weights.
        weights: how the weights were quantised, and what they were widened to; empty if they were not.
        earlier: fingerprints of this PLM in earlier versions of pema; accepted in old files, not stored.
        earlier_tokenizers: the same for the tokenizer.
    """

    # Limits far above every real PLM, against values made to exhaust the reader's memory. Texts are printed to
    # terminals, which interpret control characters.
    name: str = option(line=True, longest=512)
    architecture: str = option(line=True, longest=512)
    fingerprint: str = option(line=True, longest=512)
    tokenizer_fingerprint: str = option(line=True, longest=512)
    head_fingerprint: str = option(line=True, longest=512)
    d: int = option(least=1, most=1 << 20)
    d_tap: int = option(least=1, most=1 << 20)
    vocabulary_size: int = option(least=1, most=1 << 24)
    tap: Tap = option()
    max_length: int = option(least=1, most=1 << 30)
    eos_token_ids: tuple[int, ...] = option(least=0, most=1 << 24, longest=4096)
    parameters: int = option(least=1, most=1 << 50)
    weights: str = field(default="", compare=False, metadata={"longest": 512, "pattern": r"[^\x00-\x1f\x7f-\x9f]*"})
    earlier: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata={"longest": 512})
    earlier_tokenizers: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata={"longest": 512})

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_proxy(self) -> bool:
        """Whether it is a proxy, which stands for the model of an API."""
        return self.architecture.startswith(BESIDE_API)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values = {name: value for name, value in asdict(self).items() if not name.startswith("earlier")}
        if not self.weights:  # earlier versions of pema read the description of a PLM that was never quantised
            del values["weights"]
        return values | {"eos_token_ids": list(self.eos_token_ids)}

    def accepted(self) -> dict[str, list[str]]:
        """Return the earlier fingerprints, which are sent to a client but not stored."""
        return {"earlier": list(self.earlier), "earlier_tokenizers": list(self.earlier_tokenizers)}

    @classmethod
    def from_dict(cls, values: object) -> PLMDescription:
        """Parse the result of `to_dict`; the values are untrusted input.

        Raises:
            ConfigError: a field is missing, unknown or impossible; the message names it.
        """
        return from_json(cls, values, "plm")

    def require_same(self, other: PLMDescription, what: str) -> None:
        """Refuse `other` unless it has the same PLM, tokenizer, head and tap.

        Args:
            other: the description stored in `what`.
            what: the memory or adapter that contains `other`, for the message.

        Raises:
            MismatchError: they differ; the message names the first difference.
        """
        for name, noun, earlier in (
            ("fingerprint", "PLM", self.earlier),
            ("tokenizer_fingerprint", "tokenizer", self.earlier_tokenizers),
            ("head_fingerprint", "LM head", ()),
            ("tap", "tap", ()),
        ):
            current, stored = getattr(self, name), getattr(other, name)
            if stored not in (current, *earlier):
                raise MismatchError(
                    f"{what} belongs to another {noun}: it was made with {other.name} ({noun} {stored[:12]}), "
                    f"this is {self.name} ({noun} {current[:12]}). Use the {noun} it was made with, or build it again."
                )


@dataclass(frozen=True)
class ContextRepresentations:
    """The representations of one example's contexts.

    Attributes:
        index: index of the requested sequence.
        representations: (n, d_tap), one per context, in the PLM's dtype, on the CPU.
        generated: (n,) int64, the token that the PLM chose greedily after each context; only in `predicted` mode. The
            last one is an end-of-sequence token if the PLM ended before all steps were used.
    """

    index: int
    representations: Tensor
    generated: Tensor | None = None


class Session(Protocol):
    """A decoding session: prompts in, one representation per sequence and step out.

    The owner keeps the PLM's state (its key-value cache); the data owner mixes the distributions and chooses the next
    token.
    """

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's current context, on the CPU."""

    @property
    def held_bytes(self) -> int:
        """Bytes that the owner keeps for the session."""

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Replace row i by the previous row parents[i], extended by tokens[i].

        Rows that are not a parent leave the session; a row may be the parent of several (beams).

        Args:
            tokens: one token per new row.
            parents: one current row per new row; None means row i for row i.

        Raises:
            DataError: there are no tokens, a token or row does not exist, or a context would become longer than
                `max_length`. The session is unchanged.
        """

    def close(self) -> None:
        """Free the owner's resources; further calls have no effect."""


class PromptPrefix(Protocol):
    """The common prefix of prompts, encoded once.

    Attributes:
        length: number of tokens of the prefix.
    """

    length: int

    def shifted(self, by: Tensor) -> Cache:
        """Return a separate key-value cache of len(by) rows, with row i shifted by[i] positions to the right.

        The last by[i] tokens of the prefix are missing in row i: they are run again.
        """


class PLM(Protocol):
    """A frozen causal language model behind the boundary."""

    @property
    def description(self) -> PLMDescription:
        """Description of the PLM."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""

    @property
    def model(self) -> PreTrainedModel:
        """Causal language model of transformers whose `generate` decodes with this PLM."""

    @property
    def generator(self) -> PreTrainedModel:
        """Model whose `generate` gives each row its result without a batch: `model`, or one over decoding sessions."""

    def head(self) -> Head:
        """Return the head bundle, which maps a representation at the tap to the PLM's logits."""

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts: for each sequence those whose next token is at starts[i] .. len - 1.

        n = len(sequences[i]) - starts[i]; row j is f(sequence[: starts[i] + j]). Yields each sequence once, in any
        order (batches are grouped by length).

        Args:
            sequences: prompt and target of each example.
            starts: number of prompt tokens of each example.
            batch_tokens: maximum of rows times longest of a batch.
            skip: indices that are not yielded. The batches are those of all sequences, so that the answers do not
                depend on it; a batch of skipped sequences only is left out.

        Raises:
            DataError: a sequence is longer than `max_length`, or has no token after its start.
        """

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `predicted` contexts: decode greedily from each prompt for at most steps[i] tokens.

        Row j is f(prompt + the first j generated tokens); decoding stops after the first end-of-sequence token. Yields
        each prompt once, in any order.

        Args:
            prompts: prompt of each example.
            steps: maximum number of tokens to generate for each.
            batch_tokens: as in `represent`.
            skip: as in `represent`.

        Raises:
            DataError: a prompt plus its steps is longer than `max_length`, or a prompt is empty.
        """

    def open_session(self, prompts: Sequence[Sequence[int]]) -> Session:
        """Open a decoding session with one row per prompt.

        Raises:
            DataError: there are no prompts, one is empty, contains a token outside the vocabulary, or fills the
                context window.
        """


@runtime_checkable
class SharesPrefix(Protocol):
    """A PLM in this process, whose `generator` can start from the cache of the prompts' common prefix."""

    def prompt_prefix(self, prompts: Sequence[Sequence[int]]) -> PromptPrefix | None:
        """Encode the common prefix of the prompts for the `generate` of `generator`.

        Returns:
            None if the texts could depend on it, or if encoding it separately does not save time.
        """


@runtime_checkable
class SizesBatches(Protocol):
    """A PLM that knows the maximum tokens of a batch suited to its device."""

    @property
    def batch_tokens(self) -> int:
        """Maximum tokens of a batch."""


def suited_tokens(plm: object) -> int:
    """Return the maximum tokens of a batch suited to a PLM's device; the default if it does not know it."""
    return plm.batch_tokens if isinstance(plm, SizesBatches) else BATCH_TOKENS


@runtime_checkable
class Metered(Protocol):
    """A PLM whose owner limits what may be requested of it, as one on a server."""

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check the requests of a build before anything is sent.

        Args:
            contexts: mode of the contexts.
            lengths: number of tokens of each sequence, steps included.

        Returns:
            What the user should know before the build: what it takes of quotas, and what cannot be done afterwards.

        Raises:
            OwnerError: the owner does not allow it.
        """


@dataclass(frozen=True)
class Proposal:
    """The likeliest continuation of a text, as far as an API gives it.

    Attributes:
        tokens: the tokens, each the likeliest one after those before it.
        top: for each position the likeliest tokens with their log-probabilities.
    """

    tokens: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


class Follower(Protocol):
    """The representations of texts that are written token by token."""

    def reach(self, written: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return (d_tap,), f of each context that can be represented with a token to come, by the text's number.

        Args:
            written: the tokens of each text so far, by the number of its prompt; texts that are left out have ended.
        """

    def close(self) -> None:
        """Free the resources; further calls have no effect."""


class Proposer(Protocol):
    """The side of a PLM that gives the likeliest tokens of a few positions at a price, and nothing else.

    Attributes:
        block: number of tokens to request at once.
        parallel: number of requests that may be sent at the same time.
    """

    block: int
    parallel: int

    def propose(self, prompt: Sequence[int], written: Sequence[int], count: int) -> Proposal:
        """Request the likeliest continuation of at most `count` tokens; it ends early only with the text.

        An empty proposal says that nothing can be known after what was written.

        Raises:
            OwnerError: it cannot be requested, or the budget does not allow it.
            MismatchError: the answer has other tokens than the tokenizer.
        """

    def follow(self, prompts: Sequence[Sequence[int]]) -> Follower:
        """Begin to represent the texts that are written after prompts."""

    def account(self) -> Callable[[int], str]:
        """Begin an account; the returned function says what was requested and spent since, for a number of tokens."""


@runtime_checkable
class GivesProposals(Protocol):
    """A PLM that may give proposals only; its representations are then those of another PLM."""

    @property
    def proposer(self) -> Proposer | None:
        """The side that gives proposals; None if the PLM decodes itself."""


def require_open(plm: object) -> None:
    """Refuse the name of a PLM in the place of an open one.

    Raises:
        ConfigError: it is a name or a path.
    """
    if isinstance(plm, str | Path):
        raise ConfigError(f"plm={short(str(plm))} is a name: open the PLM with pema.PLM.from_pretrained({str(plm)!r}).")
