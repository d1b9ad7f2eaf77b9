"""The demo: its tables, samples and result file, and that PEMA beats the PLM and a few-shot prompt on test records."""

import json
from dataclasses import replace

import pytest

from pema.cli import main
from pema.experiments import demo
from pema.experiments.data import restaurant_data, support_data
from pema.experiments.reader import read_results

LABELS = ["PLM alone", "few-shot prompt", "PEMA paper", "PEMA best"]


def run(tmp_path, monkeypatch, *more):
    monkeypatch.setattr("sys.argv", ["pema", "demo", "--output", str(tmp_path / "demo.json"), *more])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))


def test_a_small_demo_writes_its_results_and_signature(tmp_path, monkeypatch, capsys):
    whole = demo.demo_experiment()
    assert [entry.label for entry in whole.entries] == LABELS
    small = replace(whole.data, train=whole.data.train[:24], dev=whole.data.dev[:2], test=whole.data.test[:3])
    entries = tuple(replace(entry, grid={}) for entry in whole.entries if entry.label != "few-shot prompt")
    few = replace(
        whole,
        plm="embedded",
        references=("PLM alone",),
        data=small,
        budget=replace(whole.budget, epochs=1),
        entries=entries,
    )
    monkeypatch.setattr(demo, "demo_experiment", lambda seed: replace(few, seeds=(seed,)))
    kept, page = ("--keep", str(tmp_path / "kept")), ("--report", str(tmp_path / "page.html"))
    result = run(tmp_path, monkeypatch, *kept, *page, "--seed", "3")
    labels = [label for label in LABELS if label != "few-shot prompt"]
    assert [row["label"] for row in result["rows"]] == [run["label"] for run in result["runs"]] == labels
    for each in result["runs"]:
        assert set(each["scores"]) == {"bleu", "chrf", "slot_errors"}
        assert (each["costs"]["train_seconds"] > 0) == (each["label"] != "PLM alone")
        assert each["seed"] == 3
    assert {"config", "seed", "versions", "commit", "machine"} <= set(result["signature"])
    assert [c["metric"] for c in result["differences"] if c["label"] == "PEMA best"] == ["bleu", "chrf", "slot_errors"]
    output = capsys.readouterr().out
    assert all(word in output for word in ("SER", "Samples", small.test[2].source, *labels))
    assert len(read_results(tmp_path / "kept" / "results")) == 1
    assert "PEMA best" in (tmp_path / "page.html").read_text(encoding="utf-8")
    again = run(tmp_path, monkeypatch, *kept, "--seed", "3", "--json")
    assert json.loads(capsys.readouterr().out) == again
    assert again["runs"] == result["runs"]


def test_the_samples_are_the_first_eight_of_the_test_set():
    data = restaurant_data()
    outputs = {label: [f"{label} {i}" for i in range(len(data.test))] for label in LABELS}
    samples = demo.side_by_side(data, outputs)
    assert [each["source"] for each in samples] == [example.source for example in data.test[:8]]
    assert samples[7]["PEMA best"] == "PEMA best 7"


@pytest.mark.parametrize("read", [restaurant_data, support_data])
def test_the_data_are_large_enough_and_apart(read):
    data = read()
    assert len(data.train) == 500
    assert len(data.test) >= 100
    assert not {e.source for e in data.train} & {e.source for e in (*data.dev, *data.test)}
    assert all("[F]" not in e.target for e in data.test)


def test_the_restaurants_keep_all_references_of_the_test_set():
    data = restaurant_data()
    assert all(not example.alternatives for example in (*data.train, *data.dev))
    assert sum(len(example.references) for example in data.test) > 500


@pytest.mark.slow
def test_pema_beats_the_plm_and_a_few_shot_prompt_on_test_records(tmp_path, monkeypatch):
    runs = {run["label"]: run["scores"] for run in run(tmp_path, monkeypatch)["runs"]}
    bleu = {label: scores["bleu"]["value"] for label, scores in runs.items()}
    assert bleu["PEMA best"] > 40
    assert bleu["PEMA best"] > bleu["few-shot prompt"] + 5 > bleu["PLM alone"] + 10
    assert runs["PEMA best"]["slot_errors"]["value"] < runs["few-shot prompt"]["slot_errors"]["value"]
