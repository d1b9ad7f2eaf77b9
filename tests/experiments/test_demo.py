"""The demo: its result file, and that PEMA beats the PLM on held-out text."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from pema.cli import main
from pema.experiments import demo


def run(tmp_path, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["pema", "demo", "--json", str(tmp_path / "demo.json"), *more])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))


def test_a_small_demo_writes_its_rows_and_signature(tmp_path, monkeypatch):
    whole = demo.support_data()
    annotated = tuple(marks[:4] for marks in whole.annotated["test"])
    small = replace(whole, train=whole.train[:30], test=whole.test[:4], annotated={"test": annotated})
    monkeypatch.setattr(demo, "support_data", lambda: small)
    few = {name: replace(s, changes={"epochs": 1} if s.preset else {}) for name, s in demo.SETTINGS.items()}
    monkeypatch.setattr(demo, "SETTINGS", few)
    result = run(tmp_path, monkeypatch, "--keep", str(tmp_path / "kept"))
    assert [row["name"] for row in result["rows"]] == list(demo.SETTINGS)
    for row in result["rows"]:
        assert set(row) == {"name", "bleu", "chrf", "formality_accuracy", "memory_bytes", "train_seconds"}
        assert (row["memory_bytes"] > 0) == (row["train_seconds"] > 0) == (row["name"] != "PLM alone")
    assert {"config", "seed", "versions", "commit", "machine"} <= set(result["signature"])
    assert [c["metric"] for c in result["comparisons"]] == ["bleu", "chrf", "formality_accuracy"]
    before, after = (next(r for r in result["rows"] if r["name"] == name) for name in (demo.BEFORE, demo.AFTER))
    for c in result["comparisons"]:
        assert c["difference"] == pytest.approx(after[c["metric"]] - before[c["metric"]], abs=1e-3)
        assert c["low"] <= c["high"]
        assert 0 < c["p_value"] <= 1
    again = run(tmp_path, monkeypatch, "--keep", str(tmp_path / "kept"))
    assert again["rows"] == result["rows"]


def test_the_tables_show_every_row_and_three_examples():
    rows = [
        {"name": name, "bleu": 1.0, "chrf": 2.0, "formality_accuracy": 0.5, "memory_bytes": 0, "train_seconds": 0}
        for name in demo.SETTINGS
    ]
    outputs = {name: [f"{name} {i}" for i in range(5)] for name in demo.SETTINGS}
    examples = demo.pick_examples(demo.support_data(), outputs)
    assert len(examples) == 3
    console = Console(file=io.StringIO(), width=120)
    comparisons = [{"metric": "chrf", "difference": 4.25, "low": 3.0, "high": 5.5, "p_value": 0.001}]
    for table in demo.show_demo({"rows": rows, "comparisons": comparisons}, examples):
        console.print(table)
    shown = console.file.getvalue()
    assert all(name in shown for name in demo.SETTINGS)
    assert all(example["reference"] in shown for example in examples)
    assert "chrF +4.25 (+3.00 to +5.50, p 0.001)" in " ".join(shown.split())


def test_the_data_are_large_enough_and_apart():
    data = demo.support_data()
    assert len(data.train) >= 500
    assert len(data.test) >= 100
    assert not {e.source for e in data.train} & {e.source for e in (*data.dev, *data.test)}
    assert all("[F]" not in e.target for e in data.test)


@pytest.mark.slow
def test_pema_beats_the_plm_on_held_out_text(tmp_path, monkeypatch):
    rows = {row["name"]: row for row in run(tmp_path, monkeypatch)["rows"]}
    alone, best = rows["PLM alone"], rows["PEMA best, teacher"]
    assert best["bleu"] > alone["bleu"]
    assert best["chrf"] > alone["chrf"] + 2
    assert best["formality_accuracy"] > alone["formality_accuracy"] + 0.5
