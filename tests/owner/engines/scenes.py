"""What is done with vLLM's servers: the same when they are recorded, replayed and run."""

import contextlib

from exchanges import COMPLETIONS, POOLING

from pema.errors import DataError, OwnerError
from pema.owner.engines.opening import open_engine
from pema.owner.logprobs.plm import LogProbPLM
from pema.owner.sources.served import Served

TEXTS = ("the house", "a cat", "1, 2,")
STARTS = (3, 1, 4)
STEPS = (5, 1, 7)
CHOSEN = (([70, 80, 90], None), ([71, 81], [2, 0]), ([3], [1]))
"""Tokens and parents of the steps of a session."""


def open_two(connect, folder):
    """The servers as one PLM."""
    return open_engine(f"vllm+{POOLING}?completions={COMPLETIONS}#{folder}", connect)


def open_one(connect, folder):
    """The pooling server alone."""
    return open_engine(f"vllm+{POOLING}#{folder}", connect)


def open_completing(connect, folder):
    """The server that completes, with its log-probabilities alone."""
    return LogProbPLM.connect(Served("head", folder, COMPLETIONS), connect(COMPLETIONS))


def teacher(plm):
    """The `teacher` contexts of the texts."""
    return [part.representations for part in ordered(plm.represent(sequences(plm), STARTS))]


def predicted(plm, count=3):
    """The `predicted` contexts of the first texts, with their tokens."""
    parts = ordered(plm.predict(sequences(plm)[:count], STEPS[:count]))
    return [(part.representations, part.generated) for part in parts]


def session(plm, count=3):
    """The representations of the rows of a session, at its beginning and after each of the first steps."""
    opened = plm.open_session(sequences(plm))
    rows = [opened.representations]
    for tokens, parents in CHOSEN[:count]:
        opened.advance(tokens, parents)
        rows.append(opened.representations)
    opened.close()
    return rows


def ordered(parts):
    return sorted(parts, key=lambda part: part.index)


def sequences(plm):
    return [plm.tokenizer(text).input_ids for text in TEXTS]


def along(plm):
    """The `teacher` contexts of one text."""
    (part,) = plm.represent([plm.tokenizer("cat").input_ids], [1])
    return part.representations


def refused(connect):
    """Requests that the servers refuse, as they say it; returns nothing."""
    body = {"model": "tiny", "task": "token_embed", "input": [1, 70], "encoding_format": "base64"}
    for url, change in (
        (COMPLETIONS, {}),
        (POOLING, {"task": "embed"}),
        (POOLING, {"input": [1, *[70] * 200]}),
    ):
        with contextlib.suppress(OwnerError, DataError):
            connect(url).request("POST", "/pooling", body | change)
    with contextlib.suppress(OwnerError, DataError):
        connect(POOLING).request("POST", "/v1/completions", {"model": "tiny", "prompt": [1, 70]})
