"""Examples that are too long for the PLM are refused before the first run."""

import json

import pytest

from pema.errors import DataError
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.plan import plan_experiment

LONG = "where is my order " * 300


@pytest.mark.parametrize(
    ("part", "example", "words"),
    [
        (
            "dev",
            {"source": "a", "target": LONG},
            r"dev\.jsonl:2: prompt \(14 tokens\) .* longer than the 512",
        ),
        (
            "test",
            {"source": LONG, "target": "b"},
            r"test\.jsonl:2: its prompt has .*, and .* takes 512 incl",
        ),
        ("train", {"source": LONG, "target": "b"}, r"train\.jsonl:2: prompt .* longer than the 512 tokens"),
    ],
)
@pytest.mark.parametrize("run", [run_experiment, plan_experiment])
def test_a_too_long_example_is_named_before_anything_runs(tmp_path, run, part, example, words):
    for name in ("train", "dev", "test"):
        rows = [{"source": "a", "target": "b"}, example if name == part else {"source": "c", "target": "d"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    parts = "\n".join(f'{name} = {{ data = "{name}.jsonl" }}' for name in ("train", "dev", "test"))
    (tmp_path / "long.toml").write_text(
        f'plm = "embedded"\n[data]\nname = "mine"\n{parts}\n[[methods]]\nlabel = "PLM"\nmethod = "plm"\n',
        encoding="utf-8",
    )
    experiment = read_config(tmp_path / "long.toml", "compare")
    with pytest.raises(DataError, match=words):
        run(experiment, tmp_path / "results", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("results/**/*seed0*"))
