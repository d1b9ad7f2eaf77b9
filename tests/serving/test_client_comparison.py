"""A comparison on a PLM behind `pema serve`, whose policy keeps targets away from the owner."""

import pytest
from served import KEYS, key, listening

from in_process import train_here, write_parts
from pema.errors import ConfigError
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.plan import plan_experiment
from pema.files import read_json
from pema.serving.policy import Policy

CONFIG = """
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
label = "PEMA"
method = "pema"
settings = { preset = "residual", rank = 8, contexts = "predicted" }
grid = { lambda_max = [0.5, 0.9] }
"""


def test_where_only_predicted_contexts_are_offered_no_target_is_sent(plm, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", train_here)
    write_parts(tmp_path)
    monkeypatch.setenv("PEMA_API_KEY", KEYS["acme"])
    with listening(plm, Policy(keys=(key(contexts=("predicted",)),))) as (url, _):
        (tmp_path / "made.toml").write_text(f'plm = "{url}"\n{CONFIG}', encoding="utf-8")
        experiment = read_config(tmp_path / "made.toml", "compare")
        assert plan_experiment(experiment, tmp_path / "results", tmp_path / "work")[1].seconds > 0
        run_experiment(experiment, tmp_path / "results", tmp_path / "work")
        for name in ("alone", "pema"):
            run = read_json(tmp_path / "results" / "made" / f"{name}-seed0.json")
            assert run["dev_perplexity"] is None  # it would take teacher contexts of the dev targets
            assert run["signature"]["config"]["owner"] == "RemotePLM"
            assert run["needs"] == {"weights": "none", "targets_at_owner": False, "gradients": False}
        assert len(run["trials"]) == 2
        text = (tmp_path / "made.toml").read_text(encoding="utf-8").replace('contexts = "predicted"', "init = 'pca'")
        (tmp_path / "teacher.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"PEMA: pema needs `teacher` contexts, which http://.* does not offer"):
            run_experiment(read_config(tmp_path / "teacher.toml", "compare"), tmp_path / "none", tmp_path / "work")
