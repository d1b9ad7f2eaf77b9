"""Comparisons of labels that are chosen by likelihood."""

import json

import pytest
from tests.tiny import build_model, build_tokenizer

from pema.errors import ConfigError, DataError
from pema.evaluation.classification import accuracy, label_accuracy
from pema.evaluation.evaluate import evaluate
from pema.evaluation.score import score
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.estimate import Speed
from pema.experiments.plan import plan_experiment
from pema.experiments.texts import LABEL, read_labels, read_texts, texts_file, write_texts
from pema.experiments.workplace import Workplace
from pema.files import read_json
from pema.pages.report.document import report
from pema.tasks.example import Example
from pema.tasks.labels import labels_of
from pema.tasks.registry import get_task
from reproduction.folders import pack, unpack
from reproduction.lines import write_lines

NAMES = ("dog", "house", "house is small")
WHOLE = """
task = "classification"
plm = "PLM"
device = "cpu"
reference = "alone"
[data]
name = "made"
train = { data = "train.tsv" }
dev = { data = "dev.tsv" }
test = { data = "test.tsv" }
[budget]
trials = 2
epochs = 2
[[methods]]
label = "alone"
method = "plm"
[[methods]]
label = "PEMA"
method = "pema"
settings = { rank = 8, learning_rate = 0.01 }
grid = { schedule = ["constant", "unrolling"] }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    build_model().save_pretrained(folder / "plm")
    build_tokenizer().save_pretrained(folder / "plm")
    for part, count in (("train", 12), ("dev", 3), ("test", 6)):
        rows = "".join(f"the {NAMES[i % 3]} of {part} {i}\t{NAMES[i % 3]}\n" for i in range(count))
        (folder / f"{part}.tsv").write_text(rows + ("a bird\tbird\n" if part == "test" else ""), encoding="utf-8")
    return folder


def read(folder, name="made", text=WHOLE):
    (folder / f"{name}.toml").write_text(text.replace("PLM", str(folder / "plm"), 1), encoding="utf-8")
    return read_config(folder / f"{name}.toml", "compare")


@pytest.fixture(scope="module")
def compared(folder):
    experiment = read(folder)
    return experiment, run_experiment(experiment, folder / "results", folder / "work")


def test_the_labels_of_a_run_are_those_of_its_method(folder, compared):
    experiment, comparison = compared
    assert experiment.metrics == ("accuracy", "label_accuracy")
    assert experiment.data.choices == NAMES
    workplace, test = Workplace(folder / "work", experiment), experiment.data.test
    references = [example.references for example in test]
    for line, row in zip(experiment.lines(), comparison.rows, strict=True):
        run = read_json(folder / "results" / "made" / f"{line.label.lower()}-seed0.json")
        stages, plm = workplace.stages(line.method, run["settings"], 0), workplace.plm({})
        with workplace.open(stages, plm) as adapted:
            expected = adapted.classify(test, NAMES).choices
        assert read_labels(folder / "results" / "made", run["run"]) == expected
        value = score(accuracy(), expected, references).value
        assert run["scores"]["label_accuracy"]["value"] == value == row.metrics["label_accuracy"].mean
        assert run["scores"]["label_accuracy"]["signature"].startswith("label_accuracy|choice:likelihood|norm:")
        assert run["signature"]["config"]["labels"] == list(NAMES)
        texts = read_texts(folder / "results" / "made", run["run"])
        assert row.metrics["accuracy"].mean == score(accuracy(), texts, references).value
        assert row.metrics["label_accuracy"].low <= value <= row.metrics["label_accuracy"].high
    assert {each.metric for each in comparison.differences} == {"accuracy", "label_accuracy"}
    assert "label accuracy" in report(folder / "results" / "made")


def test_a_reader_sees_the_label_beside_the_text(folder, compared):
    lines = (folder / "results" / "made" / "pema-seed0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [[LABEL, "text"]] * 7


def test_results_are_committed_with_their_labels(folder, compared, tmp_path):
    results = folder / "results" / "made"
    write_lines(tmp_path / "made.jsonl", pack(results))
    unpack(tmp_path / "made.jsonl", tmp_path / "again")
    for run in ("alone-seed0", "pema-seed0"):
        assert (tmp_path / "again" / f"{run}.jsonl").read_bytes() == (results / f"{run}.jsonl").read_bytes()


def test_candidates_are_chosen_by_the_labels_of_dev(folder, compared):
    text = 'metrics = ["label_accuracy"]\n' + WHOLE
    experiment = read(folder, "chosen", text)
    assert experiment.choice_metric == "label_accuracy"
    run_experiment(experiment, folder / "results", folder / "work")
    run = read_json(folder / "results" / "chosen" / "pema-seed0.json")
    workplace, dev = Workplace(folder / "work", experiment), experiment.data.dev
    (_, line) = experiment.lines()
    for trial in run["trials"]:
        stages, plm = workplace.stages(line.method, trial["settings"], 0), workplace.plm({})
        with workplace.open(stages, plm) as adapted:
            expected = adapted.classify(dev, NAMES).choices
        assert trial["dev_score"] == score(accuracy(), expected, [each.references for each in dev]).value
    given = f"labels = {list(NAMES[:2])}\ntrain"
    other = read(folder, "other", text.replace("\ntrain", f"\n{given}"))
    assert other.data.choices == NAMES[:2]
    assert other.data.digest() != experiment.data.digest()
    assert Workplace(folder / "work", other).dev_texts_file(stages).name != workplace.dev_texts_file(stages).name


def test_a_plan_counts_the_choice_of_labels(folder, monkeypatch):
    monkeypatch.setattr(Speed, "of", lambda *_: Speed(1e-3, 1e-3, 1e-3))

    def seconds(metrics):
        experiment = read(folder, "planned", f"metrics = {metrics}\n{WHOLE}")
        return sum(line.seconds for line in plan_experiment(experiment, folder / "none", folder / "none"))

    assert seconds('["accuracy", "label_accuracy"]') > seconds('["accuracy"]')


def test_the_labels_are_announced(folder, capsys):
    read(folder)
    told = "label_accuracy chooses from 3 labels, the different targets of train; 1 of 7 test examples have another"
    assert told in " ".join(capsys.readouterr().err.split())
    read(folder, "given", WHOLE.replace("\ntrain", '\nlabels = ["bird", "dog", "house", "house is small"]\ntrain'))
    assert "chooses from 4 labels, those of data.labels." in " ".join(capsys.readouterr().err.split())
    read(folder, "without", 'metrics = ["accuracy"]\n' + WHOLE)
    assert "label_accuracy" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the label 'dog' is given 2 times"):
        read(folder, "twice", WHOLE.replace("\ntrain", '\nlabels = ["dog", "dog"]\ntrain'))


def test_labels_are_the_different_targets():
    examples = [Example("a", "y"), Example("b", "x", alternatives=("z",)), Example("c", "y")]
    assert labels_of(examples) == ("x", "y", "z")


def test_texts_alone_are_not_chosen_labels():
    with pytest.raises(ConfigError, match=r"label_accuracy is measured by `pema compare`.*here give accuracy"):
        evaluate(get_task("classification"), ["a"], ["a"], metrics=["label_accuracy"])
    scores = evaluate(
        get_task("classification"), ["a", "a"], ["a", "b"], metrics=["accuracy", "label_accuracy"], chosen=["b", "b"]
    )
    assert (scores["accuracy"].value, scores["label_accuracy"].value) == (0.5, 0.5)
    assert score(label_accuracy(), ["a"], ["a"]).signature == "label_accuracy|choice:likelihood|" + score(
        accuracy(), ["a"], ["a"]
    ).signature.removeprefix("accuracy|")


def test_labels_stand_beside_texts_and_their_absence_is_named(tmp_path):
    write_texts(tmp_path, "a-seed0", ["x", "y"], ["one", "two"])
    assert texts_file(tmp_path, "a-seed0") == tmp_path / "a-seed0.jsonl"
    assert (read_texts(tmp_path, "a-seed0"), read_labels(tmp_path, "a-seed0")) == (["x", "y"], ["one", "two"])
    write_texts(tmp_path, "a-seed0", ["x", "y"])
    with pytest.raises(DataError, match=r"has no labels of the run a-seed0: remove a-seed0\.json to run it again"):
        read_labels(tmp_path, "a-seed0")
