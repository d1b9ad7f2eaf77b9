"""Loading, names, placement and fingerprints."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pema.errors import AdapterError, ConfigError, OwnerError
from pema.owner import loading
from pema.owner.contract import PLMDescription
from pema.owner.local import LocalPLM
from pema.owner.opening import open_plm
from pema.owner.weights import fingerprint
from tiny import EOS


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def changed(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "changed")


def test_a_loaded_plm_is_the_one_that_was_saved(folder, tiny_plm):
    plm = open_plm(folder)
    here, there = tiny_plm().description, plm.description
    assert there.name == "tiny-llama"
    assert {**there.to_dict(), "name": ""} == {**here.to_dict(), "name": ""}
    assert PLMDescription.from_dict(there.to_dict()) == there
    assert there.architecture == "LlamaForCausalLM"
    assert (there.d, there.d_tap, there.vocabulary_size, there.max_length) == (32, 32, 320, 128)
    assert there.eos_token_ids == (EOS,)
    assert there.parameters == sum(p.numel() for p in plm.model.parameters())
    assert here.name == "LlamaForCausalLM"
    found, expected = (next(p.represent([[1, 5, 6, 7]], [2])).representations for p in (plm, tiny_plm()))
    assert torch.equal(found, expected)


def test_the_name_never_contains_a_path(folder, tiny_tokenizer):
    for name in (str(folder), f"{folder}/", folder):
        assert LocalPLM.load(name).description.name == "tiny-llama"
    model = LocalPLM.load(folder).model
    assert LocalPLM(model, tiny_tokenizer()).description.name == "tiny-llama"
    model.config._name_or_path = "facebook/opt-125m"
    assert LocalPLM(model, tiny_tokenizer()).description.name == "facebook/opt-125m"


@pytest.mark.parametrize("family", ["llama", "opt-350m", "gemma2", "cohere", "falcon-alibi", "gpt2"])
def test_fingerprints_survive_a_round_trip(tiny_model, tiny_tokenizer, tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert LocalPLM.load(tmp_path).description.fingerprint == fingerprint(model)


def test_fingerprints_distinguish_plms(tiny_model):
    def turned():
        model = tiny_model()
        model.config.rms_norm_eps = 1e-4
        return model

    def one_weight():
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
        return model

    models = [tiny_model(), tiny_model(seed=1), tiny_model("mistral"), turned(), one_weight()]
    assert len({fingerprint(m) for m in models}) == 5
    other = tiny_model()
    other.config.use_cache = False
    other.config.attention_dropout = 0.5
    assert fingerprint(other) == fingerprint(models[0])


def test_a_checkpoint_has_one_fingerprint_in_its_own_type_and_in_float32(tiny_model):
    half = tiny_model(dtype=torch.bfloat16)
    assert fingerprint(half) == fingerprint(tiny_model(dtype=torch.bfloat16).float())
    assert fingerprint(half) != fingerprint(tiny_model())


def json_sha256(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def test_tokenizer_fingerprints(tiny_tokenizer, folder):
    mine = loading.tokenizer_fingerprint(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["a", "the house"], padding=True, truncation=True, max_length=4)
    assert loading.tokenizer_fingerprint(used) == mine
    assert LocalPLM.load(folder).description.tokenizer_fingerprint == mine
    assert loading.tokenizer_fingerprint(tiny_tokenizer(bos=False)) != mine
    assert loading.tokenizer_fingerprint(tiny_tokenizer(vocab_size=300)) != mine
    other = tiny_tokenizer()
    other.eos_token = "<s>"
    assert loading.tokenizer_fingerprint(other) != mine

    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "None"}
    fingerprints = loading.tokenizer_fingerprints(tiny_tokenizer())
    assert fingerprints.current == json_sha256(content | {"special": special})
    for pad in ("<pad>", "None", "</s>"):
        assert json_sha256(content | {"special": special | {"pad_token": pad}}) in fingerprints.earlier

    class Slow:
        eos_token = "</s>"

        def get_vocab(self):
            return {"a": 0}

    assert loading.tokenizer_fingerprint(Slow()) == loading.tokenizer_fingerprint(Slow()) != mine


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, torch.float32])
def test_dtype(folder, dtype):
    plm = LocalPLM.load(folder, dtype=dtype)
    assert str(dtype).endswith(str(plm.model.dtype).removeprefix("torch."))
    assert next(plm.represent([[1, 5, 6, 7]], [2])).representations.dtype == plm.model.dtype


def test_the_default_dtype_is_the_checkpoints_on_a_fast_processor(tmp_path, folder, tiny_model, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: False)
    slow = LocalPLM.load(tmp_path)
    assert slow.model.dtype == torch.float32
    line = (
        ": stored in bfloat16, computed in float32, because this processor is slow in bfloat16 (dtype auto: bfloat16)."
    )
    assert line in capsys.readouterr().err
    assert LocalPLM.load(tmp_path, dtype="auto").model.dtype == torch.bfloat16
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: True)
    fast = LocalPLM.load(tmp_path)
    assert fast.model.dtype == torch.bfloat16
    assert LocalPLM.load(folder).model.dtype == torch.float32
    assert "stored in" not in capsys.readouterr().err
    tiny_model(dtype=torch.float16).save_pretrained(tmp_path / "half")
    shutil.copytree(
        folder, tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True
    )
    assert LocalPLM.load(tmp_path / "half").model.dtype == torch.float32
    assert "half: stored in float16, computed in float32" in capsys.readouterr().err
    # What one machine built in bfloat16 is of the same PLM on another that computes in float32.
    slow.description.require_same(fast.description, "the memory")


def test_weights_say_their_type_where_the_configuration_does_not(changed, tiny_model, monkeypatch):
    tiny_model(dtype=torch.bfloat16).save_pretrained(changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key != "dtype"}))
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "has_bfloat16", lambda device, fast=fast: fast)
        assert LocalPLM.load(changed).model.dtype == dtype
    assert LocalPLM.load(changed, dtype="auto").model.dtype == torch.bfloat16


def test_a_dtype_that_is_none(folder):
    for dtype in ("int8", "half-ish"):
        with pytest.raises(ConfigError, match=f"dtype '{dtype}' is not a floating-point type"):
            LocalPLM.load(folder, dtype=dtype)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(folder, device_map):
    pytest.importorskip("accelerate")
    plm = LocalPLM.load(folder, device_map=device_map, tap="norm_input")
    assert plm.description.fingerprint == LocalPLM.load(folder).description.fingerprint
    assert next(plm.represent([[1, 5, 6, 7]], [2])).representations.shape == (2, 32)
    assert next(plm.predict([[1, 5, 6, 7]], [2])).generated.shape == (2,)


def test_offloaded_weights(tiny_model, tiny_tokenizer):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    whole = LocalPLM(tiny_model(), tiny_tokenizer(), tap="norm_input")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    plm = LocalPLM(model, tiny_tokenizer(), tap="norm_input")
    assert plm.description == whole.description
    found, expected = (next(p.represent([[1, 5, 6, 7]], [2])).representations for p in (plm, whole))
    assert torch.equal(found, expected)


def test_limits_that_the_configuration_does_not_name(tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    assert loading.max_length(tiny_model("bloom"), tokenizer) == loading.NO_LIMIT
    tokenizer.model_max_length = 77
    assert loading.max_length(tiny_model("bloom"), tokenizer) == 77
    assert loading.max_length(tiny_model("gpt2"), tokenizer) == 128
    assert loading.max_length(tiny_model("mpt"), tokenizer) == 128


def test_end_of_sequence_tokens(tiny_model, tiny_tokenizer):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [9, 4]
    assert loading.eos_token_ids(model, tokenizer) == (EOS, 4, 9)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert loading.eos_token_ids(model, tokenizer) == (EOS,)
    model.config.eos_token_id = None
    assert loading.eos_token_ids(model, tokenizer) == ()


def test_a_model_that_is_no_causal_language_model(changed):
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(OwnerError, match=r"changed cannot be loaded as a causal language model: .*T5Config"):
        LocalPLM.load(changed)
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(OwnerError, match=r"changed cannot be loaded as a causal language model: .*no-such-type"):
        LocalPLM.load(changed)


def test_weights_that_are_missing_are_not_made_up(changed):
    path = changed / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OwnerError, match=r"changed lacks 1 of the weights of LlamaForCausalLM \(model\.layers\.1\.mlp"):
        LocalPLM.load(changed)


def test_damaged_weights(changed):
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OwnerError, match="changed cannot be loaded as a causal language model"):
        LocalPLM.load(changed)


def test_a_missing_tokenizer(changed):
    for file in changed.glob("*token*"):
        file.unlink()
    with pytest.raises(OwnerError, match="the tokenizer of changed cannot be loaded"):
        LocalPLM.load(changed)


def test_a_placement_without_accelerate_says_its_install_command(folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(OwnerError, match=r"device_map=auto needs the accelerate library: pip install 'accel"):
        LocalPLM.load(folder, device_map="auto")


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("place", ["cpu", "meta", torch.device("meta")])
def test_a_placement_on_one_device_needs_no_accelerate(folder, monkeypatch, place, accelerate):
    if not accelerate:
        monkeypatch.setattr(loading, "find_spec", lambda name: None)
    loaded = loading.load(folder, dtype=None, device_map=place, revision=None)
    assert {parameter.device for parameter in loaded.model.parameters()} == {torch.device(place)}


def test_a_device_that_does_not_exist_is_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_as", None)
    with pytest.raises(AdapterError, match=r"device_map='cudaa' cannot be used .* Use device_map='auto'"):
        LocalPLM.load(folder, device_map="cudaa")


def test_no_code_of_a_checkpoint_is_run(changed):
    config = json.loads((changed / "config.json").read_text())
    ran = changed / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    (changed / "code.py").write_text(code)
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (changed / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "of-its-own"}))
    with pytest.raises(OwnerError, match="changed cannot be loaded as a causal language model"):
        LocalPLM.load(changed)
    # Where transformers knows the architecture itself, its own code is taken.
    (changed / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    assert type(LocalPLM.load(changed).model).__module__.startswith("transformers.")
    assert not ran.exists()


def test_pickled_weights_are_not_read(changed, tiny_model):
    (changed / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), changed / "pytorch_model.bin")
    with pytest.raises(OwnerError, match=r"changed cannot be loaded as a causal language model: .*safetensors"):
        LocalPLM.load(changed)
