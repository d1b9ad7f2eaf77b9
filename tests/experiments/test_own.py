"""A task, a metric and a method of a user's own in a comparison, by `module:attribute`."""

import sys

import pytest
from tests.experiments.conftest import CONFIG
from tests.tiny import build_model, build_tokenizer

from pema.cli import main
from pema.errors import ConfigError, MismatchError
from pema.evaluation.evaluate import evaluate, get_metric
from pema.evaluation.notation import metric_name
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.files import read_json
from pema.methods.registry import get_method, method_name
from pema.own import is_own, own, source_digest
from pema.tasks.registry import get_task

MODULE = '''
"""What a user wrote."""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pema.evaluation.translation import bleu
from pema.methods.contract import Method, Needs, TrainingReport
from pema.methods.plm_alone import PLMAlone
from pema.tasks.registry import Task
from pema.tasks.template import Template

german = Task("anything", Template("German of {source}: "), ("own_things:words",), "into German")
half = Method


def words(hypothesis, reference):
    return abs(len(hypothesis.split()) - len(reference.split()))


def broken(hypothesis, reference):
    return None


def failing(hypothesis, reference):
    return 1 / 0


class Bleu:
    def __init__(self):
        self.statistics, self.value, self.signature = (getattr(bleu(), n) for n in ("statistics", "value", "signature"))


@dataclass(frozen=True)
class Shouting(PLMAlone):
    """The PLM alone, with a stage of training that leaves a file."""

    name: ClassVar[str] = "shouting"
    loudness: int = 1

    def train(self, job, prepared: Path, output: Path) -> TrainingReport:
        (output / "loudness").write_text(str(self.loudness), encoding="utf-8")
        return TrainingReport(self.loudness, 0.5)


class Nameless(PLMAlone):
    name = "a/b"
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A working directory with the user's module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_things.py").write_text(MODULE, encoding="utf-8")
    (folder / "own_broken.py").write_text("raise RuntimeError('half finished')", encoding="utf-8")
    (folder / "own_needs.py").write_text("import surely_not_installed", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        patch.chdir(folder)
        yield folder
    for name in ("own_things", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a:b", True), ("a.b_1:c.d", True), ("bleu", False), ("m:n#x", False), ("s:org/model", False), ("1:b", False)],
)
def test_what_has_the_form_of_an_own_name(name, expected):
    assert is_own(name) is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:x", r"metric 'nowhere_at_all:x': there is no module 'nowhere_at_all', neither .* directory"),
        ("own_things.sub:x", r"there is no module 'own_things.sub'"),
        ("own_broken:x", r"importing own_broken fails with RuntimeError: half finished"),
        ("own_needs:x", r"own_needs needs 'surely_not_installed', which is not installed"),
        ("own_things:word", r"unknown metric in own_things: 'word': .*did you mean 'words'"),
        ("own_things:german", r"is Task: name a function of a hypothesis and a reference, or a metric"),
        ("own_things:Shouting.loudness", r"is int: name a function"),
        ("own_things:Template", r"is a class that cannot be used without arguments"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(module, name, message):
    with pytest.raises(ConfigError, match=message):
        get_metric(name)


def test_a_function_of_two_texts_is_a_metric_and_its_value_the_mean(module):
    scores = evaluate(get_task("own_things:german"), ["a b c", "d"], ["a", "d"])
    assert list(scores) == ["own_things:words"]
    assert scores["own_things:words"].value == 1.0
    digest = source_digest("own_things:words")
    assert scores["own_things:words"].signature == f"own_things:words@{digest[:12]}|n:2|scale:1"
    assert metric_name("own_things:words") == "words"
    assert metric_name("bleu:zh") == "BLEU (zh)"


def test_a_class_of_metrics_is_a_metric(module):
    metric = get_metric("own_things:Bleu")
    assert metric.value(metric.statistics(["a b c d e"], ["a b c d e"]).sum(0)) == pytest.approx(100)


@pytest.mark.parametrize(("name", "message"), [("broken", "returned None for 'a'"), ("failing", "ZeroDivisionError")])
def test_a_function_that_gives_no_number_is_named(module, name, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(get_task("style"), ["a"], ["b"], metrics=[f"own_things:{name}"])


def test_tasks_and_methods_are_checked(module):
    task = get_task("own_things:german", "To {source}: ")
    assert (task.name, task.template.text) == ("own_things:german", "To {source}: ")
    with pytest.raises(ConfigError, match=r"task 'own_things:words' is function, not a pema.tasks.registry.Task"):
        get_task("own_things:words")
    assert method_name(get_method("own_things:Shouting")) == "own_things:Shouting"
    assert method_name(get_method("plm")) == "plm"
    for name in ("own_things:words", "own_things:Task"):
        with pytest.raises(ConfigError, match=r"must be a subclass of pema\.methods\.contract\.Method"):
            get_method(name)
    with pytest.raises(ConfigError, match=r"'own_things:half' is not complete: define .*open.*Method"):
        get_method("own_things:half")
    with pytest.raises(ConfigError, match="needs a class attribute `name`"):
        get_method("own_things:Nameless")


def test_a_file_in_the_working_directory_does_not_replace_a_library(module):
    (module / "json.py").write_text("raise RuntimeError", encoding="utf-8")
    assert own("json:dumps", "metric")({}) == "{}"


def test_a_comparison_with_own_task_metric_and_method(module, monkeypatch, capsys):
    build_model(seed=3).save_pretrained(module / "plm")
    build_tokenizer().save_pretrained(module / "plm")
    for part in ("train", "dev", "test"):
        rows = "".join(f"the house {i}\tdas Haus {i}\n" for i in range(4))
        (module / f"{part}.tsv").write_text(rows, encoding="utf-8")
    head, _, _ = CONFIG.partition('[[methods]]\nlabel = "PEMA"')
    text = head.replace("PLM", str(module / "plm"), 1).replace('["chrf", "bleu"]', '["own_things:words", "chrf"]')
    text = f'task = "own_things:german"\n{text}'
    text += '[[methods]]\nlabel = "mine"\nmethod = "own_things:Shouting"\nsettings = { loudness = 3 }\n'
    (module / "own.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["pema", "compare", "own.toml", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err
    run = read_json(module / "results" / "own" / "mine-seed0.json")
    assert run["method"] == "own_things:Shouting"
    assert run["settings"] == {"loudness": 3}
    assert run["costs"]["trainable_parameters"] == 3
    assert set(run["scores"]) == {"own_things:words", "chrf"}
    digest = source_digest("own_things:words")
    assert run["signature"]["config"]["own"] == dict.fromkeys(
        ("own_things:german", "own_things:words", "own_things:Shouting"), digest
    )
    # A result of another version of the function is not taken for one of this.
    source = (module / "own_things.py").read_text(encoding="utf-8")
    (module / "own_things.py").write_text(source.replace("abs(", "2 * abs("), encoding="utf-8")
    source_digest.cache_clear()
    with pytest.raises(MismatchError, match=r"run with another own.own_things:"):
        run_experiment(read_config(module / "own.toml", "compare"), module / "results", module / "runs")
    source_digest.cache_clear()
    (module / "own_things.py").write_text(source, encoding="utf-8")
