"""A comparison on a PLM that llama.cpp runs, beside the same file in transformers; interrupted, resumed, refused."""

import json
import sys

import pytest

from in_process import train_here, write_parts
from pema.cli import main
from pema.errors import ConfigError
from pema.experiments import compare
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.plan import plan_experiment
from pema.files import read_json

pytest.importorskip("xllamacpp")
pytest.importorskip("faiss")

CONFIG = """
name = "tiny"
plm = "{plm}"
task = "style"
template = "{{source}}:"
chat = false
metrics = ["chrf"]
reference = "alone"
[data]
name = "made"
train = {{ data = "train.tsv" }}
dev = {{ data = "dev.tsv" }}
test = {{ data = "test.tsv" }}
[budget]
epochs = 2
[decoding]
max_new_tokens = 4
[[methods]]
label = "alone"
method = "plm"
[[methods]]
label = "examples"
method = "few-shot"
[[methods]]
label = "found"
method = "retrieved-few-shot"
settings = {{ k = 1 }}
[[methods]]
label = "PEMA"
method = "pema"
settings = {{ preset = "residual", rank = 8, schedule = "constant" }}
grid = {{ learning_rate = [1e-6, 3e-2] }}
[[methods]]
label = "kNN-LM"
method = "knn-lm"
settings = {{ k = 2 }}
[[methods]]
label = "small"
method = "small-lm"
settings = {{ small = "{small}", epochs = 1, learning_rate = 1e-3 }}
"""


LABELS = ("alone", "examples", "found", "pema", "knn-lm", "small")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_parts(folder)
    for name, plm in (("engine", f"llamacpp:{files['F32']}"), ("local", files["F32"])):
        text = CONFIG.format(plm=plm, small=files["F32"])
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _trained_here(monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", train_here)


def run(folder, name, results="results"):
    experiment = read_config(folder / f"{name}.toml", "compare")
    run_experiment(experiment, folder / results / name, folder / "work")
    return {path.stem: read_json(path) for path in (folder / results / name / "tiny").glob("*seed0.json")}


def test_every_method_without_weights_runs_as_with_transformers(folder, monkeypatch):
    """The first command is interrupted at its third run; the second one runs the others only."""
    scored = []

    def interrupted(*given, **settings):
        if len(scored) == 2:
            scored.append(None)
            raise KeyboardInterrupt
        scored.append(1)
        return evaluate(*given, **settings)

    evaluate = compare.evaluate
    monkeypatch.setattr(compare, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "engine")
    assert len(list((folder / "results" / "engine" / "tiny").glob("*seed0.json"))) == 2
    engine, local = run(folder, "engine"), run(folder, "local")
    assert len(scored) == 3 + 4 + 6
    assert set(engine) == set(local) == {f"{label}-seed0" for label in LABELS}
    for name, result in engine.items():
        assert result["dev_perplexity"] == pytest.approx(local[name]["dev_perplexity"], rel=0.02), name
        assert result["scores"]["chrf"]["value"] == pytest.approx(local[name]["scores"]["chrf"]["value"], abs=10), name
        assert result["settings"] == local[name]["settings"]
        assert result["needs"] == local[name]["needs"]
        assert result["costs"]["trainable_parameters"] == local[name]["costs"]["trainable_parameters"]
        assert result["signature"]["config"]["owner"] == "LlamaCppPLM"
        assert "owner" not in local[name]["signature"]["config"]
    assert engine["pema-seed0"]["dev_perplexity"] < engine["alone-seed0"]["dev_perplexity"]
    texts = [(folder / "results" / name / "tiny" / "alone-seed0.txt").read_text() for name in ("engine", "local")]
    assert texts[0] == texts[1]


def test_the_command_line_finds_the_runs_of_python_and_plans_what_is_left(folder, monkeypatch, capsys):
    run(folder, "engine")
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", None)
    arguments = ["compare", folder / "engine.toml", "-o", folder / "results" / "engine", "--work", folder / "work"]
    monkeypatch.setattr(sys, "argv", ["pema", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == read_json(folder / "results" / "engine" / "tiny" / "comparison.json")["rows"]
    assert shown["missing"] == []
    for name in ("engine", "local"):
        lines = plan_experiment(read_config(folder / f"{name}.toml", "compare"), folder / "fresh", folder / "none")
        assert [(line.runs, line.seconds > 0, line.memory_bytes > 0) for line in lines] == [(1, True, True)] * 6
    assert not (folder / "none").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_method_that_needs_weights_is_refused_before_the_first_run(folder, files, method):
    if method == "lora":
        pytest.importorskip("peft")
    text = (folder / "engine.toml").read_text(encoding="utf-8")
    text += f'[[methods]]\nlabel = "tuned"\nmethod = "{method}"\n'
    (folder / "tuned.toml").write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError,
        match=rf"tuned: {method} needs the PLM's weights in this process, and llamacpp:.* is run elsewhere: leave it "
        "out, or give it a `plm` of its own",
    ):
        run(folder, "tuned", "none")
    assert not list((folder / "none").rglob("*.json"))
