# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""The boundary between the PLM owner and the data owner: all that the rest of the package knows of a PLM.

A PLM can describe itself, hand out its head, represent contexts, and open a decoding session. Whatever stands to the
right of this room sees this type only, so a model in the process and one across a network are used the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pema.errors import MismatchError
from pema.schema import check, from_json, option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pema.owner.head import Head

Tap = Literal["head_input", "norm_input"]
"""Where f(c) is read: what the LM head reads (default), or the input of the final norm."""

Contexts = Literal["teacher", "predicted"]
"""What follows the prompt in a context: the target's own prefix, or what the PLM generated greedily."""

STEP_BUCKET = 8
"""`predicted` contexts are asked for in multiples of this many steps: a target's length stays the data owner's."""


def padded(steps: int, bucket: int = STEP_BUCKET) -> int:
    """`steps`, rounded up to a multiple of the bucket."""
    return -(-steps // bucket) * bucket


@dataclass(frozen=True)
class PLMDescription:
    """What a PLM says of itself; stored in every memory and adapter that is made with it.

    Attributes:
        name: the hub name or folder name that it was loaded from (never an absolute path).
        architecture: class name of the transformers model.
        fingerprint: SHA-256 over the weights and the configuration; two PLMs with equal outputs share it.
        tokenizer_fingerprint: SHA-256 over the tokenizer's vocabulary, merges and special tokens.
        head_fingerprint: SHA-256 over the head bundle.
        d: width of the head's input.
        d_tap: width of a representation at the tap (d, except where a projection lies between).
        vocabulary_size: rows of W_hd.
        tap: where representations are read.
        max_length: tokens that a context may have.
        eos_token_ids: tokens that end a sequence.
        parameters: number of weights.
        earlier: fingerprints that earlier versions of pema gave this PLM; accepted in what was made then, not stored.
        earlier_tokenizers: the same for the tokenizer.
    """

    # Bounds far above every PLM: what is larger was made to exhaust its reader's memory. Texts are printed to
    # terminals, where a control character is obeyed.
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
    earlier: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata={"longest": 512})
    earlier_tokenizers: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata={"longest": 512})

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {name: value for name, value in asdict(self).items() if not name.startswith("earlier")}
        return values | {"eos_token_ids": list(self.eos_token_ids)}

    def accepted(self) -> dict[str, list[str]]:
        """The earlier fingerprints, which cross to a client but are not stored."""
        return {"earlier": list(self.earlier), "earlier_tokenizers": list(self.earlier_tokenizers)}

    @classmethod
    def from_dict(cls, values: object) -> PLMDescription:
        """The inverse of `to_dict`, for values that another party wrote.

        Raises:
            ConfigError: a value that no PLM has, or a field too few or too many; names it.
        """
        return from_json(cls, values, "plm")

    def require_same(self, other: PLMDescription, what: str) -> None:
        """Refuse `other` unless it is this PLM with this tokenizer, head and tap.

        Args:
            other: the description found in `what`.
            what: the memory or adapter that `other` was found in, for the message.

        Raises:
            MismatchError: names the first thing that differs.
        """
        for name, noun, earlier in (
            ("fingerprint", "PLM", self.earlier),
            ("tokenizer_fingerprint", "tokenizer", self.earlier_tokenizers),
            ("head_fingerprint", "LM head", ()),
            ("tap", "tap", ()),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs not in (mine, *earlier):
                raise MismatchError(
                    f"{what} belongs to another {noun}: it was made with {other.name} ({noun} {theirs[:12]}), "
                    f"this is {self.name} ({noun} {mine[:12]}). Use the {noun} it was made with, or build it again."
                )


@dataclass(frozen=True)
class Represented:
    """The contexts of one example, as the owner hands them out.

    Attributes:
        index: which of the sequences that were asked for.
        representations: (n, d_tap), one per context, in the PLM's dtype, on the CPU.
        generated: (n,) int64, the token that the PLM itself chose (greedily) after each context; only in `predicted`
            mode. The last one is an end-of-sequence token if the PLM ended before the steps were used up.
    """

    index: int
    representations: Tensor
    generated: Tensor | None = None


class Session(Protocol):
    """A decoding session: prompts in, one representation per sequence and step out.

    The owner keeps what the PLM remembers of the contexts (its key-value cache); which token follows is decided by the
    data owner, who mixes the distributions.
    """

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's context as it stands, on the CPU."""

    @property
    def held_bytes(self) -> int:
        """What the owner keeps for the session."""

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Row i becomes row parents[i], as it was, with tokens[i] behind it.

        Rows that are no parent leave the session; a row may be the parent of several (beams).

        Args:
            tokens: one token per new row.
            parents: one present row per new row; None is row i for row i.

        Raises:
            DataError: nothing to advance, a token or a row that does not exist, or a context that would be longer than
                `max_length`. The session is as it was.
        """

    def close(self) -> None:
        """Free what the owner keeps; nothing happens the second time."""


class PLM(Protocol):
    """A frozen causal language model behind the boundary."""

    @property
    def description(self) -> PLMDescription:
        """What the PLM says of itself."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""

    @property
    def model(self) -> PreTrainedModel:
        """A causal language model of transformers whose `generate` decodes with this PLM."""

    @property
    def generator(self) -> PreTrainedModel:
        """The one whose `generate` gives every row what it has alone: `model`, or one over decoding sessions."""

    def head(self) -> Head:
        """The head bundle: maps a representation at the tap to the PLM's logits."""

    def represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`teacher` contexts: for each sequence the representations whose next token is at starts[i] .. len - 1.

        n = len(sequences[i]) - starts[i]; row j is f(sequence[: starts[i] + j]). Yields each sequence once, in any
        order (batches are bucketed by length).

        Raises:
            DataError: a sequence is longer than `max_length`, or has no token behind its start.
        """

    def predict(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`predicted` contexts: greedy decoding from each prompt for at most steps[i] tokens.

        Row j is f(prompt + the first j generated tokens); it stops behind the first end-of-sequence token. Yields
        each prompt once, in any order.

        Raises:
            DataError: a prompt plus its steps is longer than `max_length`, or a prompt is empty.
        """

    def open_session(self, prompts: Sequence[Sequence[int]]) -> Session:
        """Begin to decode: one row per prompt.

        Raises:
            DataError: no prompts, an empty one, a token outside the vocabulary, or a prompt that leaves no room in the
                context window.
        """
