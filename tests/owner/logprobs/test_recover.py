"""Recovery of an LM head from log-probabilities: what is recovered, from how much, and what is refused."""

import json

import pytest
import torch
from apis import URL, FakeAPI, connect, recover

from gguf_files import build_llama
from pema.errors import ConfigError, MismatchError, OwnerError
from pema.files import unseal
from pema.owner.head import Head
from pema.owner.local import LocalPLM
from pema.owner.logprobs.answers import random_contexts
from tiny import build_tokenizer

FEWEST = 64 + 6
"""Requests for d = 32: contexts, and texts on which the head is tested."""


def bfloat16(x):
    return x.bfloat16().float()


def test_the_head_is_the_model_s_in_another_basis(local, recovered):
    head, true = Head.load(recovered), local.head()
    assert head.weight.shape == true.weight.shape
    rows = true.weight.double()
    rows = rows - rows.mean(dim=0)
    # W - mean = W' T for a d x d matrix T.
    transformation = torch.linalg.lstsq(head.weight.double(), rows).solution
    torch.testing.assert_close(head.weight.double() @ transformation, rows, rtol=0, atol=1e-5)
    assert torch.linalg.cond(transformation) < 100
    report = unseal(json.loads((recovered / "recovery.json").read_text()))
    assert report["d"] == 32
    assert report["queries"] == FEWEST
    assert report["gap"] > 1e4
    assert report["deviation"] < 1e-5
    assert report["largest_error"] < 1e-4
    assert not recovered.with_name("head.queries").exists()


def test_what_is_needed_is_said_before_anything_is_requested(local, tmp_path, capsys):
    api = FakeAPI(local)
    with pytest.raises(ConfigError, match=r"needs about 1\.1 d \+ 30 requests.*all 320 .*such as queries=5000\."):
        recover(api, tmp_path / "head", queries=None)
    with pytest.raises(ConfigError, match=r"queries=69 is too few, nothing was requested"):
        recover(api, tmp_path / "head", queries=FEWEST - 1)
    assert not api.completions()
    assert [*tmp_path.iterdir()] == []
    recover(api, tmp_path / "head", queries=FEWEST)
    assert len(api.completions()) == FEWEST
    assert "At most 70 are sent." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rounded", "queries", "deviation"),
    [
        (lambda x: (x * 1e4).round() / 1e4, FEWEST, 1e-3),
        (lambda x: (x * 1e2).round() / 1e2, 200, 0.02),
        (bfloat16, 200, 0.06),
    ],
    ids=["4 decimals", "2 decimals", "bfloat16"],
)
def test_rounded_log_probabilities(local, tmp_path, rounded, queries, deviation):
    result = recover(FakeAPI(local, rounded=rounded), tmp_path / "head", queries)
    assert result.d == 32
    assert result.queries <= queries
    assert 1e-6 < result.deviation < deviation


@pytest.mark.parametrize("cap", [2.0, 5.0, 15.0])
def test_a_soft_cap_is_refused_by_name(local, tmp_path, cap):
    api = FakeAPI(local, curve=lambda x: cap * torch.tanh(x / cap))
    with pytest.raises(OwnerError, match=r"tiny has a soft cap on its logits, or the API bends them: \d+% of what a"):
        recover(api, tmp_path / "head")


def test_logits_without_a_gap_are_refused(local, tmp_path):
    draw = torch.Generator().manual_seed(0)
    api = FakeAPI(local, curve=lambda x: torch.randn(x.shape, generator=draw, dtype=x.dtype))
    with pytest.raises(OwnerError, match=r"the largest gap between singular values is 1\.\d+, at least 1\.5 is needed"):
        recover(api, tmp_path / "head")


def test_too_few_log_probabilities_are_refused_before_any_is_paid_for(local, tmp_path):
    api = FakeAPI(local, most=20)
    with pytest.raises(OwnerError, match=rf"{URL} returns the log-probabilities of the 20 likeliest tokens, and recov"):
        recover(api, tmp_path / "head")
    assert not api.completions()


class Ignoring(FakeAPI):
    """A gateway that answers with 20, however many are requested."""

    def complete(self, body):
        return super().complete(body | {"logprobs": min(body["logprobs"], 20)})


def test_an_api_that_ignores_the_number_is_refused_too(local, tmp_path):
    with pytest.raises(OwnerError, match=r"returns the log-probabilities of the 20 likeliest tokens"):
        recover(Ignoring(local), tmp_path / "head")


def test_a_recovery_that_was_interrupted_continues(local, tmp_path, recovered):
    folder = tmp_path / "head"
    api = FakeAPI(local, fails_at=41)
    with pytest.raises(OwnerError, match="failed after 1 tries"):
        recover(api, folder)
    assert not folder.exists()
    assert len(list((tmp_path / "head.queries").glob("answer-*"))) == 41
    again = FakeAPI(local)
    recover(again, folder)
    assert len(again.completions()) == FEWEST - 41
    # The same bytes as of an uninterrupted one.
    assert Head.load(folder).fingerprint == Head.load(recovered).fingerprint


def test_more_queries_continue_a_refused_recovery(local, tmp_path):
    draw = [0]

    def noise(x):
        draw[0] += 1
        return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(draw[0]))

    api = FakeAPI(local, rounded=noise)
    with pytest.raises(OwnerError, match=r"[Gg]ive more queries \(what was answered is kept"):
        recover(api, tmp_path / "head", queries=FEWEST)
    result = recover(api, tmp_path / "head", queries=200)
    assert result.d == 32
    assert len(api.completions()) == result.queries


def test_stored_answers_of_another_model_are_refused(local, tmp_path):
    with pytest.raises(OwnerError, match="failed after"):
        recover(FakeAPI(local, fails_at=3), tmp_path / "head")
    with pytest.raises(MismatchError, match=r"head\.queries has answers for another seed: 0, expected 1\. Choose"):
        recover(FakeAPI(local), tmp_path / "head", seed=1)
    plan = tmp_path / "head.queries" / "plan.json"
    plan.write_text(plan.read_text().replace("320", "321"))
    with pytest.raises(OwnerError, match=r"plan\.json cannot be used: its digest does not match\. Remove"):
        recover(FakeAPI(local), tmp_path / "head")


def test_a_damaged_answer_is_named(local, tmp_path):
    with pytest.raises(OwnerError, match="failed after"):
        recover(FakeAPI(local, fails_at=3), tmp_path / "head")
    answer = tmp_path / "head.queries" / "answer-000001.safetensors"
    answer.write_bytes(answer.read_bytes()[:100])
    with pytest.raises(OwnerError, match=r"answer-000001\.safetensors cannot be read: .*Remove it and"):
        recover(FakeAPI(local), tmp_path / "head")


def test_an_existing_folder_is_not_replaced(local, recovered):
    with pytest.raises(ConfigError, match=r"head exists already: choose another folder for the recovered head"):
        recover(FakeAPI(local), recovered)


def test_answers_with_other_tokens(local, tmp_path):
    class Shifted(FakeAPI):
        @staticmethod
        def likeliest(row, count, further):
            return [(token + 1, value) for token, value in FakeAPI.likeliest(row, count, further)]

    with pytest.raises(OwnerError, match=rf"{URL} answered with other tokens than 0 to 319, each once"):
        recover(Shifted(local), tmp_path / "head")


def test_a_vocabulary_that_is_too_small(local, tmp_path, monkeypatch):
    """With 40 tokens d = 32 is visible, but 24 ordinary ones do not determine f."""
    monkeypatch.setattr("pema.owner.logprobs.recover.ordinary_tokens", lambda *_: [*range(10, 34)])
    with pytest.raises(OwnerError, match="24 ordinary tokens of tiny do not determine 32 numbers: its vocabulary is"):
        recover(FakeAPI(local), tmp_path / "head")


def test_a_head_that_does_not_fit_texts(local, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.owner.logprobs.recover._rows", lambda *_: torch.randn(320, 32))
    with pytest.raises(OwnerError, match=r"differs from the log-probabilities of texts by \d+%, at most 10%"):
        recover(FakeAPI(local), tmp_path / "head")


def test_contexts_are_added_at_the_end():
    few, many = (random_contexts([5, 6, 7], [1], count, 3) for count in (4, 9))
    assert many[:4] == few
    assert all(context[0] == 1 and 2 <= len(context) <= 17 and {*context[1:]} <= {5, 6, 7} for context in many)


def test_a_model_with_a_bias_has_one_number_more(local, tmp_path):
    """The bias is the column of a number that never changes."""
    bias = torch.randn(320, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    api = FakeAPI(local, curve=lambda x: x + bias)
    assert recover(api, tmp_path / "head").d == 33
    assert connect(api, tmp_path / "head").deviation < 1e-4


def test_another_model_under_the_same_name(recovered):
    tokenizer = build_tokenizer()
    with pytest.raises(MismatchError, match=r"does not fit the LM head of head: head\(f\) differs .* by \d+%, at most"):
        connect(FakeAPI(LocalPLM(build_llama(seed=5), tokenizer)), recovered)
