"""A small LM mixed with the PLM, against slow obvious loops, on tiny PLMs."""

import dataclasses
import itertools
import math

import pytest
import torch
from tests.methods.made_jobs import EXAMPLES, SOURCES, TASK, job, run, save_plm
from tests.tiny import BOS, EOS, build_model, build_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from pema.errors import AdapterError, ConfigError, MismatchError, OwnerError
from pema.generation.batches import plain
from pema.generation.decoding import decode
from pema.generation.texts import text_of
from pema.methods.emulator import MODEL
from pema.methods.full import FullFineTuning
from pema.methods.offsite import OffsiteTuning
from pema.methods.plm_alone import PLMAlone
from pema.methods.small_lm import FILE, SmallLM
from pema.methods.small_models import combine, first_layers, load_small, load_tuned
from pema.owner.local import LocalPLM

METHOD = SmallLM(layers=1, learning_rate=3e-3, batch_size=4, epochs=3)
LABELS = ["das Haus", "der Hund", "das Haus ist klein"]


def stages(method, given, folder):
    """The PLM of a job, and what the stages of a run make."""
    plm, prepared = LocalPLM.load(given.plm, dtype="float32"), folder / "prepared"
    prepared.mkdir(parents=True)
    method.prepare(plm, given, prepared)
    report, trained = run(method, given, folder)
    return plm, given, prepared, trained, report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_plm(tmp_path_factory.mktemp("plm") / "tiny", layers=3)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    return stages(METHOD, job(folder), tmp_path_factory.mktemp("small"))


def opened(made, **changes):
    plm, given, prepared, trained, _ = made
    return dataclasses.replace(METHOD, **changes).open(plm, given, prepared, trained)


def parts(made):
    """The PLM, the tuned and the untuned small LM, as models of transformers."""
    plm, given, prepared, trained, _ = made
    untuned = load_small(prepared / MODEL, plm, given)
    return plm.model, load_tuned(untuned, trained / FILE).model, untuned.model


@torch.no_grad()
def slow_p(models, context, mixture, weight):
    """The combination after a context, from the whole context and without a cache."""
    plm, tuned, untuned = (model(torch.tensor([context])).logits[0, -1].double() for model in models)
    if mixture == "logits":
        return torch.softmax(plm + weight * (tuned - untuned), -1)
    return weight * torch.softmax(tuned, -1) + (1 - weight) * torch.softmax(plm, -1)


def slow_text(plm, models, source, mixture, weight):
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, [source])
    tokens = []
    while len(tokens) < 2 * prompt.source_length + 16 and EOS not in tokens:
        tokens.append(int(slow_p(models, [*prompt.prompt, *tokens], mixture, weight).argmax()))
    return text_of(plm.tokenizer, tokens, cut=EOS not in tokens)


def save_narrow(folder):
    """A small LM of another family and width with the same tokenizer."""
    config = GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, vocab_size=320, eos_token_id=EOS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


COMBINATIONS = [("probabilities", 0.4), ("probabilities", 1.0), ("logits", 1.0), ("logits", 0.3)]


@pytest.mark.parametrize(("mixture", "weight"), COMBINATIONS)
def test_greedy_in_a_batch_is_a_slow_loop_over_single_contexts(made, mixture, weight):
    plm, models = made[0], parts(made)
    with opened(made, mixture=mixture, weight=weight) as adapted:
        together = adapted.generate(SOURCES)
        assert together == adapted.generate(SOURCES, batch_size=1)
    slow = [slow_text(plm, models, source, mixture, weight) for source in SOURCES]
    assert together.texts == slow
    assert len(set(slow)) > 1


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
@pytest.mark.parametrize(("mixture", "weight"), COMBINATIONS[::2])
def test_beams_and_samples_are_those_of_the_slow_mixture(made, mixture, weight, settings):
    plm, models = made[0], parts(made)
    # A processor gets batches of prompts of one length, and samples depend on their batch.
    sources = [example.source for example in EXAMPLES[::4]]

    def slow(ids, _scores):
        rows = [row[row.index(BOS) :] for row in ids.tolist()]
        return torch.stack([slow_p(models, row, mixture, weight).log().float() for row in rows])

    settings = {"max_new_tokens": 9, **settings}
    slowly = decode(plm, plm.model, sources, TASK, plain, **settings, logits_processor=[slow])
    with opened(made, mixture=mixture, weight=weight) as adapted:
        assert adapted.generate(sources, **settings) == slowly
        assert adapted.generate(sources, max_new_tokens=9) != slowly


@pytest.mark.parametrize(("mixture", "weight"), COMBINATIONS)
def test_perplexity_and_labels_are_those_of_a_slow_loop(made, mixture, weight):
    plm, models = made[0], parts(made)

    def log_p(prompt, target):
        contexts = ([*prompt, *target[:i]] for i in range(len(target)))
        return [
            math.log(slow_p(models, context, mixture, weight)[token])
            for context, token in zip(contexts, target, strict=True)
        ]

    encoded = TASK.template.encode(plm.tokenizer, EXAMPLES[:5])
    each = list(itertools.chain(*(log_p(one.prompt, one.target) for one in encoded)))
    with opened(made, mixture=mixture, weight=weight) as adapted:
        assert math.log(adapted.perplexity(EXAMPLES[:5])) == pytest.approx(-sum(each) / len(each), rel=1e-4)
        found = adapted.classify(SOURCES[:2], LABELS)
    for row, source in enumerate(SOURCES[:2]):
        examples = [dataclasses.replace(EXAMPLES[0], source=source, target=label) for label in LABELS]
        labels = TASK.template.encode(plm.tokenizer, examples)
        slow = [sum(log_p(one.prompt, one.target)) for one in labels]
        assert found.log_probs[row].tolist() == pytest.approx(slow, rel=1e-4)


def test_without_weight_it_is_the_plm(made, tmp_path):
    plm, given, *_ = made
    alone = PLMAlone().open(plm, given, tmp_path, tmp_path)
    for mixture in ("probabilities", "logits"):
        with opened(made, mixture=mixture, weight=0.0) as adapted:
            assert adapted.generate(SOURCES) == alone.generate(SOURCES)
            assert adapted.perplexity(EXAMPLES) == pytest.approx(alone.perplexity(EXAMPLES), rel=1e-5)


def test_the_small_lm_alone_is_full_fine_tuning_of_the_small_lm(made, folder, tmp_path):
    plm, given, prepared, trained, report = made
    full = FullFineTuning(learning_rate=METHOD.learning_rate, batch_size=4, epochs=3)
    there = dataclasses.replace(given, plm=str(prepared / MODEL))
    alone, output = run(full, there, tmp_path)
    assert (output / FILE).read_bytes() == (trained / FILE).read_bytes()
    assert alone.trainable_parameters == report.trainable_parameters < plm.description.parameters
    small = LocalPLM.load(prepared / MODEL, dtype="float32")
    with full.open(small, there, tmp_path, output) as tuned, opened(made, weight=1.0) as adapted:
        assert adapted.generate(SOURCES) == tuned.generate(SOURCES)
        assert adapted.perplexity(EXAMPLES) == pytest.approx(tuned.perplexity(EXAMPLES), rel=1e-5)
        assert adapted.disk_bytes == tuned.disk_bytes == (trained / FILE).stat().st_size
    with opened(made, mixture="logits") as adapted:
        assert adapted.disk_bytes == pytest.approx(2 * tuned.disk_bytes, rel=0.05)


def test_training_helps_and_does_not_change_the_plm(made, tmp_path):
    plm, given, *_, report = made
    before = {name: weight.clone() for name, weight in plm.model.state_dict().items()}
    assert report.helped
    alone = PLMAlone().open(plm, given, tmp_path, tmp_path)
    with opened(made, weight=0.7) as adapted:
        assert adapted.perplexity(EXAMPLES) < 0.7 * alone.perplexity(EXAMPLES)
        adapted.generate(SOURCES[:1])
    assert all(torch.equal(weight, before[name]) for name, weight in plm.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])
def test_random_layers_between_the_embeddings_of_the_head(family, dtype, tmp_path):
    plm = LocalPLM(build_model(family, layers=3, dtype=dtype), build_tokenizer())
    METHOD.prepare(plm, job(tmp_path), tmp_path)
    small = LocalPLM.load(tmp_path / MODEL, dtype=dtype)
    assert torch.equal(small.head().weight, plm.head().weight)
    assert torch.equal(small.model.get_input_embeddings().weight, plm.head().weight)
    # The matrices of its layers are not the PLM's; norms and biases start with ones and zeros.
    theirs = dict(plm.model.named_parameters())
    layers = {name: p for name, p in small.model.named_parameters() if ".0." in name}
    assert len(layers) > 5
    assert not any(torch.equal(p, theirs[name]) for name, p in layers.items())
    again = tmp_path / "again"
    again.mkdir()
    METHOD.prepare(plm, job(tmp_path, seed=5), again)
    assert (again / MODEL / "model.safetensors").read_bytes() == (tmp_path / MODEL / "model.safetensors").read_bytes()


def test_the_first_layers_of_the_plm_are_its_own(folder, tmp_path):
    plm = LocalPLM.load(folder, dtype="float32")
    dataclasses.replace(METHOD, layers=2, start="plm").prepare(plm, job(folder), tmp_path)
    small = LocalPLM.load(tmp_path / MODEL, dtype="float32").model
    assert len(small.model.layers) == 2
    theirs = dict(plm.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in small.named_parameters())
    whole = first_layers(plm.model, 3)
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, plm.model(ids).logits)
        seen = plm.model(ids, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(small(ids).logits, plm.model.lm_head(plm.model.model.norm(seen)), atol=1e-6)


def test_a_named_small_lm_of_the_same_family(folder, tmp_path):
    small = save_narrow(tmp_path / "small")
    made = stages(dataclasses.replace(METHOD, layers=4, small=str(small)), job(folder), tmp_path)
    plm, given, prepared, trained, report = made
    assert list(prepared.iterdir()) == []
    assert report.trainable_parameters == LocalPLM.load(small).description.parameters
    with SmallLM(small=str(small), weight=0.4).open(*made[:4]) as adapted:
        models = (plm.model, load_tuned(load_small(small, plm, given), trained / FILE).model, None)
        assert adapted.perplexity(EXAMPLES) < 300
        (prompt,) = TASK.template.encode_prompts(plm.tokenizer, SOURCES[:1])
        with torch.no_grad():
            p, q = (model(torch.tensor([prompt.prompt])).logits[0, -1].double().softmax(-1) for model in models[:2])
        first = plm.tokenizer.decode(int((0.6 * p + 0.4 * q).argmax()))
        assert adapted.generate(SOURCES[:1], max_new_tokens=1).texts == [first.strip()]


def test_vocabularies_of_a_family_are_padded_differently():
    plm = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for size in (5, 7, 9):
        tuned, untuned = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(1))
        q = torch.zeros(3, 7)
        q[:, : min(size, 7)] = torch.softmax(tuned[:, :7], -1)
        p = combine(plm, [tuned], 0.25).exp() / plm.exp().sum(-1, keepdim=True)
        assert torch.allclose(p, 0.25 * q + 0.75 * plm.softmax(-1), atol=1e-6)
        change = torch.zeros(3, 7)
        change[:, : min(size, 7)] = (tuned - untuned)[:, :7]
        assert torch.allclose(combine(plm, [tuned, untuned], 0.5), plm + 0.5 * change)


def test_settings_of_the_mixture_need_no_other_training(folder):
    grid = [dataclasses.replace(METHOD, mixture=m, weight=w) for m, w in COMBINATIONS]
    assert len({str(one.trained_by) for one in grid}) == 1
    assert dataclasses.replace(METHOD, start="plm").prepared_by != METHOD.prepared_by


def test_what_the_owner_hands_out():
    assert SmallLM().needs == SmallLM(small="other").needs == PLMAlone().needs
    assert SmallLM(start="plm").needs == OffsiteTuning().needs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, r"small-lm: weight=1\.5 is too large: a weight of probabilities is at most 1"),
        ({"weight": -0.1}, r"weight=-0\.1 is too small: it must be at least 0"),
        ({"layers": 0}, "layers=0 is too small: it must be at least 1"),
        ({"start": "zero"}, "unknown start 'zero': use random or plm"),
        ({"mixture": "both"}, "unknown mixture 'both': use probabilities or logits"),
        ({"small": "a", "start": "plm"}, "layers and start describe the small LM that is made .* small='a' names one"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SmallLM.of(settings)


def test_a_small_lm_that_does_not_fit_is_refused(folder, tmp_path):
    plm = LocalPLM.load(folder, dtype="float32")
    METHOD.require_suited(plm, job(folder).task)
    refused(dataclasses.replace(METHOD, layers=4), plm, folder, ConfigError, "layers=4 is too large: the PLM has 3 lay")
    other = tmp_path / "other"
    build_model().save_pretrained(other)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    refused(SmallLM(small=str(other)), plm, folder, MismatchError, "small-lm: other and tiny have different tokenizers")
    chatting = tmp_path / "chatting"
    build_model().save_pretrained(chatting)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(chatting)
    refused(SmallLM(small=str(chatting)), plm, folder, MismatchError, "small-lm: chatting and tiny have different chat")
    (chatting / "tokenizer.json").write_text("{")
    refused(SmallLM(small=str(chatting)), plm, folder, OwnerError, "the tokenizer of chatting cannot be loaded")
    SmallLM(small=str(folder)).require_suited(plm, job(folder).task)


def refused(method, plm, folder, kind, message):
    """Before the first run, and by each stage for itself."""
    with pytest.raises(kind, match=message):
        method.require_suited(plm, job(folder).task)
    with pytest.raises(kind, match=message):
        method.prepare(plm, job(folder), folder / "refused")


def test_weights_of_another_small_lm_are_refused(made, tmp_path):
    plm, given, prepared, trained, _ = made
    with pytest.raises(AdapterError, match=r"model.safetensors cannot be read .*: train again"):
        METHOD.open(plm, given, prepared, tmp_path)
    small = save_narrow(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"was trained on another PLM: .* is not a weight of this PLM"):
        SmallLM(small=str(small)).open(plm, given, prepared, trained)
