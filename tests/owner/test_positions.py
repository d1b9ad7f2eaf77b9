"""Position encodings that depend on a context's length, and the loops that keep a cache across the change."""

import random

import pytest
import torch
from test_local import STEPS, examples, slow_row

from pema.owner.local import LocalPLM
from pema.owner.local.session import Step, advance_together
from pema.owner.positions import PositionEncoding
from pema.owner.session_model import SessionModel
from tiny import FAMILIES, HYBRID_FAMILIES, PAD, VARYING_FAMILIES, build_model, build_tokenizer


def varying_plm(family):
    model = build_model(family)
    try:
        model(torch.tensor([[5, 6]]))
    except AttributeError as error:
        pytest.skip(f"this version of transformers cannot run it: {error}")
    plm = LocalPLM(model, build_tokenizer())
    if family == "llama-dynamic":
        plm.max_length = 128  # its encoding changes where the context window ends, which is else refused
    return plm


def alone(plm, context):
    """f(context) and the logits from a plain forward pass of a model that has seen nothing longer before."""
    PositionEncoding(plm.model).settle()
    f, logits = slow_row(plm, list(context))
    return f[-1], logits


def test_frequencies_that_somebody_wrote_into_are_left_alone():
    model = build_model()
    model.model.rotary_emb.inv_freq.mul_(0.5)
    before = model.model.rotary_emb.inv_freq.clone()
    assert not PositionEncoding(model).varies
    PositionEncoding(model).settle()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_families_that_vary(family):
    assert PositionEncoding(varying_plm(family).model).varies


def test_families_that_do_not_vary():
    assert not any(PositionEncoding(build_model(family)).varies for family in (*FAMILIES, *HYBRID_FAMILIES))


@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_stretches_are_those_of_equal_representations(family):
    positions = varying_plm(family)._runner.positions
    grows = family == "llama-dynamic"
    assert list(positions.stretches(3, 30)) == [(3, 16), *([(n, n) for n in range(17, 31)] if grows else [(17, 30)])]
    assert list(positions.stretches(17, 17)) == [(17, 17)]
    assert list(positions.stretches(5, 4)) == []
    assert list(PositionEncoding(build_model("llama")).stretches(3, 30)) == [(3, 30)]
    # The angles of a batch are those of its longest row, so the first token of a longer sequence is another vector.
    plm = varying_plm(family)
    short, long = ([5, 6, 7, *range(8, 5 + n)] for n in (16, 17))
    assert not torch.allclose(alone(plm, short)[0], slow_row(plm, long)[0][15], atol=1e-3)


@pytest.mark.parametrize("shared", [[1, 5, 6, 7, 8], [], list(range(3, 20))], ids=len)
@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_every_context_is_as_if_it_were_alone(family, shared):
    plm = varying_plm(family)
    sequences, starts = examples(shared)
    starts = [max(1, start) for start in starts]
    assert {len(s) > 17 for s in sequences} == ({False, True} if len(shared) == 5 else {len(shared) > 5, True})
    for batch_tokens in (1, 64, 4096):
        results = {r.index: r.representations for r in plm.represent(sequences, starts, batch_tokens=batch_tokens)}
        assert sorted(results) == list(range(len(sequences)))
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            truth = torch.stack([alone(plm, sequence[:n])[0] for n in range(start, len(sequence))])
            torch.testing.assert_close(results[i], truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_greedy_contexts_across_the_change(family):
    plm = varying_plm(family)
    sequences, starts = examples()
    prompts = [s[:b] for s, b in zip(sequences, starts, strict=True)]
    steps = [n + 6 for n in STEPS]
    crossing = [len(p) <= 16 < len(p) + n for p, n in zip(prompts, steps, strict=True)]
    assert sum(crossing) >= 3
    for batch_tokens in (1, 8192):
        for r in plm.predict(prompts, steps, batch_tokens=batch_tokens):
            context = list(prompts[r.index])
            for f, word in zip(r.representations, r.generated.tolist(), strict=True):
                truth, logits = alone(plm, context)
                torch.testing.assert_close(f, truth, atol=1e-4, rtol=1e-4)
                assert word == int(logits.argmax())
                context.append(word)


@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_sessions_across_the_change_alone_and_together(family):
    plm = varying_plm(family)
    draw = random.Random(2)
    starts = [[[1, 5, 6, 7], [1] * 14], [[1, 8, 8, 8, 8]], [[1, 4] * 8, [1, 3] * 9]]
    contexts = [[list(prompt) for prompt in prompts] for prompts in starts]
    sessions = [plm.open_session(prompts) for prompts in starts]
    for round_ in range(14):
        steps = []
        for i, session in enumerate(sessions):
            rows = len(contexts[i])
            parents = None if draw.random() < 0.6 else [draw.randrange(rows) for _ in range(draw.randint(1, 4))]
            kept = range(rows) if parents is None else parents
            tokens = [draw.randrange(3, 320) for _ in kept]
            contexts[i] = [[*contexts[i][row], token] for row, token in zip(kept, tokens, strict=True)]
            steps.append(Step(session, tokens, parents))
        if round_ % 2:
            advance_together(steps)
        else:
            for step in steps:
                step.session.advance(step.tokens, step.parents)
        for session, rows in zip(sessions, contexts, strict=True):
            for f, context in zip(session.representations, rows, strict=True):
                torch.testing.assert_close(f, alone(plm, context)[0], atol=1e-4, rtol=1e-4)
        assert all(session.held_bytes > 0 for session in sessions)


def test_sessions_of_one_encoding_are_joined():
    plm = varying_plm("phi3-longrope")
    sessions = [plm.open_session([[1] * n]) for n in (4, 9, 20)]
    passes = []
    handle = plm.model.register_forward_hook(lambda *_: passes.append(1))
    advance_together([Step(session, [5]) for session in sessions])
    handle.remove()
    assert len(passes) == 2


def test_a_session_on_one_side_of_the_change_runs_nothing_again():
    plm = varying_plm("phi3-longrope")
    session = plm.open_session([[1] * 10, [1] * 9])
    shapes = []

    def see(_module, _arguments, given):
        shapes.append(tuple(given["input_ids"].shape))

    handle = plm.model.register_forward_pre_hook(see, with_kwargs=True)
    for _ in range(9):
        session.advance([5, 6])
    handle.remove()
    # Both rows at 6 steps, then the first is run again, goes on beside the second, and the second is run again.
    assert shapes == [(2, 1)] * 6 + [(1, 1), (1, 17), (1, 1), (1, 17), (1, 1), (1, 1)]


@pytest.mark.parametrize("family", VARYING_FAMILIES)
def test_generation_over_a_session_follows_the_definition(family):
    plm = varying_plm(family)
    prompts = [[1, 5, 6, 7], [1, 9], [1, *range(5, 17)], [1, *range(5, 25)]]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = SessionModel(plm).generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    for row, prompt in zip(out[:, width:].tolist(), prompts, strict=True):
        context = list(prompt)
        for word in row:
            assert word == int(alone(plm, context)[1].argmax())
            context.append(word)


def test_the_models_own_generate_at_the_change():
    """Phi-3 runs the context again there, as pema does; a Llama with such an encoding keeps the keys that it has."""
    prompt = torch.tensor([[1, *range(5, 17)]])
    agree = {}
    for family in ("phi3-longrope", "llama-longrope"):
        plm = varying_plm(family)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
        ids = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        own, session = (model.generate(**ids, **settings)[0].tolist() for model in (plm.model, SessionModel(plm)))
        agree[family] = own == session
    assert not agree["llama-longrope"]
    if plm._runner.state_argument == "cache":  # Phi-3 of older versions of transformers does not
        assert agree["phi3-longrope"]


def test_weights_that_are_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = build_model("phi3-longrope")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    sequences, starts = examples()
    plms = (LocalPLM(model, build_tokenizer()), varying_plm("phi3-longrope"))
    found, expected = ({r.index: r.representations for r in plm.represent(sequences, starts)} for plm in plms)
    assert plms[0].description.fingerprint == plms[1].description.fingerprint
    for i in range(len(sequences)):
        torch.testing.assert_close(found[i], expected[i], atol=1e-5, rtol=1e-5)


def test_a_model_can_be_trained_after_it_was_a_plm():
    plm = varying_plm("llama-dynamic")
    sequences, starts = examples()
    list(plm.represent(sequences, starts))
    plm.model(torch.tensor([sequences[4]]), labels=torch.tensor([sequences[4]])).loss.backward()
    assert plm.model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
