"""The demo: its result file, and that PEMA beats the PLM on held-out text."""

import json
from dataclasses import replace

import pytest

from pema.cli import main
from pema.experiments import demo
from pema.experiments.data import support_data
from pema.experiments.reader import read_results


def run(tmp_path, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["pema", "demo", "--json", str(tmp_path / "demo.json"), *more])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))


def test_a_small_demo_writes_its_results_and_signature(tmp_path, monkeypatch, capsys):
    whole = demo.demo_experiment()
    data = whole.data
    annotated = tuple(marks[:4] for marks in data.annotated["test"])
    small = replace(data, train=data.train[:30], dev=data.dev[:2], test=data.test[:4], annotated={"test": annotated})
    entries = tuple(entry for entry in whole.entries if entry.label in demo.SHOWN)
    few = replace(whole, data=small, budget=replace(whole.budget, epochs=1), entries=entries)
    monkeypatch.setattr(demo, "demo_experiment", lambda seed: replace(few, seeds=(seed,)))
    result = run(tmp_path, monkeypatch, "--keep", str(tmp_path / "kept"), "--seed", "3")
    assert [row["label"] for row in result["rows"]] == [run["label"] for run in result["runs"]] == list(demo.SHOWN)
    for each in result["runs"]:
        assert set(each["scores"]) == {"bleu", "chrf", "formality_accuracy"}
        assert (each["costs"]["train_seconds"] > 0) == (each["label"] != "PLM alone")
        assert each["seed"] == 3
    assert {"config", "seed", "versions", "commit", "machine"} <= set(result["signature"])
    assert [c["metric"] for c in result["differences"] if c["label"] == demo.AFTER] == list(result["runs"][0]["scores"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("M-ACC", "Side by side"))
    assert len(read_results(tmp_path / "kept" / "results")) == 1
    again = run(tmp_path, monkeypatch, "--keep", str(tmp_path / "kept"), "--seed", "3")
    assert again["runs"] == result["runs"]


def test_three_examples_are_those_that_differ():
    data = support_data()
    outputs = {name: [f"{name} {i}" for i in range(len(data.test))] for name in demo.SHOWN}
    outputs[demo.AFTER][0] = outputs[demo.BEFORE][0]
    examples = demo.pick_examples(data, outputs)
    assert [example["source"] for example in examples] == [example.source for example in data.test[1:4]]
    assert examples[0][demo.AFTER] == f"{demo.AFTER} 1"


def test_the_data_are_large_enough_and_apart():
    data = support_data()
    assert len(data.train) >= 500
    assert len(data.test) >= 100
    assert not {e.source for e in data.train} & {e.source for e in (*data.dev, *data.test)}
    assert all("[F]" not in e.target for e in data.test)


@pytest.mark.slow
def test_pema_beats_the_plm_on_held_out_text(tmp_path, monkeypatch):
    runs = {run["label"]: run["scores"] for run in run(tmp_path, monkeypatch)["runs"]}
    alone, best = runs["PLM alone"], runs["PEMA best, teacher"]
    assert best["bleu"]["value"] > alone["bleu"]["value"]
    assert best["chrf"]["value"] > alone["chrf"]["value"] + 2
    assert best["formality_accuracy"]["value"] > alone["formality_accuracy"]["value"] + 0.5
