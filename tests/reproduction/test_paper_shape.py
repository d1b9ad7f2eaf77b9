"""Memory and time at the paper's shape, at a toy shape: what is recorded, kept, refused and shown."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from pema.memory.reader import Memory
from reproduction.lines import read_runs
from reproduction.paper_shape import __main__ as paper_shape
from reproduction.paper_shape import peak, process
from reproduction.paper_shape.methods import language_model, memory_path
from reproduction.paper_shape.options import METHODS, SHAPES, Setting, Shape, kept_layers, least_bytes
from reproduction.tables import paper_shape as paper_table

TOY = Shape("opt-125m", 32, 6, 2, 64, V=320, positions=2050)
SETTING = Setting(length=16, steps=3, pairs=256, knn_pairs=512, queries=3, prompt=8, new_tokens=4, repeats=1)


@pytest.fixture
def unlimited(monkeypatch):
    """Leaves the limits of the test's own process alone."""
    monkeypatch.setattr(process, "limit", lambda _bytes: None)


@pytest.mark.parametrize("shape", [TOY, SHAPES["opt-1.3b"]], ids=lambda shape: shape.name)
def test_the_arithmetic_counts_the_models_weights(shape):
    model = language_model(shape, torch.device("meta"), layers=shape.layers, dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    assert weights == shape.layers * shape.layer_parameters + shape.other_parameters
    assert least_bytes(shape, "full", SETTING) == 16 * weights
    assert least_bytes(shape, "lora", SETTING) == 4 * weights


def test_the_papers_full_fine_tuning_is_weights_gradients_and_moments():
    assert least_bytes(SHAPES["opt-1.3b"], "full", Setting()) / 2**20 == pytest.approx(20_082, rel=0.001)


def test_offsite_tuning_keeps_as_many_layers_as_its_published_emulator():
    assert kept_layers(24) == (8, 2)
    assert kept_layers(12) == (3, 2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_says_what_it_took(method, tmp_path, unlimited):
    threads = torch.get_num_threads()
    try:
        found = json.loads(json.dumps(process.measure(TOY, method, SETTING, tmp_path)))
    finally:
        torch.set_num_threads(threads)
    assert found["fits"]
    assert found["signature"]["config"]["method"] == method
    assert found["peak_bytes"]["resident"] >= 0
    assert not (tmp_path / "out").exists()
    if method == "owner":
        assert set(found["ratio"]) == {"paper", "residual", "best"}
        assert found["represent_seconds_per_token"] > 0
        return
    assert found["seconds_per_token"] > 0
    layer = TOY.layer_parameters
    trained = {
        "full": TOY.layers * layer + TOY.other_parameters,
        "lora": TOY.layers * 2 * 16 * 2 * TOY.d,
        "lora-bfloat16": TOY.layers * 2 * 16 * 2 * TOY.d,
        "offsite": 4 * layer,
        "pema-paper": 2 * 32 * 32,
        "pema-paper-float32": 2 * 32 * 32,
        "pema-best": 2 * 6 * 32 * 32,
    }
    assert found.get("trainable_parameters") == trained.get(method)


def test_a_method_that_does_not_fit_is_recorded_with_what_it_needs(tmp_path, unlimited, monkeypatch):
    monkeypatch.setattr(process, "available_bytes", lambda _device: 1_000_000)
    found = process.measure(TOY, "full", SETTING, tmp_path)
    assert not found["fits"]
    assert found["why"] == f"needs at least {found['least_bytes'] / 1e9:.1f} GB, 0.0 GB are free"
    assert "peak_bytes" not in found


def test_an_allocation_that_fails_is_recorded_and_another_error_is_not(tmp_path, unlimited, monkeypatch):
    def refused(*_arguments):
        torch.empty(1 << 60)

    monkeypatch.setitem(process.RUN, "full", refused)
    found = process.measure(TOY, "full", SETTING, tmp_path)
    assert not found["fits"]
    assert found["why"].startswith("ran out of ")

    def broken(*_arguments):
        raise RuntimeError("something else")

    monkeypatch.setitem(process.RUN, "full", broken)
    with pytest.raises(RuntimeError, match="something else"):
        process.measure(TOY, "full", SETTING, tmp_path)


def test_the_peak_is_that_of_the_block():
    before = torch.ones(8 << 20)
    with peak.Peak(torch.device("cpu")) as found:
        held = torch.ones(16 << 20)
        time.sleep(0.05)  # what is anonymous is sampled
    assert held.sum() == 16 << 20
    assert 64e6 < found.resident < 90e6
    assert 60e6 < found.anonymous < 90e6
    assert found.allocated is None
    assert before.numel()


def test_what_is_measured_is_kept_and_another_setting_is_refused(tmp_path, monkeypatch):
    started = []

    def child(what, shape, method, setting, folder):
        started.append((what, method))
        found = {"shape": shape.name, "method": method, "fits": method != "full", "why": "too large"}
        found["signature"] = {"config": setting.to_dict()}
        found |= {"peak_bytes": {"resident": 5_000_000, "anonymous": 4_000_000, "allocated": None}, "seconds": 1.0}
        (folder / paper_shape.OUT).write_text(json.dumps(found), encoding="utf-8")

    monkeypatch.setattr(paper_shape, "child", child)
    path = tmp_path / "results" / "paper_shape.jsonl"
    paper_shape.measure_all([TOY], ["full", "lora"], SETTING, path)
    paper_shape.measure_all([TOY], ["full", "lora", "knn"], SETTING, path)
    # What did not fit is tried again; the memory is written before what reads it.
    assert started == [
        ("measure", "full"),
        ("measure", "lora"),
        ("measure", "full"),
        ("memory", "knn"),
        ("measure", "knn"),
    ]
    runs = read_runs(path)
    assert list(runs) == ["opt-125m, full", "opt-125m, lora", "opt-125m, knn"]
    assert [run["method"] for run in runs.values()] == ["full", "lora", "knn"]
    with pytest.raises(SystemExit, match=r"was measured with threads=1, not 2: give another -o"):
        paper_shape.measure_all([TOY], ["full"], replace(SETTING, threads=2), path)


def test_a_method_is_measured_in_a_process_of_its_own(tmp_path):
    paper_shape.child("measure", TOY, "full", SETTING, tmp_path)
    found = json.loads((tmp_path / paper_shape.OUT).read_text(encoding="utf-8"))
    assert (found["shape"], found["method"], found["fits"]) == ("opt-125m", "full", True)
    assert found["signature"]["config"]["length"] == SETTING.length


def test_a_process_that_fails_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match=r"reproduction.paper_shape.process measure failed with 1"):
        paper_shape.child("measure", TOY, "full", SETTING, tmp_path)


def test_the_table_shows_measured_and_missing_methods():
    signed = {"machine": {"processor": "P", "cpu_capability": "AVX2"}, "versions": {"torch": "2"}}
    common = {"shape": "opt-1.3b", "device": "cpu", "signature": signed | {"config": Setting().to_dict()}}
    peaks = {"resident": 500_000_000, "anonymous": 400_000_000, "allocated": None}
    step = {"seconds_per_step": 1.5, "tokens_per_step": 256, "seconds_per_token": 1.5 / 256}
    pema = common | {"method": "pema-paper", "fits": True, "peak_bytes": peaks, "trainable_parameters": 2_097_152}
    pema |= {"load_average": [1.5, 1.0, 0.5]}
    full = common | {"method": "full", "fits": False, "why": "needs at least 21.1 GB, 9.0 GB are free"}
    text = paper_table.page([pema | step, full])
    assert "| PEMA, preset `paper` | 500 | 400 | 1.5 | 256 pairs | 5.86 | 2.1 |" in text
    assert "| full fine-tuning, float32 | does not fit here; by arithmetic at least 21,052 |" in text
    assert "full fine-tuning, float32 (arithmetic) | 1/42.1 | < 1/40 | yes |" in text
    assert "| PEMA, preset `paper` | 478 | 477 |" in text
    assert "torch 2, with a load average of up to 1.5." in text


def test_the_memory_holds_W_hd_in_half_precision(tmp_path):  # noqa: N802
    memory = Memory.open(memory_path(TOY, 256, tmp_path))
    assert memory.head().weight.dtype == torch.float16
    assert memory.pairs == 256
