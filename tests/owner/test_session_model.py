"""The transformers model over a decoding session generates what the PLM itself generates."""

import threading

import pytest
import torch
from test_local import slow_greedy
from transformers import pipeline

from pema.errors import OwnerError
from pema.owner.causal_lm import OUTPUT_NAME, state_of
from pema.owner.session_model import SessionModel
from tiny import EOS, PAD

FAMILIES = ["llama", "opt", "opt-projected", "gemma2", "granite", "cohere", "bloom", "mistral", "mamba"]
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17], [1, 9]]


def batch(prompts=PROMPTS):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def both(plm, **settings):
    found = []
    for model in (plm.model, SessionModel(plm)):
        torch.manual_seed(0)
        found.append(model.generate(**batch(), pad_token_id=PAD, **settings))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.3, "top_k": 50},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_same_tokens_as_the_plm(tiny_plm, family, settings):
    local, across = both(tiny_plm(family), max_new_tokens=14, **settings)
    assert local.tolist() == across.tolist()


def test_a_model_without_a_cache_of_keys_and_values(tiny_plm):
    plm = tiny_plm("mamba")
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": PAD}
        new = SessionModel(plm).generate(ids, **settings)[0, len(prompt) :].tolist()
        # Not the model's own generate: that of older versions of transformers gives Mamba a wrong mask.
        assert new == slow_greedy(plm, prompt, 9)[1]


def test_a_pipeline(tiny_plm, caplog):
    plm = tiny_plm()
    local, across = (
        pipeline("text-generation", model=model, tokenizer=plm.tokenizer)(
            "the house", max_new_tokens=8, do_sample=False
        )
        for model in (plm.model, SessionModel(plm))
    )
    assert local == across
    assert "not supported" not in caplog.text


class CountingTransport:
    """A PLM that counts what its sessions are asked."""

    def __init__(self, plm):
        self.plm, self.opened, self.rows, self.closed = plm, [], [], 0

    def __getattr__(self, name):
        return getattr(self.plm, name)

    def open_session(self, prompts):
        self.opened.append(len(prompts))
        session, counting = self.plm.open_session(prompts), self

        class HealthWatch:
            representations = property(lambda _: session.representations)

            def advance(self, tokens, parents=None):
                counting.rows.append(len(tokens))
                session.advance(tokens, parents)

            def close(self):
                counting.closed += 1
                session.close()

        return HealthWatch()


def test_equal_prompts_cross_once_and_finished_rows_leave(tiny_plm):
    plm = CountingTransport(tiny_plm())
    steps = plm.model.generate(**batch(), pad_token_id=PAD, max_new_tokens=30)[:, 12:]
    lengths = [row.index(EOS) + 1 if EOS in row else 30 for row in steps.tolist()]
    assert min(lengths) < 30  # a row ends early, or this shows nothing
    out = SessionModel(plm).generate(**batch(), pad_token_id=PAD, max_new_tokens=30)
    assert out[:, 12:].tolist() == steps.tolist()
    assert plm.opened == [3]
    unlike = lengths[:3]
    assert plm.rows == [sum(n > step for n in unlike) for step in range(1, max(unlike))]
    assert plm.closed == 1


def test_sessions_are_closed_when_generate_fails(tiny_plm):
    plm = CountingTransport(tiny_plm())

    def stop(*_):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        SessionModel(plm).generate(**batch(), logits_processor=[stop], max_new_tokens=4)
    assert plm.closed == 1


def test_calls_that_overlap_close_their_own_sessions(tiny_plm):
    plm = CountingTransport(tiny_plm())
    model, settings = SessionModel(plm), {"max_new_tokens": 6, "pad_token_id": PAD}
    expected = model.generate(**batch(), **settings).tolist()
    open_by_then, turns, found = [], [threading.Event() for _ in range(3)], [None, None]

    def first(_ids, scores):
        turns[0].set()
        turns[1].wait(20)
        return scores

    def second(_ids, scores):
        if not turns[1].is_set():
            turns[1].set()
            turns[2].wait(20)
            open_by_then.append(len(plm.opened) - plm.closed)
        return scores

    def work(i, processor):
        found[i] = model.generate(**batch(), logits_processor=[processor], **settings).tolist()

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((0, first), (1, second))]
    threads[0].start()
    turns[0].wait(20)
    threads[1].start()
    threads[0].join()
    turns[2].set()
    threads[1].join()
    assert found == [expected, expected]
    assert open_by_then == [1]
    assert plm.closed == len(plm.opened) == 3


def test_a_full_context_window_ends_a_row(tiny_plm):
    plm = tiny_plm()
    long = [1] * 120
    out = SessionModel(plm).generate(torch.tensor([long]), max_new_tokens=20, eos_token_id=EOS, pad_token_id=PAD)
    new = out[0, 120:].tolist()
    assert EOS in new
    assert new.index(EOS) <= 8
    expected = plm.model.generate(torch.tensor([long]), max_new_tokens=8, pad_token_id=PAD)[0, 120:].tolist()
    assert new[: len(expected)] == expected


def test_no_cache_and_several_tokens(tiny_plm):
    plm = tiny_plm()
    model = SessionModel(plm)
    expected = plm.model(torch.tensor([PROMPTS[2]])).logits[:, -1:]
    found = model(torch.tensor([PROMPTS[2]]), use_cache=False)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
    assert state_of(found) is None
    cache = state_of(model(torch.tensor([PROMPTS[0]])))
    with pytest.raises(OwnerError, match="one token per step, not 2"):
        model(torch.tensor([[4, 5]]), **{OUTPUT_NAME: cache})
    with pytest.raises(OwnerError, match="cannot go back"):
        cache.crop(1)
    cache.close()


def test_the_head_is_not_copied_and_not_changed(tiny_plm):
    plm = tiny_plm()
    before = plm.head().weight.clone()
    model = SessionModel(plm)
    assert model.lm_head.weight.data_ptr() == plm.head().weight.data_ptr()
    assert torch.equal(plm.head().weight, before)
