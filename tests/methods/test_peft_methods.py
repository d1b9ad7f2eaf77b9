"""LoRA, IA3 and prefix-tuning by peft on tiny PLMs, in training and in `generate`."""

import copy
import dataclasses
import sys

import pytest
import torch
from tests.methods.made_jobs import EXAMPLES, SOURCES, TASK, job, run, save_plm
from tests.tiny import EOS, build_model, build_tokenizer
from transformers import GenerationConfig

from pema.errors import AdapterError, ConfigError, DataError
from pema.generation.texts import text_of
from pema.methods.peft_methods import FILE, IA3, LoRA, PrefixTuning
from pema.methods.plm_alone import PLMAlone
from pema.owner.local import LocalPLM
from pema.owner.weights import fingerprint
from pema.tasks.example import Example

# peft's own calls of transformers, by names that go.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache`:FutureWarning"),
]

METHODS = {
    "lora": LoRA(learning_rate=1e-2, batch_size=4, rank=4),
    "ia3": IA3(learning_rate=5e-2, batch_size=4),
    "prefix-tuning": PrefixTuning(learning_rate=5e-2, batch_size=4, prefix_length=4),
}
FAMILIES = ("llama", "opt", "gpt2")


@pytest.fixture(scope="module")
def plms(tmp_path_factory):
    folders = {family: save_plm(tmp_path_factory.mktemp(family) / family, family) for family in FAMILIES}
    return {family: (folder, LocalPLM.load(folder, dtype="float32")) for family, folder in folders.items()}


@pytest.fixture(scope="module", params=[(family, name) for family in FAMILIES for name in METHODS], ids="-".join)
def trained(request, plms, tmp_path_factory):
    family, name = request.param
    folder, plm = plms[family]
    figures, output = run(METHODS[name], job(folder), tmp_path_factory.mktemp("trained"))
    return METHODS[name], plm, job(folder), figures, output


def test_training_lowers_the_loss_and_does_not_change_the_plm(trained):
    method, plm, given, figures, output = trained
    before, kinds = fingerprint(plm.model), [type(module) for module in plm.model.modules()]
    tokens = torch.tensor([[1, 7, 8, 9]])
    logits = plm.model(input_ids=tokens).logits
    with method.open(plm, given, output, output) as adapted:
        losses = [point["held_out_loss"] for point in figures.curve]
        assert losses[-1] < losses[0] - 0.05
        assert adapted.perplexity(EXAMPLES) < PLMAlone().open(plm, given, output, output).perplexity(EXAMPLES)
        assert adapted.generate(SOURCES).tokens > 0
        assert torch.equal(plm.model(input_ids=tokens).logits, logits)
        assert adapted.disk_bytes == (output / FILE).stat().st_size
    assert fingerprint(plm.model) == before
    assert [type(module) for module in plm.model.modules()] == kinds
    assert "prepare_inputs_for_generation" not in vars(plm.model)
    assert method.needs.weights == "all"


def test_generation_settings_in_the_plms_folder_are_ignored(trained):
    method, plm, given, _, output = trained
    with method.open(plm, given, output, output) as adapted:
        usual = adapted.generate(SOURCES)
        inner = adapted.model.get_base_model() if hasattr(adapted.model, "get_base_model") else adapted.model
        brought = inner.generation_config = GenerationConfig(repetition_penalty=1.9, min_new_tokens=20)
        assert adapted.generate(SOURCES) == usual
        assert inner.generation_config is brought


def test_a_text_is_what_the_model_finds_most_likely_whatever_its_batch(trained):
    method, plm, given, _, output = trained
    with method.open(plm, given, output, output) as adapted:
        together = adapted.generate(SOURCES)
        assert together.texts == [adapted.generate([source]).texts[0] for source in SOURCES]
        for source, text in zip(SOURCES[2:4], together.texts[2:4], strict=True):
            (encoded,) = TASK.template.encode_prompts(plm.tokenizer, [source])
            tokens = list(encoded.prompt)
            for _ in range(2 * encoded.source_length + 16):
                with torch.no_grad():
                    logits = adapted.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
                if tokens[-1] == EOS:
                    break
            assert text_of(plm.tokenizer, tokens[len(encoded.prompt) :], cut=tokens[-1] != EOS) == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_an_adapter_that_learnt_nothing_is_the_plm(plms, tmp_path, family, name):
    folder, plm = plms[family]
    method = dataclasses.replace(METHODS[name], learning_rate=1e-30)
    _, output = run(method, job(folder, epochs=1), tmp_path)
    with method.open(plm, job(folder), output, output) as adapted:
        alone = PLMAlone().open(plm, job(folder), output, output)
        assert adapted.perplexity(EXAMPLES) == pytest.approx(alone.perplexity(EXAMPLES), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_the_merged_weights_compute_what_the_adapter_does(plms, tmp_path, family, name):
    peft = pytest.importorskip("peft")
    folder, plm = plms[family]
    method = METHODS[name]
    _, output = run(method, job(folder), tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(plm.model), str(output))
    tokens = torch.tensor([[1, 7, 8, 9, 4, 5]])
    with method.open(plm, job(folder), output, output) as adapted, torch.no_grad():
        assert type(adapted.model) is type(plm.model)
        merged, unmerged = (each(input_ids=tokens).logits for each in (adapted.model, model))
    plain = plm.model(input_ids=tokens).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    assert (merged - plain).abs().max() > 0.05


def test_the_numbers_that_lora_trains(plms, tmp_path):
    folder, plm = plms["llama"]
    layers = [m for m in plm.model.modules() if isinstance(m, torch.nn.Linear) and m is not plm.model.lm_head]
    figures, _ = run(METHODS["lora"], job(folder, epochs=1), tmp_path)
    assert figures.trainable_parameters == sum(4 * (layer.in_features + layer.out_features) for layer in layers)


def test_the_same_seed_trains_the_same_adapter_with_dropout(plms, tmp_path):
    folder, _ = plms["llama"]
    method = dataclasses.replace(METHODS["lora"], dropout=0.5)
    kept = [
        (run(method, job(folder, seed=seed, epochs=1), tmp_path / name)[1] / FILE).read_bytes()
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    assert kept[0] == kept[1] != kept[2]


def test_an_adapter_names_no_path(plms, tmp_path):
    folder, _ = plms["llama"]
    _, output = run(METHODS["lora"], job(folder, epochs=1), tmp_path)
    assert '"llama"' in (output / "adapter_config.json").read_text()
    for path in output.iterdir():
        assert str(folder).encode() not in path.read_bytes()


def test_lora_on_named_layers(plms, tmp_path):
    folder, _ = plms["opt"]
    method = LoRA.of({"rank": 2, "target_modules": ["q_proj", "v_proj"]})
    assert run(method, job(folder, epochs=1), tmp_path)[0].trainable_parameters == 2 * 2 * 2 * (32 + 32)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        (
            "llama",
            LoRA(target_modules=["nothing"]),
            r"lora does not fit LlamaForCausalLM \(Target modules .* set target",
        ),
        ("cohere", IA3(), "ia3 does not fit CohereForCausalLM .*: set target_modules and feedforward_modules to"),
        ("mistral", PrefixTuning(), r"prefix-tuning does not fit MistralForCausalLM \(its sliding-window attention"),
        ("gemma2", PrefixTuning(), r"prefix-tuning does not fit Gemma2ForCausalLM \(its sliding-window attention"),
        ("falcon", PrefixTuning(), "prefix-tuning does not fit FalconForCausalLM .*: choose lora"),
        ("mamba", PrefixTuning(), "prefix-tuning does not fit MambaForCausalLM .*: choose lora"),
    ],
)
def test_an_architecture_that_a_method_does_not_fit(tmp_path, family, method, message):
    with pytest.raises(ConfigError, match=message):
        method.trainable(LocalPLM(build_model(family), build_tokenizer()), tmp_path)


def test_ia3_on_an_architecture_that_peft_does_not_know(tmp_path):
    method = IA3.of({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]})
    model, _ = method.trainable(LocalPLM(build_model("cohere"), build_tokenizer()), tmp_path)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (16 + 16 + 48)


def test_the_prefix_takes_space_in_the_context_window(plms, tmp_path):
    folder, plm = plms["llama"]
    method = dataclasses.replace(METHODS["prefix-tuning"], prefix_length=100)
    with pytest.raises(DataError, match=r"example 12: it has \d+ tokens, but after 100 virtual tokens llama reads 28"):
        run(method, job(folder), tmp_path / "long")
    short = (Example("a", "b"), Example("b", "a"))
    _, output = run(method, job(folder, examples=short, epochs=1), tmp_path / "short")
    with method.open(plm, job(folder), output, output) as adapted:
        (encoded,) = TASK.template.encode_prompts(plm.tokenizer, ["the dog"])
        assert adapted.generate(["the dog"]).tokens <= 28 - len(encoded.prompt)
        with pytest.raises(DataError, match="the PLM takes 28 including the output"):
            adapted.generate(["xyz " * 12])


def test_what_is_no_adapter_is_refused(plms, tmp_path):
    folder, plm = plms["llama"]
    with pytest.raises(AdapterError, match=r"has no lora adapter that fits LlamaForCausalLM: .* Train again"):
        METHODS["lora"].open(plm, job(folder), tmp_path, tmp_path)
    _, output = run(METHODS["lora"], job(folder, epochs=1), tmp_path)
    with pytest.raises(AdapterError, match="has no lora adapter that fits OPTForCausalLM"):
        METHODS["lora"].open(plms["opt"][1], job(folder), output, output)


def test_without_peft_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"ia3 needs the library peft, which is not installed: pip install 'peft>="):
        IA3().trainable(LocalPLM(build_model(), build_tokenizer()), tmp_path)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (LoRA, {"rank": 0}, "lora: rank=0 is too small: it must be at least 1"),
        (LoRA, {"alpha": 0.0}, r"lora: alpha=0\.0 is too small: it must be more than 0"),
        (LoRA, {"dropout": 1.0}, r"lora: dropout=1\.0 is too large: it must be less than 1"),
        (LoRA, {"learning_rate": -1.0}, r"lora: learning_rate=-1\.0"),
        (IA3, {"target_modules": ["k_proj"]}, "target_modules and feedforward_modules need each other"),
        (PrefixTuning, {"prefix_length": 0}, "prefix-tuning: prefix_length=0 is too small: it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(method, settings, message):
    with pytest.raises(ConfigError, match=message):
        method.of(settings)
