"""The endpoints, over ASGI: what they answer is what the PLM in the process says."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import bearer, key, refusal, served, tensors

from pema.owner.contract import PLMDescription
from pema.owner.head import Head
from pema.serving.policy import Batching, Policy

SEQUENCES = [[1, 5, 6, 7, 8, 9], [1, 5, 6, 20], [1, 30, 31, 32, 33], [7, 8]]
STARTS = [2, 3, 1, 1]
PROMPTS, STEPS = [[1, 5, 6, 7], [1, 20], [1, 30, 31], [9] * 120], [8, 16, 8, 8]


def alone(run, sequences, numbers):
    """What the PLM says to each sequence by itself."""
    return [next(iter(run([sequence], [number]))) for sequence, number in zip(sequences, numbers, strict=True)]


def metric(client, name):
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


def test_the_plm_says_what_it_is(client, plm):
    about = client.get("/v1/plm").json()
    assert PLMDescription.from_dict(about["description"]) == plm.description
    assert about["wire"] == 1
    assert (about["taps"], about["contexts"], about["head"]) == (["head_input"], ["teacher", "predicted"], "plain")
    assert about["dtypes"] == ["float32", "float16", "bfloat16"]
    assert set(about["limits"]) == {
        "body_bytes",
        "sequence_tokens",
        "batch_sequences",
        "batch_tokens",
        "sessions",
        "session_rows",
        "predict_bucket",
    }


def test_the_window_that_is_allowed_is_the_one_that_is_told(plm):
    with served(plm, sequence_tokens=30) as client:
        about = client.get("/v1/plm").json()
    assert about["description"]["max_length"] == about["limits"]["sequence_tokens"] == 30


def test_the_tokenizer_crosses(client, plm, tmp_path):
    from transformers import AutoTokenizer

    from pema.owner.loading import tokenizer_fingerprint

    files = client.get("/v1/tokenizer").json()["files"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == plm.description.tokenizer_fingerprint


def test_the_head_crosses(client, plm):
    found, texts = tensors(client.get("/v1/head"))
    assert texts["fingerprint"] == plm.description.head_fingerprint
    head = Head.of(found, json.loads(texts["settings"]), texts["fingerprint"])
    f = torch.randn(3, head.d_tap)
    assert torch.equal(head(f), plm.head()(f))


def test_teacher_contexts(client, plm):
    body = {"sequences": SEQUENCES, "starts": STARTS}
    found, _ = tensors(client.post("/v1/represent", json=body))
    truth = alone(plm.represent, SEQUENCES, STARTS)
    assert found["counts"].tolist() == [len(t.representations) for t in truth]
    assert found["counts"].dtype == torch.int64
    torch.testing.assert_close(
        found["representations"], torch.cat([t.representations for t in truth]), atol=1e-5, rtol=1e-5
    )


def test_predicted_contexts(client, plm):
    found, _ = tensors(client.post("/v1/predict", json={"prompts": PROMPTS, "steps": STEPS}))
    truth = alone(plm.predict, PROMPTS, STEPS)
    assert found["counts"].tolist() == [len(t.representations) for t in truth]
    assert found["generated"].tolist() == torch.cat([t.generated for t in truth]).tolist()
    torch.testing.assert_close(
        found["representations"], torch.cat([t.representations for t in truth]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_representations_cross_in_the_precision_that_was_asked_for(client, plm, dtype):
    found, _ = tensors(client.post("/v1/represent", json={"sequences": [[1, 2, 3]], "starts": [1], "dtype": dtype}))
    truth = next(iter(plm.represent([[1, 2, 3]], [1]))).representations
    assert torch.equal(found["representations"], truth.to(getattr(torch, dtype)))


def test_a_value_that_does_not_fit_the_precision_is_the_clients_to_mend(client, monkeypatch):
    monkeypatch.setattr("pema.serving.contexts_api.narrow", too_large)
    body = {"sequences": [[1, 2]], "starts": [1], "dtype": "float16"}
    assert "request bfloat16" in refusal(client.post("/v1/represent", json=body), 422, "invalid")["message"]


def too_large(f, dtype):
    from pema.owner.wire import narrow

    return narrow(f + 1e6, dtype)


def test_an_answer_does_not_depend_on_who_else_is_in_its_batch(plm):
    """32 requests of 3 keys at once, some of them bad: each good one is answered as if it were alone."""
    keys = [key(name) for name in ("acme", "other", "spare")]
    policy = Policy(keys=(*keys[:2], key("spare", endpoints=("represent", "metrics"))), batching=Batching(window_ms=50))
    generator = torch.Generator().manual_seed(0)

    def random(n):
        return torch.randint(3, 320, (n,), generator=generator).tolist()

    requests = []
    for i in range(32):
        name, sequence = ("acme", "other")[i % 2], [1, 5, *random(3 + i % 11)]
        if i % 8 == 7:
            requests.append((name, "/v1/represent", {"sequences": [[*sequence, 999]], "starts": [2]}))
        elif i % 2:
            requests.append((name, "/v1/predict", {"prompts": [sequence, [4, 5]], "steps": [8, 16]}))
        else:
            requests.append((name, "/v1/represent", {"sequences": [sequence, [4, 5, 6]], "starts": [2, 1]}))
    with served(plm, policy) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda r: client.post(r[1], json=r[2], headers=bearer(r[0])), requests))
        metrics = client.get("/metrics", headers=bearer("spare")).text
    calls = float(metrics.split("pema_batch_requests_count ")[1].split()[0])
    assert calls < 28  # so some were joined
    for (_, path, body), answer in zip(requests, answers, strict=True):
        if 999 in body.get("sequences", [[]])[0]:
            refusal(answer, 422, "unknown_token")
            continue
        run, (sequences, numbers) = plm.represent if path == "/v1/represent" else plm.predict, list(body.values())
        truth, (found, _) = alone(run, sequences, numbers), tensors(answer)
        expected = torch.cat([t.representations for t in truth])
        torch.testing.assert_close(found["representations"], expected, atol=1e-5, rtol=1e-5)
        if "generated" in found:
            assert found["generated"].tolist() == torch.cat([t.generated for t in truth]).tolist()


def test_metrics_count_what_was_done(client):
    client.post("/v1/represent", json={"sequences": [[1, 2, 3], [4, 5]], "starts": [1, 1]})
    client.post("/v1/represent", json={"sequences": [[1, 2, 3]], "starts": [9]})
    client.get("/nowhere")
    assert metric(client, 'pema_requests_total{endpoint="represent",status="200"}') == 1
    assert metric(client, 'pema_requests_total{endpoint="represent",status="422"}') == 1
    assert metric(client, 'pema_requests_total{endpoint="other",status="404"}') == 1
    assert metric(client, 'pema_request_seconds_count{endpoint="represent"}') == 2
    assert metric(client, 'pema_tokens_total{endpoint="represent"}') == 5
    assert metric(client, 'pema_representations_total{endpoint="represent"}') == 3
    assert metric(client, "pema_batch_requests_sum") == 1
    assert metric(client, "pema_batch_tokens_sum") == 5
    assert metric(client, "pema_queue_requests") == 0
    assert metric(client, "process_open_fds") > 0


def test_health_does_not_need_a_key_and_metrics_do(plm):
    with served(plm, Policy(keys=(key("acme"), key("other", endpoints=("metrics",))))) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready"}
        refusal(client.get("/metrics"), 401, "unknown_key")
        refusal(client.get("/metrics", headers=bearer("acme")), 403, "not_allowed")
        assert client.get("/metrics", headers=bearer("other")).headers["content-type"].startswith("text/plain")
        assert client.get("/openapi.json").status_code == 200
        assert client.get("/docs").status_code == 200
