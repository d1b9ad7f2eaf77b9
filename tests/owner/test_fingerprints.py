"""Fingerprints change exactly if the function of a PLM or tokenizer changes."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from pema.errors import MismatchError
from pema.owner.bundle import digest_tensor
from pema.owner.contract import PLMDescription
from pema.owner.loading import tokenizer_fingerprint, tokenizer_fingerprints
from pema.owner.local import LocalPLM
from pema.owner.weights import essentials, fingerprint, model_fingerprints
from tiny import _LLAMA, EOS, FAMILIES, build_model, build_tokenizer


def with_config(family, **changes):
    model = build_model(family)
    for name, value in changes.items():
        assert hasattr(model.config, name), name
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rms_norm_eps": 1e-4}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"attn_logit_softcapping": 20.0}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("gemma2", {"sliding_window": 9}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("granite", {"residual_multiplier": 0.25}),
        ("cohere", {"logit_scale": 0.125}),
        ("falcon", {"alibi": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_of_the_function_count(family, changes):
    assert fingerprint(with_config(family, **changes)) != fingerprint(build_model(family))


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "5.0.0"},
        {"architectures": ["Other"]},
        {"dtype": "bfloat16"},
        {"use_cache": False},
        {"pad_token_id": EOS},
        {"bos_token_id": 7},
        {"eos_token_id": [2, 3]},
        {"attention_dropout": 0.5},
        {"initializer_range": 0.5},
        {"output_hidden_states": True},
        {"tie_word_embeddings": True},
        {"chunk_size_feed_forward": 3},
        {"problem_type": "regression"},
        {"_attn_implementation": "eager"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_settings_of_how_it_is_run_do_not_count(changes):
    assert fingerprint(with_config("llama", **changes)) == fingerprint(build_model("llama"))


def test_the_order_of_the_settings_does_not_count(tmp_path):
    build_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(build_model())


def test_rotary_settings_under_their_older_names():
    """transformers 5.0 to 5.24 write the same encoding in these ways."""
    plain = {key: value for key, value in _LLAMA.items() if key != "rope_parameters"}
    new = LlamaConfig(**plain, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    old = LlamaConfig(**plain, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=500.0)
    assert essentials(new) == essentials(old)
    phi = PhiConfig(**plain)
    before = essentials(phi)
    phi.partial_rotary_factor = phi.rope_parameters["partial_rotary_factor"]
    assert essentials(phi) == before
    gemma = FAMILIES["gemma3"]()
    before = essentials(gemma)
    gemma.rope_parameters |= {"rope_type": "default", "rope_theta": None}
    assert essentials(gemma) == before


def test_frequencies_that_somebody_wrote_into_count():
    model = build_model()
    before = fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert fingerprint(model) != before
    assert model_fingerprints(model).earlier == ()
    half = build_model().to(torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert fingerprint(half) == fingerprint(half.float())


def test_frequencies_left_by_a_long_pass_are_ignored():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**_LLAMA | {"max_position_embeddings": 8}, rope_parameters=rope)
    )
    before = fingerprint(model)
    model(torch.arange(3, 33)[None])
    assert fingerprint(model) == before


def tied():
    model = build_model("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def test_tied_embeddings_count_once_wherever_they_lie(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = fingerprint(tied())
    whole = tied()
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    assert fingerprint(whole) == expected
    with torch.no_grad():
        whole.lm_head.weight[5, 5] += 1
    assert fingerprint(whole) != expected
    tied().save_pretrained(tmp_path / "plm")
    try:
        on_disk = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plm", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
        )
    except ValueError as error:  # older versions of transformers put no whole model on the disk
        if "offload the whole model" not in str(error):
            raise
    else:
        assert any(p.device.type == "meta" for p in on_disk.parameters())
        if hasattr(on_disk.lm_head, "_hf_hook"):  # older versions of transformers lose the tied head
            assert fingerprint(on_disk) == expected
    offloaded = tied()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert fingerprint(offloaded) == expected


def test_equal_weights_that_are_not_tied_count_each():
    model, other = build_model(), build_model()
    with torch.no_grad():
        for one in (model, other):
            one.model.layers[0].input_layernorm.weight.fill_(1.0)
        other.model.layers[1].input_layernorm.weight.fill_(1.0)
    assert fingerprint(model) != fingerprint(other)


# --- what earlier versions wrote ------------------------------------------------------------------------------------


FIRST_IGNORED = {
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("attn_implementation", "output_attentions", "output_hidden_states", "return_dict", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "initializer_range", "init_std", "id2label", "label2id", "pretraining_tp"),
    "tie_word_embeddings",
}


def first_model_fingerprint(model):
    """The first formula, in a plain loop."""

    def keep(values):
        names = [n for n in values if n not in FIRST_IGNORED and not n.endswith(("dropout", "_pdrop", "layerdrop"))]
        return {n: keep(values[n]) if isinstance(values[n], dict) else values[n] for n in names}

    settings = {"architecture": type(model).__name__, "config": keep(model.config.to_diff_dict())}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = dict(model.named_parameters()) | {
        name: b for name, b in model.named_buffers() if name in model.state_dict()
    }
    for name in sorted(tensors):
        digest.update(name.encode() + digest_tensor(tensors[name]))
    return digest.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_formula_is_accepted(family):
    fingerprints = model_fingerprints(build_model(family))
    assert first_model_fingerprint(build_model(family)) in (fingerprints.current, *fingerprints.earlier)
    # Where every version of transformers writes the same settings, nothing has changed at all.
    assert fingerprints.earlier == () or family in ("mpt", "mamba", "gemma3", "phi")


def first_tokenizer_fingerprint(tokenizer):
    """What memories hold that were built when the padding token counted."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None), content.pop("truncation", None)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    content["special"] = {name: str(getattr(tokenizer, name, None)) for name in names}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def test_what_was_made_under_an_earlier_fingerprint_is_accepted(tiny_plm):
    now = tiny_plm().description
    old = replace(now, tokenizer_fingerprint=first_tokenizer_fingerprint(build_tokenizer()))
    assert old.tokenizer_fingerprint != now.tokenizer_fingerprint
    now.require_same(PLMDescription.from_dict(old.to_dict()), "the memory")
    mamba = LocalPLM(build_model("mamba"), build_tokenizer()).description
    assert len(mamba.earlier) == 1
    mamba.require_same(replace(mamba, fingerprint=mamba.earlier[0]), "the memory")
    with pytest.raises(MismatchError, match="the memory belongs to another PLM"):
        now.require_same(replace(mamba, fingerprint=mamba.earlier[0]), "the memory")
    assert not any(name.startswith("earlier") for name in mamba.to_dict())
    # A client on the other side of the network accepts the same.
    across = PLMDescription.from_dict(json.loads(json.dumps(now.to_dict() | now.accepted())))
    across.require_same(old, "the memory")


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["eos_token", "bos_token", None])
def test_the_padding_token_does_not_count(pad):
    tokenizer, other = build_tokenizer(), build_tokenizer()
    other.pad_token = None if pad is None else getattr(other, pad)
    texts = ["Grüße </s> an alle", "a\nb", "😀"]
    assert tokenizer(texts)["input_ids"] == other(texts)["input_ids"]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other)
    # A memory that was built with either is of both.
    assert first_tokenizer_fingerprint(tokenizer) in tokenizer_fingerprints(other).earlier
    assert first_tokenizer_fingerprint(other) in tokenizer_fingerprints(tokenizer).earlier


@pytest.mark.parametrize("name", ["padding_side", "truncation_side", "model_max_length", "chat_template"])
def test_how_a_tokenizer_is_used_does_not_count(name):
    other = build_tokenizer()
    setattr(other, name, {"model_max_length": 7, "chat_template": "{{ messages }}"}.get(name, "left"))
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(build_tokenizer())


def changed_backend(change):
    tokenizer = build_tokenizer()
    change(tokenizer.backend_tokenizer)
    return tokenizer


def added():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["house"])
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: changed_backend(lambda b: setattr(b, "normalizer", normalizers.Lowercase())),
        lambda: changed_backend(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        lambda: build_tokenizer(bos=False),
        lambda: build_tokenizer(vocab_size=300),
        added,
    ],
    ids=["normaliser", "add_prefix_space", "post-processor", "vocabulary", "added token"],
)
def test_what_a_tokenizer_makes_of_a_text_counts(make):
    assert tokenizer_fingerprint(make()) != tokenizer_fingerprint(build_tokenizer())


def test_which_token_ends_a_sequence_counts():
    other = copy.deepcopy(build_tokenizer())
    other.eos_token = "<s>"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(build_tokenizer())


def test_weights_are_hashed_by_their_values():
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert digest_tensor(weight.T.contiguous().T) == digest_tensor(weight)
    assert digest_tensor(weight.bfloat16().float()) == digest_tensor(weight.bfloat16())
    assert digest_tensor(weight) != digest_tensor(weight.bfloat16())
