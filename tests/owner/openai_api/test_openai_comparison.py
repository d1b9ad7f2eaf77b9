"""A comparison on an API that gives its likeliest tokens only, beside a proxy."""

import json

import pytest
from fake_api import KEY, ModelAPI

from in_process import train_here, write_parts
from pema.errors import ConfigError
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.plan import plan_experiment
from pema.files import read_json
from pema.owner.openai_api.vocabulary import Vocabulary
from pema.owner.opening import open_plm
from tiny import build_model, build_tokenizer

CONFIG = """
plm = "PLM"
task = "style"
template = "Say {source} ="
metrics = ["chrf"]
[data]
name = "made"
train = { data = "train.tsv" }
dev = { data = "dev.tsv" }
test = { data = "test.tsv" }
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
settings = { k = 1 }
[[methods]]
label = "PEMA"
method = "pema"
settings = { preset = "residual", rank = 8, schedule = "constant" }
grid = { lambda_max = [0.5, 1.0] }
"""


@pytest.fixture
def folder(closed, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", train_here)
    build_model("llama", seed=1, vocab_size=290).save_pretrained(tmp_path / "proxy")
    build_tokenizer(vocab_size=290).save_pretrained(tmp_path / "proxy")
    write_parts(tmp_path)
    fake = ModelAPI(closed, Vocabulary.load(str(tokens), "completions"))
    with fake.running():
        given = {"base_url": fake.url, "model": "closed", "tokenizer": str(tokens), "proxy": str(tmp_path / "proxy")}
        given |= {"endpoint": "completions", "key": KEY, "cache": "answers.sqlite"}
        (tmp_path / "api.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in given.items()))
        text = CONFIG.replace("PLM", str(tmp_path / "api.toml"), 1)
        (tmp_path / "made.toml").write_text(text, encoding="utf-8")
        yield tmp_path, fake


def test_texts_are_compared_and_a_resumed_comparison_asks_nothing_twice(folder):
    path, fake = folder
    experiment = read_config(path / "made.toml", "compare")
    assert plan_experiment(experiment, path / "results", path / "work")[0].seconds > 0
    assert not fake.requests  # a plan costs nothing
    run_experiment(experiment, path / "results", path / "work")
    asked = len(fake.requests)
    assert asked
    runs = {file.stem: read_json(file) for file in (path / "results" / "made").glob("*seed0.json")}
    assert set(runs) == {"alone-seed0", "examples-seed0", "pema-seed0"}
    plm = open_plm(path / "api.toml")
    for run in runs.values():
        assert run["dev_perplexity"] is None  # the proxy's would be another model's
        assert run["signature"]["config"]["owner"] == type(plm).__name__ == "ProxyPLM"
    trials = runs["pema-seed0"]["trials"]
    assert [trial["dev_perplexity"] for trial in trials] == [None, None]
    assert all(trial["dev_score"] is not None for trial in trials)
    (path / "results" / "made" / "examples-seed0.json").unlink()
    run_experiment(experiment, path / "results", path / "work")
    assert len(fake.requests) == asked


def test_what_an_api_cannot_give_is_refused_before_anything_is_asked(folder):
    path, fake = folder
    text = (path / "made.toml").read_text(encoding="utf-8")
    for old, new, message in (
        ("max_new_tokens = 4", "num_beams = 2", "decoding: num_beams=2 needs the probabilities of all tokens"),
        ("settings = { k = 1 }", "", "examples: few-shot chooses by the likelihood of dev targets"),
        ('preset = "residual"', 'contexts = "predicted"', "PEMA: pema needs `predicted` contexts"),
    ):
        (path / "refused.toml").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            run_experiment(read_config(path / "refused.toml", "compare"), path / "results", path / "work")
    assert not fake.requests
    assert not list((path / "results").rglob("*.json"))
