"""Offsite-Tuning: the emulator, its training, and the adapter in the PLM."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from tests.methods.made_jobs import EXAMPLES, SOURCES, job, run, save_plm
from tests.tiny import build_model, build_tokenizer
from torch import nn

from pema.errors import AdapterError, ConfigError, DataError, OwnerError
from pema.methods.emulator import (
    MODEL,
    Plan,
    adapter_parameters,
    decoder_layers,
    layers_of,
    load_emulator,
    save_emulator,
    shortened,
)
from pema.methods.offsite import FILE, OffsiteTuning
from pema.methods.plm_alone import PLMAlone
from pema.owner.local import LocalPLM
from pema.owner.weights import fingerprint

METHOD = OffsiteTuning(learning_rate=3e-3, batch_size=4)
LAYERS = 5
TOKENS = torch.tensor([[1, 7, 8, 9, 4, 5]])


def stages(method, family, folder):
    """A PLM of five layers, and what the stages of a run make."""
    folder.mkdir(exist_ok=True)
    plm_folder = save_plm(folder / family, family, layers=LAYERS)
    plm, prepared = LocalPLM.load(plm_folder, dtype="float32"), folder / "prepared"
    prepared.mkdir()
    method.prepare(plm, job(plm_folder), prepared)
    figures, output = run(method, job(plm_folder), folder)
    return plm, job(plm_folder), prepared, output, figures


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def made(request, tmp_path_factory):
    return stages(METHOD, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def five():
    return LocalPLM(build_model(layers=LAYERS), build_tokenizer())


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_the_plan_spreads_the_kept_layers_evenly():
    assert Plan.of(24, None, 0.4) == Plan(24, 2, (2, 5, 7, 10, 13, 16, 18, 21))  # OPT-1.3B in the paper: 8 of 20
    assert Plan.of(5, None, 0.5) == Plan(5, 1, (1, 3))
    assert Plan.of(5, None, 0.1) == Plan(5, 1, (2,))
    assert Plan.of(5, 2, 0.1) == Plan(5, 2, (2,))
    assert Plan.of(9, 2, 1.0).chosen == list(range(9))
    assert Plan.of(8, None, 0.5).adapters == 2
    assert Plan.of(7, None, 0.5).adapters == 1


def test_a_plan_without_a_middle_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the PLM has 2 layers, so adapters=1 at each end leave no middle layer"):
        METHOD.prepare(LocalPLM(build_model(), build_tokenizer()), job(tmp_path), tmp_path)
    with pytest.raises(DataError, match=r"emulator.json does not exist"):
        Plan.read(tmp_path)


def test_the_layers_are_the_longest_list_that_lies_in_no_other():
    model = nn.Module()
    model.body = nn.Module()
    model.body.blocks = nn.ModuleList(nn.Module() for _ in range(3))
    for block in model.body.blocks:
        block.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(7))
    model.towers = nn.ModuleList([nn.Linear(1, 1), nn.Module(), nn.Module(), nn.Module()])
    assert decoder_layers(model) == (model.body, "blocks")
    assert len(layers_of(build_model("gpt2", layers=3))) == 3
    with pytest.raises(OwnerError, match="Linear cannot be shortened: it has no list of layers of one class"):
        decoder_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "gpt-neox", "qwen3", "falcon", "bloom", "phi"])
def test_the_emulator_on_the_disk_is_the_plm_without_some_layers(family, tmp_path):
    plm = LocalPLM(build_model(family, layers=LAYERS), build_tokenizer())
    before, logits = fingerprint(plm.model), logits_of(plm.model)
    METHOD.prepare(plm, job(tmp_path), tmp_path)
    found = load_emulator(tmp_path, "float32").model
    theirs = layers_of(plm.model)
    for mine, number in zip(layers_of(found), [0, 1, 3, 4], strict=True):
        for a, b in zip(mine.parameters(), theirs[number].parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(logits_of(found), logits_of(shortened(plm.model, [0, 1, 3, 4])))
    assert not torch.equal(logits_of(found), logits)
    assert fingerprint(plm.model) == before
    assert torch.equal(logits_of(plm.model), logits)
    assert len(found.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]) == 9


def test_an_emulator_that_keeps_all_layers_is_the_plm(five, tmp_path):
    dataclasses.replace(METHOD, keep=1.0).prepare(five, job(tmp_path), tmp_path)
    assert torch.equal(logits_of(load_emulator(tmp_path, "float32").model), logits_of(five.model))


def test_an_emulator_that_differs_from_its_configuration_is_refused(five, tmp_path):
    found = shortened(five.model, [0, 2, 4])
    found.model.layers[1].register_forward_hook(lambda module, given, output: 2 * output)
    with pytest.raises(OwnerError, match="LlamaForCausalLM with 3 of its layers gives other logits after it is saved"):
        save_emulator(found, five, tmp_path)


def test_only_the_adapter_is_trained_and_only_it_differs_once_plugged_in(made):
    plm, given, prepared, output, figures = made
    before = fingerprint(plm.model)
    logits = logits_of(plm.model)
    ends = [p for number in (0, LAYERS - 1) for p in layers_of(plm.model)[number].parameters()]
    stored = load_file(output / FILE)
    assert figures.trainable_parameters == sum(p.numel() for p in ends) == sum(t.numel() for t in stored.values())
    with METHOD.open(plm, given, prepared, output) as adapted:
        differing = {
            name
            for (name, a), b in zip(plm.model.named_parameters(), adapted.model.parameters(), strict=True)
            if not torch.equal(a, b)
        }
        assert differing
        assert all(".0." in name or f".{LAYERS - 1}." in name for name in differing)
        parameters = adapter_parameters(adapted.model, 1)
        assert all(torch.equal(parameters[name], value) for name, value in stored.items())
        assert adapted.disk_bytes == (output / FILE).stat().st_size
        assert torch.equal(logits_of(plm.model), logits)
        together = adapted.generate(SOURCES).texts
        assert together == [adapted.generate([source]).texts[0] for source in SOURCES]
    assert fingerprint(plm.model) == before


def test_training_lowers_the_perplexity_of_the_emulator_and_of_the_plm(made):
    plm, given, prepared, output, figures = made
    with METHOD.open(plm, given, prepared, output) as adapted:
        found = adapted.chosen
        assert adapted.perplexity(given.dev) == found["plugged_in_perplexity"] < 0.7 * found["plm_perplexity"]
    assert METHOD.open(plm, dataclasses.replace(given, dev=()), prepared, output).chosen == {}
    alone = PLMAlone().open(plm, given, prepared, output)
    assert alone.perplexity(given.dev) == pytest.approx(found["plm_perplexity"], rel=1e-4)
    assert found["emulator_perplexity"] < 0.7 * found["emulator_alone_perplexity"]
    assert found["emulator_alone_perplexity"] != pytest.approx(found["plm_perplexity"], rel=1e-2)
    assert figures.curve[-1]["held_out_loss"] < figures.curve[0]["held_out_loss"]


def test_where_all_layers_are_kept_there_is_no_plug_in_gap(tmp_path):
    method = dataclasses.replace(METHOD, keep=1.0)
    plm, given, prepared, output, _ = stages(method, "llama", tmp_path)
    with method.open(plm, given, prepared, output) as adapted:
        found = adapted.chosen
    assert found["emulator_perplexity"] == pytest.approx(found["plugged_in_perplexity"], rel=1e-6)
    assert found["emulator_alone_perplexity"] == pytest.approx(found["plm_perplexity"], rel=1e-6)


def test_training_reads_nothing_of_the_plm_but_the_emulator(made, tmp_path):
    _, given, prepared, output, _ = made
    (tmp_path / "trained").mkdir()
    METHOD.train(dataclasses.replace(given, plm="nowhere/at-all"), prepared, tmp_path / "trained")
    assert (tmp_path / "trained" / FILE).read_bytes() == (output / FILE).read_bytes()


def test_distillation_brings_the_emulator_nearer_to_the_plm_without_any_target(five, tmp_path):
    before = fingerprint(five.model)
    blind = [dataclasses.replace(example, target="?") for example in EXAMPLES]
    method = dataclasses.replace(METHOD, distil_steps=30, distil_learning_rate=3e-3)
    losses = {}
    for name, each, examples in (
        ("dropped", METHOD, EXAMPLES),
        ("distilled", method, EXAMPLES),
        ("blind", method, blind),
    ):
        folder = tmp_path / name
        folder.mkdir()
        each.prepare(five, job(tmp_path, examples=tuple(examples)), folder)
        model = load_emulator(folder, "float32").model
        p, q = (logits_of(m).log_softmax(-1) for m in (five.model, model))
        losses[name] = float((p.exp() * (p - q)).sum(-1).mean())
    assert losses["distilled"] < 0.8 * losses["dropped"]
    assert losses["blind"] == losses["distilled"]
    assert fingerprint(five.model) == before
    kept, mine = (load_emulator(tmp_path / name, "float32").model for name in ("dropped", "distilled"))
    differing = {n for (n, a), b in zip(kept.named_parameters(), mine.parameters(), strict=True) if not a.equal(b)}
    assert differing
    assert all(".layers.1." in name or ".layers.2." in name for name in differing)


def test_diverging_distillation_is_reported(five, tmp_path):
    method = dataclasses.replace(METHOD, distil_steps=9, distil_learning_rate=1e30)
    with pytest.raises(AdapterError, match=r"the distillation loss is nan at step \d: .* \(now 1e\+30\)"):
        method.prepare(five, job(tmp_path), tmp_path)


def test_what_crosses_to_the_data_owner():
    assert METHOD.needs.weights == "some"
    assert not METHOD.needs.targets_at_owner
    assert METHOD.shared
    assert METHOD.prepared_by == OffsiteTuning(learning_rate=1.0, distil_learning_rate=1.0).prepared_by
    assert METHOD.prepared_by != dataclasses.replace(METHOD, keep=1.0).prepared_by
    other = dataclasses.replace(METHOD, distil_steps=5)
    assert other.prepared_by != dataclasses.replace(other, distil_learning_rate=1.0).prepared_by


def test_an_emulator_names_no_path(made):
    _, given, prepared, *_ = made
    for path in (prepared / MODEL).iterdir():
        assert given.plm.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": 0}, "offsite: adapters=0 is too small: it must be at least 1"),
        ({"keep": 0.0}, r"offsite: keep=0\.0 is too small: it must be more than 0"),
        ({"distil_steps": -1}, "offsite: distil_steps=-1 is too small: it must be at least 0"),
        ({"distil_learning_rate": 0.0}, r"offsite: distil_learning_rate=0\.0 is too small: it must be more than 0"),
        ({"learning_rate": math.nan}, "offsite: learning_rate=nan"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OffsiteTuning.of(settings)


@pytest.mark.parametrize("text", ["{}", '{"layers": "4", "adapters": 1, "kept": []}', '{"layers": 4, "adapters": 1}'])
def test_a_plan_that_is_none_is_refused(tmp_path, text):
    from pema.errors import DataError
    from pema.methods.emulator import PLAN, Plan

    (tmp_path / PLAN).write_text(text)
    with pytest.raises(DataError, match=r"emulator.json is not a valid emulator plan: .* Prepare it again"):
        Plan.read(tmp_path)
