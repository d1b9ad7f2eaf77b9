"""vLLM's own servers: what was recorded of them is what they answer, and what transformers computes.

`make nightly-vllm` runs it, in an environment of vLLM's own; with PEMA_RECORD=1 it writes the recordings again.
"""

import os

import pytest
import torch
from exchanges import Recorder, Replay
from live import servers
from scenes import along, open_completing, open_one, open_two, predicted, refused, session, teacher

PYTHON = os.environ.get("PEMA_VLLM_PYTHON")
"""The Python of an environment with vLLM."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="vLLM needs an environment of its own: make nightly-vllm"),
]
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def recorder(folder, tmp_path_factory):
    given = os.environ.get("PEMA_VLLM_SERVERS")  # "URL URL" of running ones, pooling and completing
    if given:
        yield Recorder(dict(zip(("pooling", "completions"), given.split(), strict=True)))
        return
    with servers(PYTHON, folder, tmp_path_factory.mktemp("logs")) as urls:
        yield Recorder(urls)


def test_the_servers_answer_as_recorded_and_as_transformers(recorder, folder, bundle, local):
    connect = recorder.connect
    for where in (bundle, folder):
        plm = open_two(connect, where)
        assert plm.deviation < 1e-4
    same(teacher(plm), teacher(local))
    same(session(plm), session(local))
    same_texts(predicted(plm), predicted(local))
    alone = open_one(connect, folder)
    same(session(alone, 1), session(local, 1))
    same_texts(predicted(alone, 1), predicted(local, 1))
    completing = open_completing(connect, bundle)
    assert completing.deviation < 1e-4
    torch.testing.assert_close(along(completing), along(local), **NEAR)
    refused(connect)
    if os.environ.get("PEMA_RECORD"):
        recorder.write()
    recorded = Replay().answers
    assert recorder.kept.keys() == recorded.keys()
    for request, exchange in recorder.kept.items():
        status, answer = recorded[request]
        assert exchange["status"] == status
        assert shape(exchange["answer"]) == shape(answer)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


def same_texts(ours, theirs):
    for (f, tokens), (g, others) in zip(ours, theirs, strict=True):
        assert tokens.tolist() == others.tolist()
        torch.testing.assert_close(f, g, **NEAR)


def shape(answer):
    """The names and types of an answer: numbers, tokens of equal probability and identifiers may differ."""
    if isinstance(answer, dict):
        return {name: shape(value) for name, value in answer.items() if not name.startswith("token_id:")}
    if isinstance(answer, list):
        return [shape(value) for value in answer]
    return type(answer)
