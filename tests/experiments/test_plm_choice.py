"""A comparison that chooses among PLMs: the run is that of the chosen one."""

import pytest
from tests.tiny import build_model, build_tokenizer

from in_process import train_here, write_parts
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.texts import read_texts
from pema.files import read_json
from pema.generation.decoding import generate
from pema.owner.local import LocalPLM

CONFIG = """
task = "style"
template = "Say {source} ="
metrics = ["chrf"]
choose_by = "perplexity"
[data]
name = "made"
train = { data = "train.tsv" }
dev = { data = "dev.tsv" }
test = { data = "test.tsv" }
[decoding]
max_new_tokens = 6
[[methods]]
label = "alone"
method = "plm"
"""


def test_the_texts_are_those_of_the_chosen_plm(tmp_path, monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", train_here)
    write_parts(tmp_path)
    names = [str(tmp_path / f"plm{seed}") for seed in (3, 4)]
    for name, seed in zip(names, (3, 4), strict=True):
        build_model(seed=seed).save_pretrained(name)
        build_tokenizer().save_pretrained(name)
    for default in names:
        grid = f"grid = {{ plm = {names} }}\n"
        (tmp_path / "made.toml").write_text(f'plm = "{default}"\n{CONFIG}{grid}', encoding="utf-8")
        experiment = read_config(tmp_path / "made.toml", "compare")
        results = tmp_path / f"results{names.index(default)}"
        run_experiment(experiment, results, tmp_path / "work")
        run = read_json(results / "made" / "alone-seed0.json")
        perplexities = {trial["settings"]["plm"]: trial["dev_perplexity"] for trial in run["trials"]}
        chosen = min(perplexities, key=perplexities.get)
        assert run["settings"] == {"plm": chosen}
        assert run["dev_perplexity"] == pytest.approx(perplexities[chosen])
        sources = [example.source for example in experiment.data.test]
        texts = generate(LocalPLM.load(chosen), None, sources, experiment.task, max_new_tokens=6, stop=("\n",))
        assert read_texts(results / "made", "alone-seed0") == texts
