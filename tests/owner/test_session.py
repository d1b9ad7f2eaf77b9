"""Decoding sessions on a local PLM against a loop that runs every context from its first token."""

import random

import pytest
import torch
from test_local import slow_row

from pema.errors import DataError
from pema.owner.local import plm as local
from pema.owner.local.session import Step, advance_together
from pema.owner.mask import MaskedSession
from tiny import FAMILIES

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17]]


def check(plm, session, contexts):
    assert session.representations.shape == (len(contexts), plm.description.d_tap)
    for f, context in zip(session.representations, contexts, strict=True):
        torch.testing.assert_close(f, slow_row(plm, context)[0][-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tap", ["head_input", "norm_input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_go_on_branch_and_leave(tiny_plm, family, tap):
    if tap == "norm_input" and family in ("opt-350m",):
        pytest.skip("has no final norm")
    plm = tiny_plm(family, tap=tap)
    draw = random.Random(0)
    session, contexts = plm.open_session(PROMPTS), [list(prompt) for prompt in PROMPTS]
    check(plm, session, contexts)
    for parents in (None, [2, 0, 0, 1], [3, 3], None, [1], [0, 0, 0]):
        rows = range(len(contexts)) if parents is None else parents
        tokens = [draw.randrange(3, 320) for _ in rows]
        contexts = [[*contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
        session.advance(tokens, parents)
        check(plm, session, contexts)
    assert session.held_bytes > 0
    session.close()
    session.close()
    assert session.held_bytes == 0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "mistral", "gemma3"])
def test_a_long_common_prefix_is_encoded_once(tiny_plm, monkeypatch, family):
    monkeypatch.setattr(local, "_LEAST_SAVED", 8)
    plm, front = tiny_plm(family), [1, 5, 6, 7, 8, 9]
    prompts = [front + rest for rest in ([11, 12], [13], [11, 14, 15, 16, 17, 18, 19, 20, 21], [12, 12, 12])]
    plm.open_session(prompts).close()
    shapes = []
    plm.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: shapes.append(tuple(args[0].shape)))
    session, contexts = plm.open_session(prompts), prompts
    assert shapes == [(1, 6), (4, 9)]
    for parents in ([0, 1, 2, 3], [3, 0, 2], [1, 1]):
        check(plm, session, contexts)
        contexts = [[*contexts[row], 30 + row] for row in parents]
        session.advance([30 + row for row in parents], parents)
    check(plm, session, contexts)
    shapes.clear()
    plm.open_session(prompts[:2])
    assert shapes == [(2, 8)]


JOINED = ["llama", "opt", "gpt2", "bloom", "falcon-alibi", "gpt-neox", "mistral", "gemma2", "mamba"]


@pytest.mark.parametrize("family", JOINED)
def test_steps_of_several_sessions_together_are_those_of_each_alone(tiny_plm, family):
    plm = tiny_plm(family)
    draw = random.Random(1)
    starts = [PROMPTS, [[1, 8, 8, 8, 8]], [[1, 4] * 20, [1, 3]]]
    contexts = [[list(prompt) for prompt in prompts] for prompts in starts]
    sessions = [plm.open_session(prompts) for prompts in starts]
    # What stands around a session does not keep it out.
    sessions[1] = MaskedSession(sessions[1], torch.eye(plm.description.d_tap))
    for round_ in range(5):
        steps = []
        for i, session in enumerate(sessions):
            if (round_ + i) % 4 == 3:
                continue  # not every session takes part in every step
            rows = len(contexts[i])
            parents = None if draw.random() < 0.5 else [draw.randrange(rows) for _ in range(draw.randint(1, 4))]
            kept = range(rows) if parents is None else parents
            tokens = [draw.randrange(3, 320) for _ in kept]
            contexts[i] = [[*contexts[i][row], token] for row, token in zip(kept, tokens, strict=True)]
            steps.append(Step(session, tokens, parents))
        advance_together(steps)
        for session, rows in zip(sessions, contexts, strict=True):
            check(plm, session, rows)


def test_together_in_one_forward_pass(tiny_plm):
    plm = tiny_plm()
    sessions = [plm.open_session(PROMPTS[:1]), plm.open_session(PROMPTS[1:])]
    passes = []
    handle = plm.model.register_forward_hook(lambda *_: passes.append(1))
    advance_together([Step(sessions[0], [4]), Step(sessions[1], [5, 6])])
    handle.remove()
    assert len(passes) == 1


def test_a_refused_step_among_others_is_named(tiny_plm):
    plm = tiny_plm()
    sessions = [plm.open_session(PROMPTS[:1]), plm.open_session(PROMPTS[1:])]
    with pytest.raises(DataError, match="row 1 is given token 320"):
        advance_together([Step(sessions[0], [4]), Step(sessions[1], [5, 320])])


def test_returned_values_do_not_change(tiny_plm):
    session = tiny_plm().open_session(PROMPTS)
    before, copy = session.representations, session.representations.clone()
    session.advance([4, 5, 6])
    assert torch.equal(before, copy)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "at least one prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 128], "prompt 0 has 128 tokens, the PLM's context window holds 128 with at least one to come"),
        ([[1], [3, 320]], "prompt 1 contains token 320, outside the vocabulary of 320"),
        ([[-1]], "prompt 0 contains token -1"),
    ],
)
def test_prompts_that_are_refused(tiny_plm, prompts, match):
    with pytest.raises(DataError, match=match):
        tiny_plm().open_session(prompts)


@pytest.mark.parametrize(
    ("tokens", "parents", "match"),
    [
        ([], [], "0 tokens for 0 rows"),
        ([1, 2], None, "2 tokens for 3 rows"),
        ([1, 2], [0], "2 tokens for 1 rows"),
        ([1], [3], "row 0 continues row 3, the session has 3 rows"),
        ([1], [-1], "row 0 continues row -1"),
        ([1, 320, 1], None, "row 1 is given token 320, outside the vocabulary of 320"),
    ],
)
def test_refused_steps_do_not_change_the_session(tiny_plm, tokens, parents, match):
    plm = tiny_plm()
    session = plm.open_session(PROMPTS)
    with pytest.raises(DataError, match=match):
        session.advance(tokens, parents)
    session.advance([4, 5, 6])
    check(plm, session, [[*prompt, token] for prompt, token in zip(PROMPTS, (4, 5, 6), strict=True)])


def test_the_context_window_ends_a_row(tiny_plm):
    plm = tiny_plm()
    session = plm.open_session([[1] * 127])
    session.advance([5])
    check(plm, session, [[1] * 127 + [5]])
    with pytest.raises(DataError, match="row 0 has 128 tokens and fills the PLM's context window"):
        session.advance([5])


def test_a_closed_session_does_not_go_on(tiny_plm):
    session = tiny_plm().open_session(PROMPTS)
    session.close()
    with pytest.raises(DataError, match="the session is closed"):
        session.advance([1, 1, 1])


def test_whole_contexts_go_through_the_model_in_bounded_passes(tiny_plm, monkeypatch):
    """One row of 20 tokens that becomes 30 rows costs as many passes, not one of 600 tokens."""
    from pema.owner.local import growing

    plm = tiny_plm()
    monkeypatch.setattr(growing, "WHOLE_TOKENS", 100)
    rows = [[1, *range(5, 5 + n)] for n in (3, 40, 7, 120, 2, 2, 2, 2, 60)]
    shapes = []
    handle = plm.model.register_forward_pre_hook(
        lambda _module, _args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for together in (True, False):
        shapes.clear()
        f, _ = growing.WholeContexts(plm._runner, rows, together=together).run(logits=False)
        assert all(n == 1 or n * width <= 100 for n, width in shapes)
        assert sum(n for n, _ in shapes) == len(rows)
        assert (len(shapes) < len(rows)) == together
        for row, one in zip(rows, f, strict=True):
            (alone,) = plm.represent([[*row, 1]], [len(row)])
            torch.testing.assert_close(one, alone.representations[0], atol=1e-5, rtol=1e-5)
    handle.remove()
