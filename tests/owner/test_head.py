"""The derived head computes the model's logits, for every family and both taps; other models are refused."""

import json

import pytest
import torch
from torch import nn

from pema.errors import ConfigError, MismatchError, OwnerError
from pema.owner.bundle import NormSettings
from pema.owner.derivation import derive_head, find_final_norm, recognise_norm
from pema.owner.head import Head, Norm
from tiny import FAMILIES

WITHOUT_NORM = {"opt-350m"}
TAPS = [(f, tap) for f in FAMILIES for tap in ("head_input", "norm_input") if (f, tap) != ("opt-350m", "norm_input")]


def representations_and_logits(model, tap, tokens):
    """What the model itself computes: its input at the tap, and its logits."""
    module = model.get_output_embeddings() if tap == "head_input" else find_final_norm(model).module
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    handle.remove()
    return seen[0].flatten(0, 1), logits.flatten(0, 1)


def some_tokens(seed=7):
    return torch.randint(3, 320, (2, 11), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "tap"), TAPS)
def test_head_of_representations_equals_the_models_own_logits(tiny_model, family, tap):
    model = tiny_model(family)
    f, logits = representations_and_logits(model, tap, some_tokens())
    head = derive_head(model, tap)
    assert f.shape[1] == head.d_tap
    assert head.vocabulary_size == logits.shape[1]
    torch.testing.assert_close(head(f), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(head.logits(head.normalise(f)), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "tap"), [t for t in TAPS if t[0] in ("opt", "llama", "gemma2", "cohere", "granite")]
)
def test_half_precision_models(tiny_model, family, tap, dtype):
    model = tiny_model(family, dtype=dtype)
    f, logits = representations_and_logits(model, tap, some_tokens())
    head = derive_head(model, tap)
    assert head.weight.dtype == dtype
    assert head(f).dtype == torch.float32
    scale = logits.float().abs().max()
    assert (head(f) - logits.float()).abs().max() / scale < (4e-2 if dtype == torch.bfloat16 else 1e-2)
    full = derive_head(tiny_model(family), tap)
    assert (head.scale, head.soft_cap) == (full.scale, full.soft_cap)
    assert (head.norm and head.norm.settings) == (full.norm and full.norm.settings)


def test_what_the_derivation_finds(tiny_model):
    assert derive_head(tiny_model("cohere"), "head_input").scale == 0.0625
    assert derive_head(tiny_model("granite"), "head_input").scale == 0.125
    assert derive_head(tiny_model("gemma2"), "head_input").soft_cap == 3.0
    assert derive_head(tiny_model("phi"), "head_input").bias is not None
    projected = derive_head(tiny_model("opt-projected"), "norm_input")
    assert (projected.d, projected.d_tap) == (16, 32)
    assert derive_head(tiny_model("gemma"), "norm_input").norm.settings == NormSettings("rms", 1e-6, 1.0)
    assert derive_head(tiny_model("gpt2"), "norm_input").norm.settings == NormSettings("layer", 1e-5, 0.0)


def test_soft_cap_is_found_where_the_models_logits_are_too_small_to_show_it(tiny_model):
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
        assert model(input_ids=some_tokens()).logits.abs().max() < 0.3
    assert derive_head(model, "head_input").soft_cap == 30.0


def test_a_factor_that_the_configuration_does_not_name_is_fitted(tiny_model):
    model = tiny_model()
    change_logits(model, lambda logits: 0.3217 * logits)
    assert derive_head(model, "head_input").scale == pytest.approx(0.3217, rel=1e-5)
    model = tiny_model()
    change_logits(model, lambda logits: 7.3 * torch.tanh(0.41 * logits / 7.3))
    head = derive_head(model, "head_input")
    assert head.scale == pytest.approx(0.41, rel=1e-4)
    assert head.soft_cap == pytest.approx(7.3, rel=1e-4)


def change_logits(model, function):
    forward = model.forward

    def changed(*arguments, **settings):
        output = forward(*arguments, **settings)
        output.logits = function(output.logits)
        return output

    model.forward = changed


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda y: y + 0.5,
        lambda y: y.clamp(-20, 20),
        lambda y: y + 0.01 * y.square(),
        lambda y: y * torch.linspace(0.5, 2, y.shape[-1]),
        lambda y: y.log_softmax(-1),
        lambda y: y - 2 * y.roll(1, 0),
    ],
)
def test_an_output_that_is_not_understood_is_refused_by_name(tiny_model, function):
    model = tiny_model()
    change_logits(model, function)
    with pytest.raises(OwnerError, match=r"LlamaForCausalLM is not supported: its logits are not .* by up to \d"):
        derive_head(model, "head_input")


def test_an_output_embedding_that_is_not_linear_is_refused(tiny_model):
    model = tiny_model()
    model.lm_head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 320))
    with pytest.raises(OwnerError, match="LlamaForCausalLM is not supported: its output embedding is Sequential"):
        derive_head(model, "head_input")


def test_a_model_without_output_embedding_is_refused(tiny_model):
    with pytest.raises(OwnerError, match="LlamaModel is not supported: it has no output embedding"):
        derive_head(tiny_model().model, "head_input")


def test_logits_of_another_width_are_refused(tiny_model):
    model = tiny_model()
    change_logits(model, lambda logits: logits[..., :300])
    with pytest.raises(OwnerError, match="W_hd has 320 rows, the model's logits have 300 columns"):
        derive_head(model, "head_input")


def test_logits_at_other_positions_are_refused(tiny_model):
    model = tiny_model()
    change_logits(model, lambda logits: logits[:, 1:])
    with pytest.raises(OwnerError, match=r"its output embedding reads .*, but the model's logits have shape"):
        derive_head(model, "head_input")


def test_an_output_embedding_that_runs_twice_is_refused(tiny_model):
    model = tiny_model()
    change_logits(model, lambda logits: logits + 0 * model.lm_head(torch.zeros(1, 1, 32)).sum())
    with pytest.raises(OwnerError, match="its output embedding ran 2 times"):
        derive_head(model, "head_input")


def test_a_model_that_looks_ahead_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=False,
    )
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    with pytest.raises(OwnerError, match="BertLMHeadModel as configured is not a causal language model"):
        derive_head(model, "head_input")


def test_a_model_without_final_norm_has_no_norm_tap(tiny_model):
    with pytest.raises(OwnerError, match=r"OPTForCausalLM as configured has no final norm .* use tap 'head_input'"):
        derive_head(tiny_model("opt-350m"), "norm_input")


class OddNorm(nn.Module):
    def __init__(self, cube=False, gain=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.cube = cube
        if gain:
            self.gain = nn.Parameter(torch.ones(32))

    def forward(self, x):
        scale = x.abs().mean(-1, keepdim=True) if not self.cube else x.abs().pow(3).mean(-1, keepdim=True).pow(1 / 3)
        return x / scale * self.weight


@pytest.mark.parametrize(("norm", "match"), [(OddNorm(), "nearest layer norm"), (OddNorm(gain=True), "has parameters")])
def test_a_final_norm_that_is_not_understood_is_refused_by_name(tiny_model, norm, match):
    model = tiny_model()
    model.model.norm = norm
    assert derive_head(model, "head_input").norm is None
    with pytest.raises(OwnerError, match=f"final norm model.norm of LlamaForCausalLM.*{match}"):
        derive_head(model, "norm_input")


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(32, eps=0.013), nn.LayerNorm(32, elementwise_affine=False), nn.RMSNorm(32, eps=3e-4)]
)
def test_recognised_norms_keep_their_epsilon(module):
    norm = recognise_norm(module, torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), "it")
    assert norm.settings.eps == module.eps
    x = torch.randn(4, 32) * 1e-2
    torch.testing.assert_close(norm(x), module(x), atol=1e-5, rtol=1e-5)


def test_an_unknown_tap_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="unknown tap 'output'"):
        derive_head(tiny_model(), "output")


def test_derivation_does_not_change_the_model(tiny_model):
    model = tiny_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    derive_head(model, "norm_input")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_head_is_frozen_and_shares_the_models_memory(tiny_model):
    model = tiny_model("phi")
    head = derive_head(model, "norm_input")
    assert list(head.parameters()) == []
    assert not any(b.requires_grad for b in head.buffers())
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("family", ["phi", "gemma2", "cohere"])
def test_columns_subset_and_finish_agree_with_the_whole(tiny_model, family):
    head = derive_head(tiny_model(family), "norm_input")
    f = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([0, 7, 31, 200, 319])
    whole = head(f)
    h = head.normalise(f)
    torch.testing.assert_close(head.logits(h, tokens), whole[:, tokens])
    torch.testing.assert_close(head.subset(tokens)(f), whole[:, tokens])
    torch.testing.assert_close(head.finish(h @ head.weight.T), whole)
    torch.testing.assert_close(head.finish(h @ head.weight[tokens].T, tokens), whole[:, tokens])
    assert head.subset(tokens).vocabulary_size == 5
    assert head.subset(tokens).fingerprint != head.fingerprint


@pytest.mark.parametrize("family", ["opt-projected", "gemma2", "phi"])
def test_saving_and_loading_returns_the_same_head(tiny_model, tmp_path, family):
    head = derive_head(tiny_model(family), "norm_input")
    head.save(tmp_path / "head")
    again = Head.load(tmp_path / "head")
    f = torch.randn(5, 32)
    assert torch.equal(again(f), head(f))
    assert again.fingerprint == head.fingerprint
    assert again.settings == head.settings
    head.save(tmp_path / "head")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_W_hd_is_cast_while_it_is_read(tmp_path, monkeypatch, dtype):  # noqa: N802
    monkeypatch.setattr("pema.owner.bundle.ROWS", 7)
    weight, bias = torch.randn(24, 8).half(), torch.randn(24).half()
    Head(weight, bias, scale=2.0).save(tmp_path / "head")
    as_stored, cast = Head.load(tmp_path / "head"), Head.load(tmp_path / "head", dtype)
    assert cast.weight.dtype == dtype
    assert torch.equal(cast.weight, weight.to(dtype))
    assert cast.bias.dtype == torch.float16
    assert torch.equal(cast.bias, bias)
    assert cast.scale == 2.0
    assert cast.fingerprint == as_stored.fingerprint


def test_the_fingerprint_survives_casts_and_tells_heads_apart(tiny_model, tmp_path):
    half = derive_head(tiny_model(dtype=torch.bfloat16), "norm_input")
    wide = derive_head(tiny_model(dtype=torch.bfloat16).float(), "norm_input")
    assert half.fingerprint == wide.fingerprint
    full = derive_head(tiny_model(), "norm_input")
    fingerprint = derive_head(tiny_model(), "norm_input").fingerprint
    full.save(tmp_path / "head")
    assert Head.load(tmp_path / "head").fingerprint == fingerprint
    assert full.to(torch.bfloat16).fingerprint == fingerprint
    for cast in (full, Head.load(tmp_path / "head", torch.bfloat16)):
        with pytest.raises(OwnerError, match=r"was cast to torch.bfloat16 after it was created: save it before"):
            cast.save(tmp_path / "head")
    Head.load(tmp_path / "head", torch.float32).save(tmp_path / "again")
    assert Head.load(tmp_path / "again").fingerprint == fingerprint
    others = {
        fingerprint,
        half.fingerprint,
        derive_head(tiny_model(seed=1), "norm_input").fingerprint,
        derive_head(tiny_model(), "head_input").fingerprint,
        Head(full.weight, scale=2.0).fingerprint,
        Head(full.weight, soft_cap=2.0).fingerprint,
        Head(full.weight, norm=Norm(NormSettings("rms", 1e-5), None, None)).fingerprint,
        Head(full.weight, norm=Norm(NormSettings("rms", 1e-6), None, None)).fingerprint,
    }
    assert len(others) == 8


def test_a_tampered_bundle_is_refused(tiny_model, tmp_path):
    head = derive_head(tiny_model("gemma2"), "norm_input")
    folder = tmp_path / "head"
    head.save(folder)
    tensors, settings = folder / "head.safetensors", folder / "head.json"
    good = tensors.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        tensors.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises((MismatchError, OwnerError), match=r"was changed after|cannot be used: its h"):
            Head.load(folder)
    tensors.write_bytes(good[:-1])
    with pytest.raises(OwnerError, match="cannot be used: its tensors end at byte"):
        Head.load(folder)
    tensors.write_bytes(good)
    content = json.loads(settings.read_text())
    for key, value in (("settings", content["settings"] | {"soft_cap": 4.0}), ("fingerprint", "0" * 64)):
        settings.write_text(json.dumps(content | {key: value}))
        with pytest.raises(MismatchError, match="was changed"):
            Head.load(folder)
    settings.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(OwnerError, match="has format 99"):
        Head.load(folder)
    settings.write_text(json.dumps(content))
    tensors.unlink()
    with pytest.raises(OwnerError, match=r"lacks head\.safetensors"):
        Head.load(folder)
    with pytest.raises(OwnerError, match="contains no readable head bundle"):
        Head.load(tmp_path / "nowhere")


def test_a_bundle_whose_checksums_match_but_whose_tensors_do_not_parse(tmp_path):
    from pema.files import sha256
    from pema.owner import bundle as module

    folder = tmp_path / "head"
    Head(torch.eye(3)).save(folder)
    (folder / "head.safetensors").write_bytes(b"nothing")
    content = json.loads((folder / "head.json").read_text())
    content["tensors_sha256"] = sha256(folder / "head.safetensors")
    content.pop("checksum")
    content["checksum"] = module._checksum(content)
    (folder / "head.json").write_text(json.dumps(content))
    with pytest.raises(OwnerError, match="cannot be used: its header is longer than the file"):
        Head.load(folder)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["gemma2", "cohere", "llama"])
def test_a_device_that_rounds_the_product_otherwise(tiny_model, family, seed):
    """On a GPU the sum over d is taken in another order, which behind a soft cap shows where the product is small."""
    model = tiny_model(family, seed=seed)
    weight = model.lm_head.weight.detach().double()
    model.lm_head.forward = lambda f: (f.double() @ weight.T).float()
    head = derive_head(model, "head_input")
    assert (head.scale, head.soft_cap) == {"gemma2": (1.0, 3.0), "cohere": (0.0625, None), "llama": (1.0, None)}[family]
