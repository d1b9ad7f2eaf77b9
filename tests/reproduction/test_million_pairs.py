"""The stages of a large memory at toy size: what they report, and what their texts and projections are."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from pema.memory.reader import Memory
from reproduction.million_pairs.options import Setting, Stage
from reproduction.million_pairs.process import measure
from reproduction.million_pairs.projection import project
from reproduction.million_pairs.source import FIXED, Language, prepare, tokenizer, words
from reproduction.tables import million_pairs as tables

SETTING = Setting(pairs=640, seen=60, d=16, V=400, ffn=16, heads=2, length=8)
STAGES = (
    "build",
    "build,int8",
    "verify",
    "reconstruct",
    "project,8",
    "train,8,residual,sampled",
    "train,int8,paper,seen,200",
    "steps,float16,residual,sampled,200",
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("million")


@pytest.fixture(scope="module")
def results(folder):
    threads, facts = torch.get_num_threads(), prepare(SETTING, folder)
    assert facts == prepare(SETTING, folder)  # read from the file
    patch = pytest.MonkeyPatch()
    for module in ("adapter.config", "adapter.sampled", "adapter.training"):
        patch.setattr(f"pema.{module}.SAMPLE", 16)
    patch.setattr("reproduction.million_pairs.stages.CHUNK", 1 << 12)
    try:
        made = {name: measure(SETTING, Stage.named(name), folder) | facts for name in STAGES}
    finally:
        patch.undo()
        torch.set_num_threads(threads)
    return json.loads(json.dumps(made))


def test_every_stage_says_what_it_took(results):
    for name, result in results.items():
        assert result["stage"].startswith(name.split(",")[0])
        assert result["pairs"] > 0
        assert result["peak_anonymous_bytes"] >= result["imported_bytes"] > 1 << 20
        assert result["floor_seconds"] >= 0
        assert Setting.of(result) == SETTING
    assert results["build"]["pairs"] == results["verify"]["pairs"] == 640
    assert results["build,int8"]["bytes"] < results["build"]["bytes"]
    sampled, seen = (results[name] for name in STAGES[-3:-1])
    assert results[STAGES[-1]]["epoch_processor_seconds"] > 0
    assert (sampled["vocabulary"], sampled["pairs"] + sampled["held_out_pairs"]) == ("sampled", 640)
    assert seen["rows"] == seen["seen"] <= 61
    assert seen["pairs"] + seen["held_out_pairs"] <= 200
    assert sampled["held_out_cross_entropy"] < sampled["start_cross_entropy"]
    # Half of the coordinates hold most of f, so the loss on all of f is near that on them.
    assert sampled["cross_entropy_of_float16"] == pytest.approx(sampled["held_out_cross_entropy"], abs=0.3)


def test_the_texts_depend_on_the_words_before_them(folder, results):
    facts = json.loads((folder / "facts.json").read_text())
    assert 0 < facts["loss_of_the_language"] < facts["loss_of_the_frequencies"] < math.log(SETTING.seen)
    memory = Memory.open(folder / "float16")
    assert len(memory.view().targets_seen()) <= SETTING.seen + 1  # and the end of a text
    assert memory.examples == SETTING.examples == 80


def test_a_language_has_the_loss_that_its_texts_show():
    setting = Setting(pairs=40_000, seen=30, d=16, V=100, length=20)
    embeddings = torch.randn(setting.V, setting.d, generator=torch.Generator().manual_seed(0))
    language = Language.of(embeddings, setting)
    np.testing.assert_allclose(language.p.sum(1), 1, rtol=1e-6)
    ids, lowest, _ = language.texts(setting)
    before, after = ids[:, setting.words : -1].ravel(), ids[:, setting.words + 1 :].ravel()
    counts = np.zeros((len(language.p), setting.V))
    np.add.at(counts, (language.classes[before], after), 1)
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    conditional = -(counts[counts > 0] * np.log(share[counts > 0])).sum() / counts.sum()
    assert conditional == pytest.approx(lowest, abs=0.1)


def test_every_word_is_a_token():
    names = words(300)
    assert len(set(names)) == 300
    made = tokenizer(300 + len(FIXED))
    assert made(f"text {names[7]} {names[299]} end")["input_ids"] == [4, 13, 305, 5]


def test_a_projection_keeps_what_lies_in_k_directions(folder, results, tmp_path):
    whole = Memory.open(folder / "float16")
    half = Memory.open(folder / "8")
    (before,), (after,) = whole.view().batches(1000), half.view().batches(1000)
    assert torch.equal(before.targets, after.targets)
    values = torch.linalg.svdvals(before.representations)
    lost = float((before.representations - after.representations).square().sum())
    assert lost == pytest.approx(float(values[8:].square().sum()), rel=0.02)
    (same,) = project(whole, 16, tmp_path / "all").view().batches(1000)
    torch.testing.assert_close(same.representations, before.representations, rtol=0.01, atol=0.01)


def test_the_tables_have_a_line_for_each_result(results):
    assert tables.stages(results.values()).count("\n") == 2 + len(STAGES)
    trained = [results[name] for name in STAGES[-3:-1]]
    table = tables.losses(trained)
    assert "| 8 principal coordinates in float16 | `sampled` |" in table
    assert f"| int8 | `seen` | {trained[1]['seen']:,} | 20 |" in table


def test_a_stage_is_named_by_what_it_needs():
    assert Stage.named("train, int8,paper,seen,200") == Stage("train", "int8", "paper", "seen", 200)
    assert Stage.named("verify") == Stage("verify", "float16")
    assert Stage.named("train,int8,paper,seen,200").name == "train, int8, paper, seen, 200 pairs"
