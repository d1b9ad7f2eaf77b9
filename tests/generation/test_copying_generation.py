import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plugin import prompts

from pema.adapter.config import AdapterConfig
from pema.adapter.copying import context_tokens
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, GradualUnrolling
from pema.errors import ConfigError
from pema.generation.decoding import generate
from pema.generation.mixture import mix
from pema.generation.plugin import attach
from pema.owner.session_model import SessionModel
from pema.pages.inspector.inspection import inspect_generation
from pema.tasks.registry import Task
from pema.tasks.spelling import speller_of
from pema.tasks.template import Template

FRAME = (2, 1)
STEPS = 7


def make(tiny_plm, family="llama", *, seed=1, eos=None):
    plm = tiny_plm(family)
    plm.model.generation_config.eos_token_id, plm.model.generation_config.pad_token_id = eos, 0
    head = plm.head()
    config = AdapterConfig(
        d=head.d,
        vocabulary_size=head.vocabulary_size,
        rank=8,
        residual=True,
        activation="gelu",
        copy_width=16,
        frame=FRAME,
    )
    adapter = Adapter(config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.B_pd.copy_(torch.randn(adapter.B_pd.shape, generator=random))
        for parameter in adapter.copying.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
        adapter.copying.gate_match.add_(2)
    return plm, adapter.eval()


def plugged(plm, adapter, schedule=None, model=None):
    return attach(
        model or plm.model,
        adapter,
        plm.head(),
        schedule or Constant(0.7),
        prompt_overhead_tokens=3,
        tokenizer=plm.tokenizer,
    )


@torch.no_grad()
def slow(plm, adapter, schedule, ids, steps=STEPS, choose=None, frame=FRAME):
    """One sequence, no cache, no hooks, everything recomputed at each step. Returns tokens and distributions."""
    prompt, written, seen, head = list(ids), [], [], plm.head()
    module = plm.model.get_output_embeddings()
    length = torch.tensor([max(1, len(prompt) - 3)])
    for t in range(steps):
        kept = []
        handle = module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][:, -1]))
        log_p_plm = plm.model(torch.tensor([prompt + written]), use_cache=False).logits[:, -1].float().log_softmax(-1)
        handle.remove()
        context = context_tokens(speller_of(plm.tokenizer), [prompt], [written], frame)
        log_p_pema = adapter.log_probs(kept[0], head, context)
        log_p = mix(log_p_plm, log_p_pema, schedule.weights(torch.tensor([t]), length))[0]
        seen.append(log_p)
        written.append(int(log_p.argmax()) if choose is None else choose[t])
    return written, torch.stack(seen)


def rows_of(batch):
    return [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("family", ["llama", "opt-projected", "gemma2", "cohere", "mamba"])
@pytest.mark.parametrize("schedule", [Constant(0.7), Constant(1.0), GradualUnrolling(0.9)], ids=lambda s: s.name)
def test_each_step_is_the_slow_loop(tiny_plm, family, schedule):
    plm, adapter = make(tiny_plm, family)
    batch = prompts()
    if family == "mamba":  # padding changes its state
        batch = {name: tensor[:1] for name, tensor in batch.items()}
    with plugged(plm, adapter, schedule):
        out = plm.model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    found = torch.stack(out.logits, 1).log_softmax(-1)
    copied = 0
    for row, prompt in enumerate(rows_of(batch)):
        tokens, log_p = slow(plm, adapter, schedule, prompt)
        assert out.sequences[row, 9:].tolist() == tokens
        copied += len(set(tokens) & set(prompt))
        torch.testing.assert_close(found[row].exp(), log_p.exp(), atol=1e-5, rtol=1e-3)
    assert copied


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_samples_have_the_slow_loops_distribution(tiny_plm, seed):
    plm, adapter = make(tiny_plm)
    batch = prompts(2, seed=seed)
    torch.manual_seed(seed)
    with plugged(plm, adapter):
        out = plm.model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=True,
            top_k=0,
            num_return_sequences=3,
            output_logits=True,
            return_dict_in_generate=True,
        )
    found = torch.stack(out.logits, 1).log_softmax(-1)
    for row, prompt in enumerate(prompt for prompt in rows_of(batch) for _ in range(3)):
        tokens = out.sequences[row, 9:].tolist()
        _, log_p = slow(plm, adapter, Constant(0.7), prompt, len(tokens), tokens)
        torch.testing.assert_close(found[row].exp(), log_p.exp(), atol=1e-5, rtol=1e-3)


def test_beams_have_the_slow_loops_scores(tiny_plm):
    plm, adapter = make(tiny_plm)
    batch = prompts()
    with plugged(plm, adapter):
        out = plm.model.generate(
            **batch,
            max_new_tokens=STEPS,
            do_sample=False,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for row, prompt in enumerate(prompt for prompt in rows_of(batch) for _ in range(2)):
        tokens = out.sequences[row, 9:].tolist()
        _, log_p = slow(plm, adapter, Constant(0.7), prompt, len(tokens), tokens)
        score = log_p[torch.arange(len(tokens)), torch.tensor(tokens)].sum()
        torch.testing.assert_close(out.sequences_scores[row], score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_same_alone_in_any_batch_and_in_a_session(tiny_plm, way):
    plm, adapter = make(tiny_plm, eos=2)
    batch = prompts(4, 11)
    settings = {"max_new_tokens": 9, "do_sample": False, **way}
    with plugged(plm, adapter):
        together = plm.model.generate(**batch, **settings)[:, 11:].tolist()
        alone = [plm.model.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist() for row in rows_of(batch)]
    with plugged(plm, adapter, model=(model := SessionModel(plm))):
        session = model.generate(**batch, **settings, eos_token_id=2, pad_token_id=0)[:, 11:].tolist()
    for one, many, remote in zip(alone, together, session, strict=True):
        width = max(map(len, (one, many, remote)))
        assert one + [0] * (width - len(one)) == many + [0] * (width - len(many))
        assert remote + [0] * (width - len(remote)) == many + [0] * (width - len(many))


def test_several_positions_of_a_pass_have_their_own_text(tiny_plm):
    plm, adapter = make(tiny_plm)
    ids = torch.tensor([rows_of(prompts())[0]])
    with plugged(plm, adapter):
        plain = plm.model.generate(ids, max_new_tokens=STEPS, do_sample=False)
        # Tokens of the prompt are proposed and checked several at once.
        found = plm.model.generate(ids, max_new_tokens=STEPS, do_sample=False, prompt_lookup_num_tokens=3)
    assert found.tolist() == plain.tolist()


def test_what_does_not_tell_the_prompt_is_refused(tiny_plm):
    plm, adapter = make(tiny_plm)
    batch = prompts(1)
    with pytest.raises(ConfigError, match=r"copies tokens of the prompt: attach with tokenizer=plm.tokenizer"):
        attach(plm.model, adapter, plm.head(), Constant(0.7))
    with plugged(plm, adapter):
        with pytest.raises(ConfigError, match="this pass does not tell them: call `generate`"):
            plm.model(**batch, logits_to_keep=1)
        with pytest.raises(ConfigError, match="leave out guidance_scale and inputs_embeds"):
            plm.model.generate(**batch, max_new_tokens=2, do_sample=False, guidance_scale=1.5)
        embeds = plm.model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ConfigError, match="leave out guidance_scale and inputs_embeds"):
            plm.model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)


def test_generate_reads_the_prompts_of_its_sources(tiny_plm):
    plm, adapter = make(tiny_plm)
    task = Task("echo", Template("Say {source} ="), (), "")
    sources = ["the old man", "sea", "a, (b) c", "the old sea"]
    together = generate(plm, adapter, sources, task, Constant(1.0), max_new_tokens=6)
    assert together == [
        generate(plm, adapter, [source], task, Constant(1.0), max_new_tokens=6)[0] for source in sources
    ]
    for source, text in zip(sources, together, strict=True):
        prompt = task.template.encode_prompts(plm.tokenizer, [source])[0].prompt
        tokens, _ = slow(plm, adapter, Constant(1.0), prompt, 6)
        assert plm.tokenizer.decode(tokens, skip_special_tokens=True).strip().startswith(text[:3])


def test_the_inspector_reads_the_prompt_too(tiny_plm):
    plm, adapter = make(tiny_plm)
    task = Task("echo", Template("Say {source} ="), (), "")
    inspected = inspect_generation(plm, adapter, "the old man", task, Constant(0.7), max_new_tokens=5)
    prompt = task.template.encode_prompts(plm.tokenizer, ["the old man"])[0].prompt
    tokens, _ = slow(plm, adapter, Constant(0.7), prompt, 5)
    assert [step.token for step in inspected.steps] == tokens
