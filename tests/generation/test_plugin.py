import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache, TextGenerationPipeline

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter
from pema.errors import ConfigError, MismatchError, OwnerError
from pema.generation.mixture import mix
from pema.generation.plugin import attach
from pema.owner.causal_lm import OUTPUT_NAME, state_of
from pema.owner.derivation import derive_head

FAMILIES = ["llama", "opt", "opt-projected", "gpt2", "gemma2", "cohere", "phi", "granite", "bloom", "mistral"]
OVERHEAD = 3


def make_adapter(model, *, kind="linear", seed=1, tokens=None):
    vocabulary, d = model.get_output_embeddings().weight.shape
    options = {"linear": {}, "residual": {"residual": True}, "gelu": {"residual": True, "activation": "gelu"}}[kind]
    config = AdapterConfig(
        d=d, vocabulary_size=vocabulary, rank=8, vocabulary="full" if tokens is None else "seen", **options
    )
    adapter = Adapter(config, tokens, seed=seed)
    with torch.no_grad():
        adapter.B_pd.copy_(torch.randn(d, 8, generator=torch.Generator().manual_seed(seed)))
    return adapter


def make(tiny_model, family="llama", *, seen=False, **kwargs):
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([3, 7, 8, 50, 319]) if seen else None
    return model, make_adapter(model, tokens=tokens, **kwargs), derive_head(model, "head_input")


def prompts(rows=3, columns=9, *, vocabulary=320, seed=0):
    """Left-padded prompts of different lengths."""
    ids = torch.randint(3, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def slow(model, adapter, head, schedule, ids, steps, overhead=OVERHEAD, choose=None):
    """One sequence, no cache, no hooks: the method as it is written. Returns tokens and distributions."""
    ids, start = list(ids), len(ids)
    length = torch.tensor([max(1, start - overhead)])
    seen = []
    module = model.get_output_embeddings()
    for t in range(steps):
        kept = []
        handle = module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][:, -1]))
        log_p_plm = model(torch.tensor([ids]), use_cache=False).logits[:, -1].float().log_softmax(-1)
        handle.remove()
        log_p_pema = adapter.eval().log_probs(kept[0], head)
        log_p = mix(log_p_plm, log_p_pema, schedule.weights(torch.tensor([t]), length))[0]
        seen.append(log_p)
        ids.append(int(log_p.argmax()) if choose is None else choose[t])
    return ids[start:], torch.stack(seen)


SCHEDULES = [GradualUnrolling(0.9), Constant(0.6), Constant(1.0), Linear(1.0), Fitted((1.0, 0.4, 0.0))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seen", [False, True], ids=["full", "seen"])
def test_each_step_is_the_slow_loop(tiny_model, family, seen):
    model, adapter, head = make(tiny_model, family, seen=seen)
    batch = prompts()
    for schedule in SCHEDULES if family in ("llama", "gemma2") else SCHEDULES[:2]:
        with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD):
            out = model.generate(
                **batch, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        found = torch.stack(out.logits, 1).log_softmax(-1)
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            tokens, log_p = slow(model, adapter, head, schedule, ids[mask == 1].tolist(), 8)
            assert out.sequences[row, 9:].tolist() == tokens
            torch.testing.assert_close(found[row].exp(), log_p.exp(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
@pytest.mark.parametrize("seen", [False, True], ids=["full", "seen"])
def test_many_rows_are_the_same_as_few(tiny_model, family, seen):
    model, adapter, head = make(tiny_model, family, seen=seen)
    batch = prompts(4, 11)
    many = {name: tensor.repeat(6, 1) for name, tensor in batch.items()}
    with attach(model, adapter, head, Linear(0.9), prompt_overhead_tokens=OVERHEAD), torch.no_grad():
        few = model(**batch, logits_to_keep=1).logits
        torch.testing.assert_close(model(**many, logits_to_keep=1).logits, few.repeat(6, 1, 1), atol=1e-5, rtol=1e-4)
        few = model.generate(**batch, max_new_tokens=5, do_sample=False)
        assert model.generate(**many, max_new_tokens=5, do_sample=False).tolist() == few.tolist() * 6


@pytest.mark.parametrize("kind", ["residual", "gelu"])
def test_the_other_adapters(tiny_model, kind):
    model, adapter, head = make(tiny_model, "opt", kind=kind)
    ids = prompts(1)["input_ids"]
    with attach(model, adapter, head, Constant(0.5)):
        found = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 9:].tolist()
    assert found == slow(model, adapter, head, Constant(0.5), ids[0].tolist(), 6)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", [NoAdapter(), GradualUnrolling(0.0), Constant(0.0)], ids=lambda s: s.name)
def test_without_weight_the_plm_is_itself(tiny_model, family, schedule):
    model, adapter, head = make(tiny_model, family)
    batch = prompts()
    ways = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    ]

    def run():
        outputs = []
        for way in ways:
            torch.manual_seed(0)
            out = model.generate(**batch, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **way)
            outputs += [out.sequences, *out.logits]
        return [*outputs, model(**batch, logits_to_keep=1).logits]

    before = run()
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD):
        during = run()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_rows_after_their_schedule_are_the_plm_alone(tiny_model):
    model, adapter, head = make(tiny_model)
    batch = prompts()
    with attach(model, adapter, head, GradualUnrolling(0.9)) as attached, attached.inputs(source_lengths=[1, 2, 20]):
        out = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    so_far = out.sequences[:, :11]
    own = model(so_far, attention_mask=torch.cat((batch["attention_mask"], torch.ones(3, 2, dtype=torch.int64)), 1))
    # t = 2: the first two rows have used their inputs up, the third has not.
    torch.testing.assert_close(out.logits[2][:2], own.logits[:2, -1])
    assert not torch.allclose(out.logits[2][2].softmax(-1), own.logits[2, -1].softmax(-1), atol=1e-3)


@pytest.mark.parametrize("seen", [False, True], ids=["full", "seen"])
def test_probabilities_sum_to_one(tiny_model, seen):
    model, adapter, head = make(tiny_model, "gemma2", seen=seen)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10**6), weight=st.floats(0, 1, width=16))
    def check(seed, weight):
        with attach(model, adapter, head, Constant(weight)), torch.no_grad():
            logits = model(**prompts(seed=seed), logits_to_keep=1).logits
        own = model(**prompts(seed=seed), logits_to_keep=1).logits
        assert not logits.isnan().any()
        # softmax(logits) is a distribution whatever they are; that they are log P plus the PLM's normaliser is not.
        torch.testing.assert_close(logits.logsumexp(-1), own.logsumexp(-1), atol=1e-4, rtol=0)

    check()


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "opt", "mistral"])
def test_the_same_alone_and_in_any_batch(tiny_model, family, way):
    model, adapter, head = make(tiny_model, family)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        # Some sequences end early, so that finished rows are in the batch.
        adapter.B_pd.mul_(0.7)
    batch = prompts(5, 11)
    with attach(model, adapter, head, GradualUnrolling(0.95), prompt_overhead_tokens=OVERHEAD):
        together = model.generate(**batch, max_new_tokens=12, do_sample=False, **way)[:, 11:]
        some = [3, 1]
        pair = model.generate(**{k: v[some] for k, v in batch.items()}, max_new_tokens=12, do_sample=False, **way)[
            :, 11:
        ]
        for row in range(5):
            keep = batch["attention_mask"][row] == 1
            ids = batch["input_ids"][row, keep][None]
            alone = model.generate(ids, max_new_tokens=12, do_sample=False, **way)[0, ids.shape[1] :].tolist()
            width = max(together.shape[1], len(alone))
            assert alone + [0] * (width - len(alone)) == together[row].tolist() + [0] * (width - together.shape[1])
    for row, i in enumerate(some):
        shared = min(pair.shape[1], together.shape[1])
        assert pair[row, :shared].tolist() == together[i, :shared].tolist()


def test_finished_sequences_freeze_nobody(tiny_model):
    model, adapter, head = make(tiny_model)
    batch = prompts(2)
    schedule = GradualUnrolling(0.9)
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD):
        free = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, 9:]
        first = free[0, 0].item()
        assert first not in free[1].tolist()
        ended = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=first, pad_token_id=0)[:, 9:]
    assert ended[0].tolist() == [first, 0, 0, 0, 0, 0]
    assert ended[1].tolist() == free[1].tolist()


@pytest.mark.parametrize("seen", [False, True], ids=["full", "seen"])
def test_beam_search_is_exhaustive_search(tiny_model, seen):
    V, T = 6, 4
    model = tiny_model("llama", vocab_size=V)
    model.generation_config.eos_token_id = None
    adapter = make_adapter(model, tokens=torch.tensor([1, 3, 4]) if seen else None)
    head, schedule, overhead = derive_head(model, "head_input"), GradualUnrolling(0.95), 1
    ids = torch.tensor([[4, 3, 5, 2, 1]])
    best, best_score = None, -math.inf
    for sequence in itertools.product(range(V), repeat=T - 1):
        _, log_p = slow(model, adapter, head, schedule, ids[0].tolist(), T, overhead, choose=[*sequence, 0])
        score = sum(log_p[t, y].item() for t, y in enumerate(sequence)) + log_p[-1].max().item()
        if score > best_score:
            best, best_score = [*sequence, int(log_p[-1].argmax())], score
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=overhead):
        out = model.generate(
            ids.expand(2, -1),
            max_new_tokens=T,
            num_beams=V ** (T - 1),
            num_return_sequences=1,
            do_sample=False,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        narrow = model.generate(ids, max_new_tokens=T, num_beams=2, do_sample=False)
    assert out.sequences[:, 5:].tolist() == [best, best]
    torch.testing.assert_close(out.sequences_scores, torch.full((2,), best_score), atol=1e-4, rtol=0)
    assert narrow.shape == (1, 9)


def test_sampling_draws_from_the_mixture(tiny_model):
    model = tiny_model("llama", vocab_size=6)
    model.generation_config.eos_token_id = None
    adapter, head, schedule = make_adapter(model), derive_head(model, "head_input"), GradualUnrolling(0.95)
    ids = torch.tensor([[4, 3, 5, 2, 1]])
    torch.manual_seed(0)
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD):
        drawn = model.generate(ids, max_new_tokens=2, do_sample=True, top_k=0, num_return_sequences=4000)[:, 5:]
    _, log_p = slow(model, adapter, head, schedule, ids[0].tolist(), 1)
    found = drawn[:, 0].bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(found, log_p[0].exp(), atol=0.03, rtol=0)
    first = int(found.argmax())
    _, log_p = slow(model, adapter, head, schedule, ids[0].tolist(), 2, choose=[first, 0])
    after = drawn[drawn[:, 0] == first, 1]
    torch.testing.assert_close(after.bincount(minlength=6) / len(after), log_p[1].exp(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "way",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
    ],
    ids=lambda way: next(iter(way)),
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_cache_and_method_gives_the_same(tiny_model, family, way):
    model, adapter, head = make(tiny_model, family)
    ids = prompts(1)["input_ids"]
    ids[0, -3:] = ids[0, 1:4]
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD):
        plain = model.generate(ids, max_new_tokens=8, do_sample=False)
        other = model.generate(ids, max_new_tokens=8, do_sample=False, **way)
    assert plain.tolist() == other.tolist()
    assert plain[0, 9:].tolist() == slow(model, adapter, head, GradualUnrolling(0.9), ids[0].tolist(), 8)[0]


def test_a_cached_prefix_gives_the_same(tiny_model):
    model, adapter, head = make(tiny_model)
    ids = prompts(1)["input_ids"]
    cache = state_of(model(ids[:, :8], use_cache=True))
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD):
        plain = model.generate(ids, max_new_tokens=6, do_sample=False)
        other = model.generate(ids, **{OUTPUT_NAME: cache}, max_new_tokens=6, do_sample=False)
    assert plain.tolist() == other.tolist()


def test_a_loop_of_ones_own(tiny_model):
    model, adapter, head = make(tiny_model)
    ids = prompts(1)["input_ids"]
    schedule = GradualUnrolling(0.9)
    expected, log_p = slow(model, adapter, head, schedule, ids[0].tolist(), 5)
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD) as attached, torch.no_grad():
        out, found = model(ids, logits_to_keep=1), []
        for _ in range(5):
            found.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([found[-1:]]), **{OUTPUT_NAME: state_of(out)})
        assert found == expected
        whole = torch.cat((ids, torch.tensor([found])), 1)
        with attached.inputs(columns=9, source_lengths=torch.tensor([9 - OVERHEAD])):
            at_once = model(whole, use_cache=False)
            as_tuple = model(whole, use_cache=False, return_dict=False)
        torch.testing.assert_close(at_once.logits[0, 8:13].softmax(-1), log_p.exp(), atol=1e-5, rtol=1e-3)
        assert torch.equal(at_once.logits, as_tuple[0])
    own = slow(model, adapter, head, NoAdapter(), ids[0, :4].tolist(), 1)[1]
    torch.testing.assert_close(at_once.logits[0, 3].softmax(-1), own[0].exp(), atol=1e-5, rtol=1e-3)


def test_embeddings_instead_of_tokens(tiny_model):
    model, adapter, head = make(tiny_model)
    ids = prompts(1)["input_ids"]
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD):
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        other = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, do_sample=False)
    assert plain[:, 9:].tolist() == other.tolist()


def test_padding_is_found_without_a_mask(tiny_model):
    model, adapter, head = make(tiny_model)
    batch = prompts()
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD):
        plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
        other = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert plain.tolist() == other.tolist()


def test_pipeline(tiny_model, tiny_tokenizer):
    model, adapter, head = make(tiny_model)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    texts = ["the house is small", "the dog"]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=1):
        found = [pipe(text, **settings)[0]["generated_text"] for text in texts]
        batched = [out[0]["generated_text"] for out in pipe(texts, batch_size=2, **settings)]
    assert found == batched
    for text, output in zip(texts, found, strict=True):
        ids = slow(model, adapter, head, GradualUnrolling(0.9), tokenizer(text)["input_ids"], 6, 1)[0]
        assert output == tokenizer.decode(ids, skip_special_tokens=True)


def insides_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return (
        [
            (name, id(module), sorted(vars(module)), [dict(getattr(module, n)) for n in names])
            for name, module in model.named_modules()
        ],
        [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()],
        {k: id(v) for k, v in model.__dict__.items()},
        id(model.get_output_embeddings()),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_detaching_restores_the_model(tiny_model, family):
    model, adapter, head = make(tiny_model, family)
    adapter.train()
    batch, before = prompts(), insides_of(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model(**batch, logits_to_keep=1).logits
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD) as attached:
        assert list(model.state_dict()) == list(values)
        assert not adapter.training
        model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
        assert not torch.equal(model(**batch, logits_to_keep=1).logits, own)
    assert insides_of(model) == before
    assert adapter.training
    attached.detach()
    with pytest.raises(RuntimeError, match="in the middle"), attach(model, adapter, head, Constant(0.5)):
        raise RuntimeError("in the middle")
    assert insides_of(model) == before
    assert torch.equal(model(**batch, logits_to_keep=1).logits, own)
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_embeddings_stay_tied(tiny_model):
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.generation_config.eos_token_id = None
    adapter, head = make_adapter(model), derive_head(model, "head_input")
    ids = prompts(1)["input_ids"]
    with attach(model, adapter, head, Constant(0.5)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        found = model.generate(ids, max_new_tokens=5, do_sample=False)[0, 9:].tolist()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert found == slow(model, adapter, head, Constant(0.5), ids[0].tolist(), 5)[0]


def test_half_precision(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16)
    adapter, head = make_adapter(model), derive_head(model, "head_input")
    with attach(model, adapter, head, Constant(0.5)), torch.no_grad():
        logits = model(**prompts(), logits_to_keep=1).logits
    own = model(**prompts(), logits_to_keep=1).logits.float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.logsumexp(-1), own.logsumexp(-1), atol=1e-4, rtol=0)
    assert adapter.A.dtype == torch.float32


def test_one_pass_over_the_head(tiny_model):
    model, adapter, head = make(tiny_model)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(out.shape[1]))
    with attach(model, adapter, head, Fitted((0.5, 0.0, 1.0), span=3.0)) as attached, attached.inputs([2, 2, 2]):
        model.generate(**prompts(), max_new_tokens=6, do_sample=False)
    handle.remove()
    # Both for t = 0 and 1; the PLM alone for 2 and 3; both for 4 and 5, since the PLM gives the zero point.
    assert shapes == [2, 2, 1, 1, 2, 2]


def test_a_second_adapter_is_refused(tiny_model):
    model, adapter, head = make(tiny_model)
    with (
        attach(model, adapter, head, Constant(0.5)),
        pytest.raises(ConfigError, match="LlamaForCausalLM has an adapter attached already"),
    ):
        attach(model, adapter, head, Constant(0.5))
    attach(model, adapter, head, Constant(0.5)).detach()


def test_what_does_not_fit_is_refused(tiny_model, tiny_plm):
    model, adapter, head = make(tiny_model)
    small = tiny_model("llama", vocab_size=200)
    with pytest.raises(MismatchError, match=r"adapter is for a head of 200 x 32, this head is 320 x 32"):
        attach(model, make_adapter(small), head, Constant(0.5))
    with pytest.raises(MismatchError, match=r"head bundle is 200 x 32, the model's output head is 320 x 32"):
        attach(model, make_adapter(small), derive_head(small, "head_input"), Constant(0.5))
    with pytest.raises(ConfigError, match="prompt_overhead_tokens=-1 is too small: it must be at least 0"):
        attach(model, adapter, head, Constant(0.5), prompt_overhead_tokens=-1)
    with pytest.raises(OwnerError, match="LlamaModel"):
        attach(model.model, adapter, head, Constant(0.5))
    attach(model, adapter, head, Constant(0.5)).detach()


def test_the_former_name_of_prompt_overhead_tokens(tiny_model):
    model, adapter, head = make(tiny_model)
    schedule, batch = GradualUnrolling(0.9), prompts()
    with attach(model, adapter, head, schedule, prompt_overhead_tokens=OVERHEAD):
        expected = model.generate(**batch, max_new_tokens=5)
    with (
        pytest.warns(DeprecationWarning, match="overhead is now prompt_overhead_tokens"),
        attach(model, adapter, head, schedule, overhead=OVERHEAD),
    ):
        assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)
    with pytest.raises(ConfigError, match="overhead=3 is the former name of prompt_overhead_tokens=4"):
        attach(model, adapter, head, schedule, prompt_overhead_tokens=4, overhead=3)


def test_what_cannot_be_known_is_refused(tiny_model):
    model, adapter, head = make(tiny_model)
    batch = prompts()
    cache = state_of(model(**batch))
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=None) as attached:
        with pytest.raises(ConfigError, match="GradualUnrolling needs the length of the input"):
            model.generate(**batch, max_new_tokens=2)
        with pytest.raises(ConfigError, match="leave the labels out"):
            model(**batch, labels=batch["input_ids"])
        with pytest.raises(ConfigError, match="logits_to_keep must be a number"):
            model(**batch, logits_to_keep=torch.tensor([1]))
        with pytest.raises(ConfigError, match="cache was filled before"):
            model(batch["input_ids"][:, :1], **{OUTPUT_NAME: cache})
        with pytest.raises(ConfigError, match="one length of at least 1"), attached.inputs([0, 1]):
            pass
        with pytest.raises(ConfigError, match="columns is the number of positions"), attached.inputs(columns=0):
            pass
        with pytest.raises(ConfigError, match="2 input lengths do not fit a batch of 3"), attached.inputs([1, 2]):
            model(**batch)
        with attached.inputs([6, 4, 2]):
            with pytest.raises(ConfigError, match="without a cache the step is unknown"):
                model(**batch, use_cache=False, logits_to_keep=1)
            with pytest.raises(ConfigError, match=r"logits at 9 positions.*logits_to_keep=1.*columns"):
                model(**batch)
            begun = state_of(model(**batch, logits_to_keep=1))
            with pytest.raises(ConfigError, match="2 positions after 9 in the cache may be the rest of the prompt"):
                model(batch["input_ids"][:, :2], **{OUTPUT_NAME: begun})
        with pytest.raises(OwnerError, match="cache of type list"):
            model(batch["input_ids"], **{OUTPUT_NAME: []})


def test_a_model_that_goes_around_its_head_is_refused(tiny_model):
    model, adapter, head = make(tiny_model)
    with attach(model, adapter, head, Constant(0.5)):
        unhooked = torch.nn.Linear(32, 320)
        model.lm_head, kept = unhooked, model.lm_head
        with pytest.raises(OwnerError, match="without calling its output head"):
            model(**prompts())
        model.lm_head = kept


def test_a_schedule_of_ones_own(tiny_model):
    class Late:
        def weights(self, step, input_length):
            return (step >= 2).float() * torch.ones_like(input_length)

    class Wrong:
        def weights(self, step, input_length):
            return 1.5 * torch.ones_like(step * input_length)

    model, adapter, head = make(tiny_model)
    ids = prompts(1)["input_ids"]
    with attach(model, adapter, head, Late(), prompt_overhead_tokens=0):
        found = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    assert found == slow(model, adapter, head, Late(), ids[0].tolist(), 4)[0]
    with (
        attach(model, adapter, head, Wrong(), prompt_overhead_tokens=0),
        pytest.raises(ConfigError, match=r"Wrong returns weights"),
    ):
        model(ids)


def test_a_static_cache_with_padding(tiny_model):
    model, adapter, head = make(tiny_model)
    batch = prompts()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, adapter, head, GradualUnrolling(0.9), prompt_overhead_tokens=OVERHEAD):
        plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
        static = model.generate(**batch, **{OUTPUT_NAME: cache}, max_new_tokens=5, do_sample=False)
    assert plain.tolist() == static.tolist()
