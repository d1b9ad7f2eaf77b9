import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, GradualUnrolling, NoAdapter
from pema.errors import ConfigError, DataError, MismatchError
from pema.generation.decoding import generate, generate_counted
from pema.generation.plugin import attach
from pema.generation.texts import text_of
from pema.owner.causal_lm import OUTPUT_NAME, state_of
from pema.owner.session_model import SessionModel
from pema.tasks.registry import Task
from pema.tasks.template import Template

TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCES = ["the house", "a dog is here and the house is small", "the", "a dog", "the dog is small", "the house"]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


def make_adapter(plm, *, tokens=None, strength=1.0, owner=True):
    config = AdapterConfig(
        d=plm.head().d,
        vocabulary_size=plm.head().vocabulary_size,
        rank=8,
        vocabulary="full" if tokens is None else "seen",
        plm=plm.description if owner else None,
    )
    adapter = Adapter(config, tokens, seed=1)
    with torch.no_grad():
        adapter.B_pd.copy_(strength * torch.randn(config.d, 8, generator=torch.Generator().manual_seed(1)))
    return adapter


@torch.no_grad()
def one_by_one(plm, adapter, schedule, source, limit=None):
    """The obvious way: one source at a time, greedily, until the end-of-sequence token or the limit."""
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, [source])
    limit = limit or 2 * prompt.source_length + 16
    lengths = [prompt.source_length]
    with attach(plm.model, adapter, plm.head(), schedule) as attached, attached.inputs(source_lengths=lengths):
        out = plm.model(torch.tensor([prompt.prompt]), logits_to_keep=1)
        ids = [int(out.logits[0, -1].argmax())]
        while ids[-1] not in plm.description.eos_token_ids and len(ids) < limit:
            out = plm.model(torch.tensor([ids[-1:]]), **{OUTPUT_NAME: state_of(out)})
            ids.append(int(out.logits[0, -1].argmax()))
    return text_of(plm.tokenizer, ids, cut=ids[-1] not in plm.description.eos_token_ids)


@pytest.mark.parametrize("schedule", [GradualUnrolling(0.9), Constant(1.0), NoAdapter()], ids=lambda s: s.name)
def test_in_input_order_and_as_if_alone(plm, schedule):
    adapter = make_adapter(plm)
    expected = [one_by_one(plm, adapter, schedule, source) for source in SOURCES]
    for batch_size in (1, 2, 6):
        assert generate(plm, adapter, SOURCES, TASK, schedule, batch_size=batch_size) == expected


def test_beams_as_if_alone(plm):
    adapter, schedule = make_adapter(plm, strength=0.5), GradualUnrolling(0.9)
    together = generate(plm, adapter, SOURCES, TASK, schedule, num_beams=3)
    assert together == generate(plm, adapter, SOURCES, TASK, schedule, num_beams=3, batch_size=1)
    assert together[0] == together[5]
    assert together != generate(plm, adapter, SOURCES, TASK, schedule)


def test_the_plm_alone(plm):
    alone = generate(plm, None, SOURCES, TASK, GradualUnrolling(0.9))
    assert alone == generate(plm, make_adapter(plm), SOURCES, TASK, NoAdapter())
    assert alone != generate(plm, make_adapter(plm), SOURCES, TASK, Constant(0.9))


def test_sampling_is_fixed_by_its_seed(plm):
    adapter, state = make_adapter(plm), torch.get_rng_state()
    runs = [
        generate(plm, adapter, SOURCES, TASK, Constant(0.5), do_sample=True, seed=seed, top_k=0) for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_seen_vocabulary(plm):
    tokens = torch.tensor(sorted(plm.tokenizer("dog house", add_special_tokens=False)["input_ids"] + [2]))
    texts = generate(plm, make_adapter(plm, tokens=tokens.unique()), SOURCES, TASK, Constant(1.0), max_new_tokens=5)
    assert set("".join(texts)) <= set("doghouse ")


def test_limits(plm):
    adapter = make_adapter(plm)
    long, short = (generate(plm, adapter, SOURCES, TASK, Constant(0.9), max_new_tokens=n) for n in (10, 1))
    for source, a, b in zip(SOURCES, long, short, strict=True):
        assert a == one_by_one(plm, adapter, Constant(0.9), source, limit=10)
        assert a.startswith(b)
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, ["the house"])
    count = plm.max_length - len(prompt.prompt) + 4
    # The context window bounds the output, however much is asked for.
    assert generate(plm, adapter, ["the house"], TASK, Constant(0.9), max_new_tokens=10**6) == generate(
        plm, adapter, ["the house"], TASK, Constant(0.9), max_new_tokens=count
    )


def test_no_sources(plm):
    assert generate(plm, make_adapter(plm), [], TASK, Constant(0.5)) == []


def test_cut_texts_are_counted_and_reported(plm, capsys):
    adapter = make_adapter(plm)
    found = generate_counted(plm, adapter, SOURCES, TASK, Constant(0.9), max_new_tokens=3)
    assert found.cut == 6
    limit = "max_new_tokens=3, within the PLM's context window"
    note = " ".join(capsys.readouterr().err.split())
    assert f"6 of 6 texts are truncated at their token limit ({limit}): raise" in note
    assert found.tokens == 18
    # Everything ends a sequence: nothing is cut.
    everything = list(range(plm.description.vocabulary_size))
    found = generate_counted(plm, adapter, SOURCES, TASK, Constant(0.9), eos_token_id=everything)
    assert (found.cut, found.tokens) == (0, 6)
    assert "truncated" not in capsys.readouterr().err


@pytest.mark.parametrize("character", ["😀", "é", "語", "👩\u200d💻"])
def test_a_character_that_is_cut_is_left_out(plm, character):
    tokens = plm.tokenizer(f"ok {character}", add_special_tokens=False)["input_ids"]
    texts = [text_of(plm.tokenizer, tokens[:n], cut=True) for n in range(1, len(tokens) + 1)]
    assert texts[-1] == f"ok {character}"
    assert all("\ufffd" not in text and not text.endswith("\u200d") for text in texts)
    assert all(texts[-1].startswith(text) for text in texts)
    # What the PLM ended itself stays as it wrote it.
    assert "\ufffd" in text_of(plm.tokenizer, tokens[:-1], cut=False)


def test_the_text_is_that_of_the_tokens(plm):
    tokens = plm.tokenizer("the dog , do n't ( a )", add_special_tokens=False)["input_ids"]
    plm.tokenizer.clean_up_tokenization_spaces = True
    try:
        assert text_of(plm.tokenizer, tokens, cut=False) == "the dog , do n't ( a )"
    finally:
        plm.tokenizer.clean_up_tokenization_spaces = False


def test_lines_stay_as_they_are(plm):
    tokens = plm.tokenizer(" Das Haus\n\n  ist\tklein.\n", add_special_tokens=False)["input_ids"]
    assert text_of(plm.tokenizer, tokens, cut=False) == "Das Haus\n\n  ist\tklein."
    assert text_of(plm.tokenizer, plm.tokenizer("\n", add_special_tokens=False)["input_ids"], cut=False) == ""


def test_the_model_is_unchanged(plm):
    adapter = make_adapter(plm)
    generate(plm, adapter, SOURCES[:1], TASK, Constant(0.5), max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"the model cannot generate with .*temperature=-1\.0"):
        generate(plm, adapter, SOURCES[:1], TASK, Constant(0.5), do_sample=True, temperature=-1.0)
    assert "generate" not in plm.model.__dict__
    assert not plm.model._forward_hooks
    assert not plm.model._forward_pre_hooks


def test_bad_input_is_refused(plm, tiny_plm):
    adapter = make_adapter(plm)
    with pytest.raises(DataError, match="source 2: the source is blank"):
        generate(plm, adapter, ["a", " "], TASK, Constant(0.5))
    with pytest.raises(DataError, match=r"source 3: its prompt has \d+ tokens, and the PLM takes 128"):
        generate(plm, adapter, ["a", "b", "a dog " * 200], TASK, Constant(0.5))
    for name in ("batch_size", "num_beams", "max_new_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0 is too small: it must be at least 1"):
            generate(plm, adapter, ["a"], TASK, Constant(0.5), **{name: 0})
    with pytest.raises(ConfigError, match="max_length=0 is too small: it must be at least 1"):
        generate(plm, adapter, ["a"], TASK, Constant(0.5), max_length=0)
    with pytest.raises(DataError, match=r"source 1: its prompt has \d+ tokens, and the PLM takes 3"):
        generate(plm, adapter, ["a"], TASK, Constant(0.5), max_length=3)
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        generate(plm, make_adapter(tiny_plm("llama", seed=1)), ["a"], TASK, Constant(0.5))


class Elsewhere:
    """A PLM whose model is not in the process: it decodes in sessions."""

    def __init__(self, plm):
        self.description, self.tokenizer, self.head = plm.description, plm.tokenizer, plm.head
        self.open_session, self.model = plm.open_session, SessionModel(plm)
        self.generator = self.model


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("schedule", [GradualUnrolling(0.9), Constant(0.5), Constant(1.0)], ids=lambda s: s.name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-projected"])
@pytest.mark.parametrize("tap", ["head_input", "norm_input"])
def test_a_session_gives_the_tokens_of_the_model_itself(tiny_plm, family, tap, schedule, settings):
    plm = tiny_plm(family, tap=tap)
    adapter = make_adapter(plm, strength=0.5)
    local = generate(plm, adapter, SOURCES, TASK, schedule, **settings)
    assert generate(Elsewhere(plm), adapter, SOURCES, TASK, schedule, **settings) == local
