"""The probe of an engine: before anything is stored, head(f) is held against the engine's own log-probabilities.

The deviation is that of centred logits, as a share of their standard deviation. A quantised engine multiplies W_hd by a
rounded f, so that it agrees only nearly: on SmolLM2-135M (Q4_1) and Gemma 3 270M (Q4_K_M) the deviation is 2 to 4 %.
For a vector before the final norm, a normalised one or one of another model it is about 100 % or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pema.errors import MismatchError, OwnerError
from pema.owner.head import Head
from pema.owner.llamacpp.engine import Engine
from pema.owner.llamacpp.material import Material
from pema.owner.llamacpp.recovery import Recovery

TOLERANCE = 0.1
"""Largest deviation that is accepted."""

LIKELIEST = 1024
"""Number of the likeliest tokens that are compared."""

TEXTS = ("The weather in the mountains changes", "def add(a, b):\n    return", "Once upon a time, in a", "1, 2, 3, 4,")
"""Texts whose next token is predicted."""

ANOTHER = "the engine runs another model, or another file of it"


def deviation_of(logits: Tensor, log_probabilities: Tensor) -> float:
    """Return how much logits (..., k) differ from log-probabilities, both centred, as a share of the latter."""
    expected = log_probabilities - log_probabilities.mean(-1, keepdim=True)
    difference = logits - logits.mean(-1, keepdim=True) - expected
    return float(difference.norm() / expected.norm())


@dataclass(frozen=True)
class Probed:
    """What a probe has found.

    Attributes:
        head: the LM head, with the scale and soft cap that agree.
        vectors: whether the engine gives one vector a token.
        recovery: recovers f from log-probabilities; None where that cannot be.
        deviation: root mean square of the deviations of head(f).
    """

    head: Head
    vectors: bool
    recovery: Recovery | None
    deviation: float


def probe(engine: Engine, at_hand: Material, where: str) -> Probed:
    """Hold head(f) against the engine's own log-probabilities.

    Raises:
        OwnerError: the engine pools its vectors, or gives neither vectors nor enough probabilities.
        MismatchError: head(f) does not agree; the message names the probable cause.
    """
    d, size = at_hand.heads[0].d, at_hand.heads[0].vocabulary_size
    prompts = [list(at_hand.tokenizer(text).input_ids) for text in TEXTS]
    answers = [_vector(engine, prompt, d, where) for prompt in prompts]
    given = [answer for answer in answers if answer is not None]
    vectors = torch.stack(given) if len(given) == len(prompts) else None
    (drawn,) = at_hand.ordinary_tokens(1)
    measures = [Measure(at_hand, *engine.likeliest(prompt, min(size, LIKELIEST), drawn)) for prompt in prompts]
    if vectors is None:
        # From log-probabilities f is known up to a scale only.
        head = at_hand.heads[0]
        if len(at_hand.heads) > 1:
            raise OwnerError(
                f"{at_hand.name} scales its logits, and {where} gives no vectors to find out how: start the server "
                "with --embeddings --pooling none."
            )
        recover = Recovery.of(head, at_hand)
        vectors = recover(engine.chosen(prompts, recover.tokens, cached=False))
        deviation = deviation_from(measures, head, vectors)
        if deviation > TOLERANCE:
            raise MismatchError(_refusal(where, at_hand, deviation, ANOTHER))
        _require_steps(engine, recover, head, prompts, measures, where)
        return Probed(head, False, recover, deviation)
    head, deviation = fitting(at_hand, measures, vectors, where)
    recovery = None if head.soft_cap is not None else Recovery.of(head, at_hand)
    if recovery is not None:
        _require_steps(engine, recovery, head, prompts, measures, where)
    return Probed(head, True, recovery, deviation)


def _vector(engine: Engine, prompt: Sequence[int], d: int, where: str) -> Tensor | None:
    """Return the vector of the last token of a prompt, or None if the engine gives none."""
    vectors = engine.vectors(prompt, d)
    if vectors is None:
        return None
    if len(vectors) != len(prompt):
        raise OwnerError(
            f"{where} pools its vectors: it gives {len(vectors)} for {len(prompt)} tokens. Start it with --pooling "
            "none."
        )
    return vectors[-1]


class Measure:
    """The engine's likeliest next tokens after a prompt, to measure head(f) against."""

    def __init__(self, at_hand: Material, tokens: list[int], log_probabilities: Tensor) -> None:
        self._rows, self._tokens = at_hand.rows(tokens), torch.tensor(tokens)
        self._given = log_probabilities

    def __call__(self, head: Head, f: Tensor) -> float:
        """Return the deviation of head(f)."""
        return deviation_of(head.finish(self._rows @ f, self._tokens).double(), self._given)


def fitting(at_hand: Material, measures: Sequence[Measure], vectors: Tensor, where: str) -> tuple[Head, float]:
    """Return the form of the head that agrees with an engine's vectors, one for each measure, and its deviation.

    Raises:
        MismatchError: none does; the message names the probable cause.
    """
    deviations = [deviation_from(measures, head, vectors) for head in at_hand.heads]
    deviation = min(deviations)
    if deviation > TOLERANCE:
        raise MismatchError(_refusal(where, at_hand, deviation, _cause(at_hand, measures, vectors)))
    return at_hand.heads[deviations.index(deviation)], deviation


def deviation_from(measures: Sequence[Measure], head: Head, vectors: Tensor) -> float:
    """Return the root mean square of the deviations of head(f)."""
    squares = [measure(head, f) ** 2 for measure, f in zip(measures, vectors, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def _require_steps(
    engine: Engine,
    recovery: Recovery,
    head: Head,
    prompts: Sequence[Sequence[int]],
    measures: Sequence[Measure],
    where: str,
) -> None:
    """Refuse an engine whose cached state gives other log-probabilities than a prompt that is read anew."""
    engine.chosen([prompt[:-1] for prompt in prompts], recovery.tokens, cached=False)
    stepped = recovery(engine.chosen(prompts, recovery.tokens, cached=True))
    deviation = deviation_from(measures, head, stepped)
    if deviation > TOLERANCE:
        raise MismatchError(
            f"{where} answers differently from its cache: the deviation is {deviation:.0%}, at most {TOLERANCE:.0%} is "
            "accepted. Start the server with --swa-full."
        )


def _cause(at_hand: Material, measures: Sequence[Measure], vectors: Tensor) -> str:
    """Return why vectors do not fit the head, by trying what would make them fit."""

    def fits(change: Callable[[Tensor], Tensor]) -> bool:
        return any(deviation_from(measures, head, change(vectors)) <= TOLERANCE for head in at_hand.heads)

    lengths = vectors.norm(dim=1)
    if float(lengths.max()) <= 1.01 * float(lengths.min()):
        return "these vectors are normalised to one length"
    if at_hand.norm is not None and fits(at_hand.norm):
        return "these are vectors before the final norm"
    return ANOTHER


def _refusal(where: str, at_hand: Material, deviation: float, cause: str) -> str:
    return (
        f"{where} does not fit the LM head of {at_hand.name}: head(f) differs from the engine's own log-probabilities "
        f"by {deviation:.0%}, at most {TOLERANCE:.0%} is accepted; {cause}. Give the file that the engine runs, and "
        "use an engine that returns what its LM head reads."
    )
