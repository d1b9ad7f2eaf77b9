import hashlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pema.cli import main as pema
from pema.errors import DataError
from pema.evaluation.elsewhere import ExternalScores, digest
from pema.evaluation.outputs import write_hypotheses
from pema.evaluation.score import score
from pema.evaluation.significance import paired_bootstrap
from pema.tasks.readers import read_lines

RECIPE = Path(__file__).parent.parent.parent / "reproduction" / "comet_score.py"
SOURCES = ["the house", "the dog\u2028is here", "no"]
REFERENCES = ["das Haus", "der Hund\u2028ist da", "nein"]
SYSTEMS = {"lora-seed0": ["das Haus", "ein Hund", ""], "plm": ["Haus", "Hund", "Katze"]}


@pytest.fixture
def comet(monkeypatch):
    """A stand-in for the package `comet`: a segment's score is the share of the reference's letters in it."""
    asked = []

    def predict(samples, *, batch_size, gpus, accelerator):
        asked.append({"samples": samples, "batch_size": batch_size, "gpus": gpus, "accelerator": accelerator})
        scores = [len(set(each["mt"]) & set(each["ref"])) / len(set(each["ref"])) for each in samples]
        return SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))

    module = ModuleType("comet")
    module.download_model = lambda name: f"downloaded {name}"
    module.load_from_checkpoint = lambda path: asked.append({"loaded": path}) or SimpleNamespace(predict=predict)
    monkeypatch.setitem(sys.modules, "comet", module)
    return asked


@pytest.fixture
def folder(tmp_path):
    for name, hypotheses in SYSTEMS.items():
        write_hypotheses(tmp_path / f"{name}.txt", hypotheses)
    (tmp_path / "src").write_text("\n".join(SOURCES) + "\n", encoding="utf-8")
    (tmp_path / "ref").write_bytes(("\ufeff" + "\r\n".join(REFERENCES)).encode())
    rows = [json.dumps({"source": s, "target": t}) for s, t in zip(SOURCES, REFERENCES, strict=True)]
    (tmp_path / "examples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def recipe(*arguments):
    runpy.run_path(str(RECIPE))["main"]([str(each) for each in arguments])


def outputs(folder):
    return [folder / f"{name}.txt" for name in SYSTEMS]


def test_the_recipe_scores_every_system_with_one_model(folder, comet, capsys):
    recipe("--examples", folder / "examples.jsonl", *outputs(folder), "--batch-size", 4, "--gpus", 1)
    loaded, *asked = comet
    assert loaded == {"loaded": "downloaded Unbabel/wmt22-comet-da"}
    assert [[sample["mt"] for sample in each["samples"]] for each in asked] == list(SYSTEMS.values())
    assert [each["src"] for each in asked[0]["samples"]] == SOURCES
    assert [each["ref"] for each in asked[1]["samples"]] == REFERENCES
    assert {(each["batch_size"], each["gpus"], each["accelerator"]) for each in asked} == {(4, 1, "auto")}
    found = json.loads((folder / "comet" / "lora-seed0.json").read_text(encoding="utf-8"))
    assert found["segments"][0] == 1
    assert found["segments"][2] == 0
    assert found["signature"] == "COMET|model:Unbabel/wmt22-comet-da|version:unknown"
    assert "comet/plm.json: " in capsys.readouterr().out
    assert {path.name for path in (folder / "comet").iterdir()} == {"lora-seed0.json", "plm.json"}


def test_text_files_give_the_same_as_examples(folder, comet):
    recipe("--examples", folder / "examples.jsonl", *outputs(folder))
    first = (folder / "comet" / "plm.json").read_bytes()
    recipe("--sources", folder / "src", "--references", folder / "ref", *outputs(folder))
    assert (folder / "comet" / "plm.json").read_bytes() == first
    assert comet[-1]["accelerator"] == "cpu"


def test_a_checkpoint_on_the_disk_is_called_by_its_digest(folder, comet):
    (folder / "model.ckpt").write_bytes(b"weights")
    recipe("--examples", folder / "examples.jsonl", folder / "plm.txt", "--model", folder / "model.ckpt")
    assert comet[0] == {"loaded": str(folder / "model.ckpt")}
    found = json.loads((folder / "comet" / "plm.json").read_text(encoding="utf-8"))
    assert found["signature"].startswith("COMET|model:model.ckpt@" + hashlib.sha256(b"weights").hexdigest()[:12] + "|")


def test_the_recipe_refuses_what_does_not_fit(folder, comet, monkeypatch, capsys):
    (folder / "short.txt").write_text("eins\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"short.txt has 1 lines, expected 3"):
        recipe("--examples", folder / "examples.jsonl", folder / "plm.txt", folder / "short.txt")
    with pytest.raises(SystemExit, match=r"short.txt has 1 lines, expected 3"):
        recipe("--sources", folder / "short.txt", "--references", folder / "ref", folder / "plm.txt")
    for given in (["--sources", folder / "src"], ["--examples", "x", "--sources", "y", "--references", "z"], []):
        with pytest.raises(SystemExit, match="2"):
            recipe(folder / "plm.txt", *given)
        assert "give --examples, or --sources and --references" in capsys.readouterr().err
    assert not comet
    assert not (folder / "comet").exists()
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(SystemExit, match=r"no COMET here .*pip install \"unbabel-comet"):
        recipe("--examples", folder / "examples.jsonl", folder / "plm.txt")


def test_the_recipe_imports_nothing_of_pema():
    assert "pema" not in {
        line.split()[1].partition(".")[0]
        for line in RECIPE.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(("import ", "from "))
    }


@pytest.fixture
def scored(folder, comet):
    recipe("--examples", folder / "examples.jsonl", *outputs(folder))
    return [folder / "comet" / f"{name}.json" for name in SYSTEMS]


def test_scores_from_elsewhere_are_a_metric(folder, scored):
    metric = ExternalScores(scored)
    hypotheses = {name: read_lines(folder / f"{name}.txt") for name in SYSTEMS}
    references = read_lines(folder / "ref")
    found = score(metric, hypotheses["plm"], references)
    told = json.loads(scored[1].read_text(encoding="utf-8"))
    assert found.value == pytest.approx(told["value"])
    assert found.signature == "COMET|model:Unbabel/wmt22-comet-da|version:unknown|n:3"
    compared = paired_bootstrap(metric, hypotheses["plm"], hypotheses["lora-seed0"], references, samples=50)
    values = [json.loads(path.read_text(encoding="utf-8"))["value"] for path in scored]
    assert compared.difference == pytest.approx(values[0] - values[1])
    assert metric.name == "comet"


def test_evaluate_takes_the_scores(folder, scored, capsys, monkeypatch):
    files = ("--hypotheses", folder / "plm.txt", "--references", folder / "ref", "--scores", scored[1])
    monkeypatch.setattr("sys.argv", ["pema", "evaluate", "--task", "translation", *map(str, files), "--json"])
    with pytest.raises(SystemExit) as stop:
        pema()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["bleu", "chrf", "comet"]
    assert found["comet"]["value"] == pytest.approx(json.loads(scored[1].read_text(encoding="utf-8"))["value"])


def test_scores_of_other_texts_are_refused(folder, scored):
    metric = ExternalScores(scored[:1])
    references = read_lines(folder / "ref")
    with pytest.raises(DataError, match=r"comet was computed on other hypotheses \(.*lora-seed0.json\): score"):
        metric.statistics(SYSTEMS["plm"], references)
    with pytest.raises(DataError, match="comet was computed on other references"):
        metric.statistics(SYSTEMS["lora-seed0"], ["x", *references[1:]])


def change(path, **changes):
    told = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}), encoding="utf-8")


def test_files_without_scores_are_refused(folder, scored):
    with pytest.raises(DataError, match="no score file is given"):
        ExternalScores([])
    with pytest.raises(DataError, match=r"nowhere.json does not exist"):
        ExternalScores([folder / "nowhere.json"])
    change(scored[0], metric=None)
    with pytest.raises(DataError, match=r"is not a score file .*KeyError"):
        ExternalScores(scored)
    change(scored[0], metric="metricx")
    with pytest.raises(DataError, match="score files contain different metrics, comet and metricx: give"):
        ExternalScores(scored)
    change(scored[0], metric="comet", signature="COMET|model:other")
    with pytest.raises(DataError, match=r"the scores have different signatures, .*other.*: score all"):
        ExternalScores(scored)
    for segments, reason in (
        ([], "one finite number per segment"),
        ([[1.0]], "one finite number per segment"),
        (3, "one finite number per segment"),
        ([1.0, float("nan")], "NaN is not a JSON number"),
    ):
        change(scored[0], segments=segments)
        with pytest.raises(DataError, match=reason):
            ExternalScores(scored[:1])
    change(scored[0], segments=[0.5], hypotheses_sha256=digest(["a", "b"]), references_sha256=digest(["c", "d"]))
    with pytest.raises(DataError, match="not aligned: 2 hypotheses, 1 scores"):
        ExternalScores(scored[:1]).statistics(["a", "b"], ["c", "d"])
