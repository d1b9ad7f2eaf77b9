"""A small comparison on a tiny PLM, whose files and results several modules read."""

import pytest
from tests.tiny import build_model, build_tokenizer

from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config

CONFIG = """
title = "Tiny"
plm = "PLM"
seeds = [0, 1]
reference = "alone"
metrics = ["chrf", "bleu"]
[data]
name = "made"
train = { data = "train.tsv" }
dev = { data = "dev.tsv" }
test = { data = "test.tsv" }
[budget]
epochs = 2
[[methods]]
label = "alone"
method = "plm"
[[methods]]
label = "PEMA"
method = "pema"
settings = { preset = "residual", rank = 16, schedule = "constant", lambda_max = 1.0 }
grid = { learning_rate = [1e-6, 3e-2] }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    build_model(seed=3).save_pretrained(folder / "plm")
    build_tokenizer().save_pretrained(folder / "plm")
    for part, numbers in (("train", range(20)), ("dev", range(20, 23)), ("test", range(30, 34))):
        rows = "".join(f"the house {i}\tdas Haus {i}\n" for i in numbers)
        (folder / f"{part}.tsv").write_text(rows, encoding="utf-8")
    (folder / "tiny.toml").write_text(CONFIG.replace("PLM", str(folder / "plm"), 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compared(folder):
    experiment = read_config(folder / "tiny.toml", "compare")
    return experiment, run_experiment(experiment, folder / "results", folder / "work")
