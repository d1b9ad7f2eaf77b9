"""Calls of an attached model: concurrent, nested, in custom loops, and through wrappers."""

import asyncio
import copy
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StaticCache, T5Config, T5ForConditionalGeneration

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, Fitted, GradualUnrolling
from pema.errors import ConfigError, OwnerError
from pema.generation.plugin import attach
from pema.owner.causal_lm import state_argument, state_of
from pema.owner.derivation import derive_head

SCHEDULE, OVERHEAD, COLUMNS = GradualUnrolling(0.95), 2, 9


@pytest.fixture
def parts(tiny_model):
    return make(tiny_model, "llama")


def make(tiny_model, family):
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    vocabulary, d = model.get_output_embeddings().weight.shape
    adapter = Adapter(AdapterConfig(d=d, vocabulary_size=vocabulary, rank=8), seed=1)
    torch.nn.init.normal_(adapter.B_pd, generator=torch.Generator().manual_seed(1))
    return model, adapter, derive_head(model, "head_input")


def prompt(seed=0, columns=COLUMNS):
    return torch.randint(3, 320, (1, columns), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, steps=6, **settings):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **settings)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def go_on(model, ids, out, steps, *, positions=False):
    """A loop of one's own behind a pass that gave `out`."""
    tokens = []
    for t in range(steps):
        tokens.append(int(out.logits[0, -1].argmax()))
        place = {"position_ids": torch.tensor([[ids.shape[1] + t]])} if positions else {}
        out = model(torch.tensor([tokens[-1:]]), **{state_argument(model): state_of(out)}, **place)
    return tokens


def test_threads_are_as_one_after_the_other(parts):
    model, adapter, head = parts
    inputs = [prompt(seed, columns) for seed, columns in enumerate((3, 9, 14, 5))]
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        alone = [greedy(model, ids) for ids in inputs]
        assert len({tuple(tokens) for tokens in alone}) == len(alone)
        found = [[None] * 5 for _ in inputs]

        def work(i):
            for turn in range(5):
                found[i][turn] = greedy(model, inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[tokens] * 5 for tokens in alone]


def test_tasks_keep_their_own_inputs(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE) as attached:

        def one(length):
            with attached.inputs([length]):
                return greedy(model, ids)

        async def task(length):
            with attached.inputs([length]):
                await asyncio.sleep(0)
                here = greedy(model, ids)
                return here, await asyncio.to_thread(greedy, model, ids)

        async def both():
            return await asyncio.gather(task(1), task(20))

        short, long = one(1), one(20)
        assert short != long
        assert asyncio.run(both()) == [(short, short), (long, long)]


def test_a_thread_does_not_see_the_inputs_around_its_start(parts):
    model, adapter, head = parts
    ids, errors = prompt(), []

    def work():
        try:
            greedy(model, ids)
        except ConfigError as error:
            errors.append(str(error))

    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD) as attached, attached.inputs([4]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        greedy(model, ids)
    assert len(errors) == 1
    assert "`attached.inputs` is open in another thread" in errors[0]


class Runs(LogitsProcessor):
    """Runs `what` at every step and leaves the scores as they are."""

    def __init__(self, what):
        self.what, self.came = what, []

    def __call__(self, input_ids, scores):
        self.came.append(self.what())
        return scores


def test_a_call_inside_a_call(parts):
    model, adapter, head = parts
    ids, other = prompt(), prompt(3, 5)
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        alone, inner = greedy(model, ids), greedy(model, other)
        nested = Runs(lambda: greedy(model, other))
        assert greedy(model, ids, logits_processor=[nested]) == alone
        assert nested.came == [inner] * 6


def test_a_call_that_fails_leaves_nothing(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        alone = greedy(model, ids)
        with pytest.raises(ZeroDivisionError):
            greedy(model, ids, logits_processor=[Runs(lambda: 1 / 0)])
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        assert greedy(model, ids) == alone
        assert go_on(model, ids, model(ids, logits_to_keep=1), 6) == alone


def test_detaching_while_a_call_runs_is_refused(parts):
    model, adapter, head = parts
    ids = prompt()
    attached = attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD)
    alone = greedy(model, ids)

    def detach():
        with pytest.raises(ConfigError, match="LlamaForCausalLM is generating in another thread or inside this call"):
            attached.detach()

    assert greedy(model, ids, logits_processor=[Runs(detach)]) == alone
    began, may_end, found = threading.Event(), threading.Event(), []
    waits = Runs(lambda: (began.set(), may_end.wait(20)))
    thread = threading.Thread(target=lambda: found.append(greedy(model, ids, logits_processor=[waits])))
    thread.start()
    began.wait(20)
    detach()
    may_end.set()
    thread.join()
    assert found == [alone]
    attached.detach()
    assert greedy(model, ids) != alone


def test_what_was_put_over_the_plug_in_comes_away_first(parts):
    model, adapter, head = parts
    attached = attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.forward was replaced after the adapter was attached"):
        attached.detach()
    model.forward = ours
    attached.detach()
    assert "forward" not in vars(model)


def test_an_attached_model_is_not_copied(parts):
    model, adapter, head = parts
    with (
        attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD),
        pytest.raises(ConfigError, match="cannot be copied or pickled"),
    ):
        copy.deepcopy(model)
    assert greedy(copy.deepcopy(model), prompt()) == greedy(model, prompt())


def test_hooks_of_others_see_the_mixture(parts):
    model, adapter, head = parts
    seen = []
    handle = model.register_forward_hook(lambda _m, _args, out: seen.append(out.logits))
    with attach(model, adapter, head, Constant(0.5)):
        out = model(prompt(), logits_to_keep=1)
        straight = model.forward(prompt(), logits_to_keep=1)
    handle.remove()
    assert torch.equal(seen[0], out.logits)
    assert torch.equal(straight.logits, out.logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mamba", "minimax", "minimax-linear", "qwen3-next"])
def test_a_loop_of_ones_own_with_every_state(tiny_model, family):
    model, adapter, head = make(tiny_model, family)
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD), torch.no_grad():
        expected = greedy(model, ids)
        # MiniMax takes the positions from a cache that says 0.
        assert go_on(model, ids, model(ids, logits_to_keep=1), 6, positions=family == "minimax") == expected
        as_tuple = model(ids, logits_to_keep=1, return_dict=False)
        state = next(part for part in as_tuple[1:] if not isinstance(part, torch.Tensor | tuple))
        place = {"position_ids": torch.tensor([[COLUMNS]])} if family == "minimax" else {}
        second = model(torch.tensor([expected[:1]]), **{state_argument(model): state}, **place)
        assert int(second.logits[0, -1].argmax()) == expected[1]


def test_a_static_cache_that_is_used_again(parts):
    model, adapter, head = parts
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        for seed in (0, 4):
            ids = prompt(seed)
            expected = greedy(model, ids)
            cache.reset()
            out = model(ids, logits_to_keep=1, **{state_argument(model): cache})
            assert go_on(model, ids, out, 6) == expected


def test_a_cache_that_was_cropped(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD) as attached, torch.no_grad():
        expected = greedy(model, ids)
        cache = state_of(model(ids, logits_to_keep=1))
        for token in (expected[0], 7, 8):
            model(torch.tensor([[token]]), **{state_argument(model): cache})
        cache.crop(-2)
        out = model(torch.tensor([expected[1:2]]), **{state_argument(model): cache})
        assert int(out.logits[0, -1].argmax()) == expected[2]
        cache.crop(-6)
        with pytest.raises(ConfigError, match="1 positions after 5 in the cache may be the rest of the prompt"):
            model(ids[:, 5:6], **{state_argument(model): cache})
        with attached.inputs(columns=COLUMNS):
            out = model(ids[:, 5:], **{state_argument(model): cache})
            assert int(out.logits[0, -1].argmax()) == expected[0]


def test_a_prompt_in_parts_and_several_new_tokens_at_once(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD) as attached, torch.no_grad():
        expected = greedy(model, ids)
        whole = torch.cat((ids, torch.tensor([expected])), 1)
        with attached.inputs(columns=COLUMNS):
            cache = state_of(model(whole[:, :4]))
            model(whole[:, 4:8], **{state_argument(model): cache})
            logits = model(whole[:, 8:], **{state_argument(model): cache}).logits
        assert logits[0].argmax(-1).tolist()[:6] == expected


@pytest.mark.parametrize("family", ["minimax-linear", "mamba"])
def test_a_state_that_does_not_say_its_length(tiny_model, family):
    model, adapter, head = make(tiny_model, family)
    ids = prompt()
    with torch.no_grad():
        filled = state_of(model(ids[:, :5], use_cache=True))
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD) as attached, torch.no_grad():
        with pytest.raises(ConfigError, match=r"step is unknown: start with a new cache"), attached.inputs(columns=9):
            model(ids[:, 5:6], **{state_argument(model): filled})
        with pytest.raises(ConfigError, match="does not report its length, so the length of the prompt is unknown"):
            model.generate(ids[:, 5:], max_new_tokens=2, **{state_argument(model): filled})
        begun = state_of(model(ids[:, :5], logits_to_keep=1))
        expected = greedy(model, ids)
        assert greedy(model, ids[:, 5:], **{state_argument(model): begun}) == expected


def test_a_prompt_after_a_cache_of_several_kinds(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD), torch.no_grad():
        expected = greedy(model, ids)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
            model(ids[:, :5], logits_to_keep=1, **{state_argument(model): cache})
            assert greedy(model, ids, **{state_argument(model): cache}) == expected


def test_the_two_prompts_of_a_conversation(parts):
    model, adapter, head = parts
    ids = prompt()
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        second = torch.cat((first.sequences, prompt(5, 3)), 1)
        assert greedy(model, second, **{state_argument(model): state_of(first)}) == greedy(model, second)


def test_a_decoding_function_of_ones_own(parts):
    model, adapter, head = parts
    ids = prompt()

    def decode(model, input_ids, generation_config, **kwargs):
        settings = {key: kwargs[key] for key in ("attention_mask", "use_cache") if key in kwargs}
        out = model(input_ids, logits_to_keep=1, **settings)
        return torch.cat((input_ids, torch.tensor([go_on(model, input_ids, out, 6)])), 1)

    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        assert greedy(model, ids, custom_generate=decode) == greedy(model, ids)


def test_generating_from_nothing(parts):
    model, adapter, head = parts
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=0):
        found = model.generate(max_new_tokens=4, do_sample=False)
        assert found[0, 1:].tolist() == greedy(model, torch.tensor([[1]]), 4)


def test_a_second_sequence_while_candidates_are_checked_is_refused(parts):
    model, adapter, head = parts
    ids = prompt()
    ids[0, -3:] = ids[0, 1:4]
    runs = Runs(lambda: model(ids[:, -1:], use_cache=False))
    with (
        attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD),
        pytest.raises(
            ConfigError,
            match="so the step of any other pass is unknown",
        ),
    ):
        greedy(model, ids, prompt_lookup_num_tokens=3, logits_processor=[runs])


def test_a_generate_that_runs_the_model_in_a_custom_way_is_refused(parts):
    model, adapter, head = parts
    kept = type(model)._prefill
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        try:
            type(model)._prefill = lambda self, input_ids, *_args, **_kwargs: self(input_ids)
            with pytest.raises(OwnerError, match=r"LlamaForCausalLM.generate runs the model in a custom way"):
                greedy(model, prompt())
        finally:
            type(model)._prefill = kept


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_at_the_call(parts, name):
    model, adapter, head = parts
    with (
        attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD),
        pytest.raises(ConfigError, match=f"{name} is continuous batching"),
    ):
        getattr(model, name)([[5, 6, 7]])
    assert name not in vars(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrappers_around_a_model_are_refused_by_name(parts):
    from peft import LoraConfig, get_peft_model

    model, adapter, head = parts
    with pytest.raises(OwnerError, match=r"OptimizedModule is not a model of transformers.*`model._orig_mod`"):
        attach(torch.compile(model), adapter, head, SCHEDULE)
    with pytest.raises(OwnerError, match=r"DataParallel is not a model of transformers.*`model.module`"):
        attach(torch.nn.DataParallel(model), adapter, head, SCHEDULE)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    with pytest.raises(OwnerError, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach(t5, adapter, head, SCHEDULE)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(OwnerError, match=r"PeftModel is not a model of transformers.*`model.get_base_model\(\)`"):
        attach(wrapped, adapter, head, SCHEDULE)
    with attach(wrapped.get_base_model(), adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        through = wrapped.generate(input_ids=prompt(), max_new_tokens=5, do_sample=False)
        assert through.tolist() == wrapped.get_base_model().generate(prompt(), max_new_tokens=5).tolist()
    assert through.tolist() != wrapped.generate(input_ids=prompt(), max_new_tokens=5, do_sample=False).tolist()


def test_a_penalty_treats_all_steps_alike(parts):
    """A repetition penalty divides logits above zero and multiplies those below: it needs the PLM's zero point."""
    model, adapter, head = parts
    ids, settings = prompt(), {"repetition_penalty": 1.7, "output_logits": True, "output_scores": True}
    settings |= {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **settings)
    runs = []
    for weight in (0.0, 1e-9):
        with attach(model, adapter, head, Constant(weight)):
            runs.append(model.generate(ids, **settings))
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist() == plain.sequences.tolist()
    assert all(torch.equal(a, b) for a, b in zip(runs[0].scores, plain.scores, strict=True))
    for a, b in zip(runs[1].scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    # Within one text: a weight that reaches zero and comes back keeps the normaliser of the PLM.
    with attach(model, adapter, head, Fitted((0.5, 0.0, 1.0), span=1.0)) as attached, attached.inputs([4]):
        out = model.generate(ids, **settings)
    for t, logits in enumerate(out.logits):
        own = model(out.sequences[:, : COLUMNS + t]).logits[:, -1]
        torch.testing.assert_close(logits.logsumexp(-1), own.logsumexp(-1), atol=1e-4, rtol=1e-4)
