"""Folders of results and committed files turn into each other without a loss."""

import json
import sys

import pytest
from tests.tiny import build_model, build_tokenizer

from pema.errors import DataError
from pema.experiments.config import read_config
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.pages.report.document import report
from reproduction import folders
from reproduction.folders import EXAMPLES, REPEATING, SHIPPED, TEXTS, pack, run_into, unpack
from reproduction.lines import read_lines, read_runs, write_lines
from reproduction.paths import RESULTS

COMMITTED = sorted(file for part in ("compare", "studies") for file in (RESULTS / part).iterdir())
KAPPA = RESULTS / "studies" / "kappa.jsonl"


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_committed_file_is_what_its_folder_packs_to(file, tmp_path):
    unpack(file, tmp_path / "folder")
    write_lines(tmp_path / "again.jsonl", pack(tmp_path / "folder"))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_it_holds_every_run_its_texts_and_only_sentences_that_may_be_passed_on(file):
    fields = {name: value for line in read_lines(file) if "run" not in line for name, value in line.items()}
    runs, data = read_runs(file), fields["experiment"]["data"]
    assert set(runs) == {
        name for names in fields["comparison"]["signature"]["config"]["runs"].values() for name in names
    }
    texts = {data["test"]} if data["name"] not in REPEATING else {0}
    assert {len(run.get(TEXTS, ())) for run in runs.values()} == texts
    assert (EXAMPLES in fields) == (data["name"] in SHIPPED)
    assert len(fields.get(EXAMPLES, range(data["test"]))) == data["test"]


def test_data_that_the_project_may_pass_on():
    assert set(SHIPPED) == {"support", "restaurants"}


def test_the_report_shows_an_unpacked_folder(tmp_path):
    unpack(KAPPA, tmp_path / "kappa")
    assert {path.name for path in (tmp_path / "kappa").iterdir()} == {
        *(EXPERIMENT, COMPARISON, TEST),
        *(f"{name}.{kind}" for name in read_runs(KAPPA) for kind in ("json", "txt")),
    }
    assert "kappa=0.2" in report(tmp_path / "kappa")


def test_scores_of_another_environment_go_along(tmp_path):
    unpack(KAPPA, tmp_path / "kappa")
    name, *_ = read_runs(KAPPA)
    (tmp_path / "kappa" / COMET).mkdir()
    (tmp_path / "kappa" / COMET / f"{name}.json").write_text('{\n  "value": 0.5\n}\n', encoding="utf-8")
    write_lines(tmp_path / "kappa.jsonl", pack(tmp_path / "kappa"))
    assert read_runs(tmp_path / "kappa.jsonl")[name][COMET] == {"value": 0.5}
    unpack(tmp_path / "kappa.jsonl", tmp_path / "again")
    assert json.loads((tmp_path / "again" / COMET / f"{name}.json").read_text(encoding="utf-8")) == {"value": 0.5}
    assert COMET not in json.loads((tmp_path / "again" / f"{name}.json").read_text(encoding="utf-8"))


def test_an_experiment_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no comparison.json: let the experiment finish first"):
        pack(tmp_path)


def test_a_file_that_was_not_packed_from_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"demo.jsonl lacks the line `experiment`"):
        unpack(RESULTS / "demo.jsonl", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_demos_file_is_packed(tmp_path, monkeypatch):
    lines = read_lines(RESULTS / "demo.jsonl")
    printed = lines[-1]["comparison"] | {"runs": lines[:-1]}
    (tmp_path / "demo.json").write_text(json.dumps(printed), encoding="utf-8")
    output = tmp_path / "demo.jsonl"
    monkeypatch.setattr(sys, "argv", ["folders", "pack", str(tmp_path / "demo.json"), str(output)])
    folders.main()
    assert output.read_bytes() == (RESULTS / "demo.jsonl").read_bytes()


def test_the_command_packs_and_unpacks(tmp_path, monkeypatch):
    for arguments in (
        ["unpack", str(KAPPA), str(tmp_path / "kappa")],
        ["pack", str(tmp_path / "kappa"), str(tmp_path / "kappa.jsonl")],
    ):
        monkeypatch.setattr(sys, "argv", ["folders", *arguments])
        folders.main()
    assert (tmp_path / "kappa.jsonl").read_bytes() == KAPPA.read_bytes()


CONFIG = """
title = "Tiny"
plm = "PLM"
seeds = [0]
metrics = ["chrf"]
[data]
name = "support"
train = { data = "some.tsv" }
dev = { data = "some.tsv" }
test = { data = "some.tsv" }
[[methods]]
label = "alone"
method = "plm"
"""


def test_an_experiment_is_packed_when_it_is_finished(tmp_path, monkeypatch):
    build_model(seed=3).save_pretrained(tmp_path / "plm")
    build_tokenizer().save_pretrained(tmp_path / "plm")
    (tmp_path / "some.tsv").write_text("the house 1\tdas Haus 1\nthe house 2\tdas Haus 2\n", encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(CONFIG.replace("PLM", str(tmp_path / "plm"), 1), encoding="utf-8")
    experiment = read_config(tmp_path / "tiny.toml", "compare")
    file, work = tmp_path / "studies" / "tiny.jsonl", tmp_path / "work"

    def stopped(*_arguments):
        raise DataError("it was stopped")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "run_experiment", stopped)
        with pytest.raises(DataError, match="it was stopped"):
            run_into(file, experiment, work)
    assert not file.exists()
    run_into(file, experiment, work)
    (run,) = read_runs(file).values()
    assert run["signature"]["config"]["experiment"] == "tiny"
    assert len(run[TEXTS]) == 2
    assert read_lines(file)[-1] == {EXAMPLES: [{"source": f"the house {i}", "target": f"das Haus {i}"} for i in (1, 2)]}
    unpack(file, tmp_path / "again")
    written = {
        path.name: path.read_bytes() for path in (work / "results" / "studies" / "tiny").iterdir() if path.is_file()
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == written
