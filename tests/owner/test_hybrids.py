"""Chunks of attention, layers without positions, experts and recurrent states, against a loop over single contexts."""

import random

import pytest
import torch
from test_local import STEPS, check_greedy, check_teacher, examples, slow_row
from test_session import PROMPTS, check
from transformers import cache_utils

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.generation.batches import plain
from pema.generation.decoding import decode, generate
from pema.owner.local import LocalPLM
from pema.tasks.registry import get_task
from tiny import HYBRID_FAMILIES, PAD, VARYING_FAMILIES, build_model, build_tokenizer

# transformers says once that it runs without the kernels of these families.
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back")

CACHE = {
    "llama4": "for rows of one length",  # scales attention by the column
    "minimax": "none",  # its state takes no other number of rows
    "recurrent-gemma": "none",  # keeps its state in its modules
}
"""What is kept between two steps where it is not keys, values and states for rows of every length."""


def runnable_plm(family, **settings):
    model = build_model(family)
    try:
        model(torch.tensor([[5, 6]]))
    except (AttributeError, ValueError) as error:
        pytest.skip(f"this version of transformers cannot run it: {error}")
    return LocalPLM(model, build_tokenizer(), **settings)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_contexts_equal_a_loop_over_single_examples(family):
    plm = runnable_plm(family)
    sequences, starts = examples()
    check_teacher(plm, sequences, starts)
    check_greedy(plm, [s[:b] for s, b in zip(sequences, starts, strict=True)], STEPS)
    short_cuts = plm._short_cuts
    kept = "for all rows" if short_cuts.cache else "for rows of one length" if short_cuts.unpadded_cache else "none"
    if hasattr(cache_utils, "LinearAttentionLayer"):  # else every family has a cache of its own
        assert kept == CACHE.get(family, "for all rows")


@pytest.mark.parametrize("family", [*HYBRID_FAMILIES, "mamba"])
def test_sessions_go_on_branch_and_leave(family):
    plm = runnable_plm(family)
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


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="Mamba has a cache of its own")
def test_rows_of_one_length_share_a_pass():
    plm = LocalPLM(build_model("mamba"), build_tokenizer())
    assert not plm._short_cuts.cache
    assert plm._short_cuts.unpadded_cache
    shapes = []
    handle = plm.model.register_forward_pre_hook(
        lambda _m, _a, k: shapes.append(k["input_ids"].shape), with_kwargs=True
    )
    check_greedy_shapes = list(plm.predict([[1, 5, 6], [1, 7], [1, 8, 9]], [2, 2, 2]))
    handle.remove()
    assert len(check_greedy_shapes) == 3
    assert [tuple(shape) for shape in shapes] == [(2, 3), (1, 2), (2, 1), (1, 1)]


def test_a_recurrent_state_goes_where_its_row_goes():
    plm = LocalPLM(build_model("bamba"), build_tokenizer())
    session = plm.open_session([[1, 5, 6, 7], [1, 9, 9, 9, 9]])
    session.advance([8, 8], [1, 0])
    for f, context in zip(session.representations, ([1, 9, 9, 9, 9, 8], [1, 5, 6, 7, 8]), strict=True):
        torch.testing.assert_close(f, slow_row(plm, context)[0][-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [*VARYING_FAMILIES, *HYBRID_FAMILIES, "mamba", "llama"])
@pytest.mark.parametrize("tap", ["head_input", "norm_input"])
def test_what_generates_gives_each_row_what_it_has_alone(family, tap):
    plm = runnable_plm(family, tap=tap)
    own = family not in ("llama4", "minimax", "recurrent-gemma", *VARYING_FAMILIES)
    assert (plm.generator is plm.model) == own or not hasattr(cache_utils, "LinearAttentionLayer")
    prompts = [[1, 5, 6, 7], [1, 9], [1, *range(5, 17)]]
    width = max(map(len, prompts))
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids, mask = (
        torch.tensor([[fill] * (width - len(p)) + (p if shown else [1] * len(p)) for p in prompts])
        for fill, shown in ((PAD, True), (0, False))
    )
    out = plm.generator.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    for row, prompt in zip(out, prompts, strict=True):
        context = list(prompt)
        for word in row:
            assert word == int(slow_row(plm, context)[1].argmax())
            context.append(word)


@pytest.mark.parametrize("family", ["phi3-longrope", "llama-longrope", "minimax"])
def test_texts_do_not_depend_on_their_batch(family):
    plm = LocalPLM(build_model(family), build_tokenizer())
    sources = ["the house", "a", "the dog is here and the house is small and the dog is small"]
    settings = {"task": get_task("translation"), "schedule": Constant(0.5), "max_new_tokens": 20}
    adapter = Adapter(AdapterConfig(d=32, vocabulary_size=320, rank=8), seed=1).eval()
    torch.nn.init.normal_(adapter.B_pd, generator=torch.Generator().manual_seed(3))
    for plugged in (None, adapter):
        together = generate(plm, plugged, sources, **settings)
        assert together == [generate(plm, plugged, [source], **settings)[0] for source in sources]
        assert together == generate(plm, plugged, sources, batch_size=2, **settings)


def test_a_model_that_was_made_of_the_plm_lets_no_text_depend_on_its_batch():
    """What methods decode with is transformers' own generate, whatever was trained into it."""
    plm = LocalPLM(build_model("llama-longrope"), build_tokenizer())
    sources = ["the house", "a", "the dog is here and the house is small and the dog is small", "the horse"]

    def texts(sources):
        return decode(plm, plm.model, sources, get_task("translation"), plain, max_new_tokens=20).texts

    assert texts(sources) == [texts([source])[0] for source in sources]
