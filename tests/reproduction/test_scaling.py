"""The table of one and two workers, from made results."""

import pytest

from pema.signature import signature
from reproduction.experiments.scaled import Stage
from reproduction.lines import put_run
from reproduction.tables import scaling


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "FILE", tmp_path / "scaling.jsonl")
    return tmp_path / "scaling.jsonl"


def write(file, digest=lambda stage: stage.name):
    for name, ways in scaling.STAGES.items():
        for engine, workers in ways:
            stage = Stage(name, engine, workers, "embedded", 1, 1, 1)
            times = {"start": [9.0, 8.0], "work": [6.0 / workers, 7.0], "count": 1200, "load_average": 0.2}
            given = {} if name == "train" else {"digest": digest(stage)}
            put_run(file, stage.run, times | given | {"signature": signature({}, 0)})


def test_there_is_no_section_without_results(file):
    assert scaling.scaling() == ""


def test_the_shortest_times_are_compared_with_those_of_one_process(file):
    write(file)
    text = scaling.scaling()
    assert "| `pema build` | one process | 8.0 s | 6.0 s | 200 tokens/s | 1.00 |" in text
    assert "| `pema build` | Ray, 2 | 8.0 s | 3.0 s | 400 tokens/s | 2.00 |" in text
    assert "| `pema train` | `accelerate launch`, 2 | 8.0 s | 3.0 s | 400 pairs/s | 2.00 |" in text
    assert "By their digests all memories are the same and all texts are the same." in text
    assert f"machine before: 0.2. Made by `{scaling.COMMAND}` on " in text


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        (lambda stage: stage.run, "The memories and the texts differ."),
        (lambda stage: stage.engine if stage.name == "build" else "", "By their digests all texts are the same."),
    ],
)
def test_the_page_says_what_differs(file, digest, expected):
    write(file, digest)
    assert expected in scaling.scaling()
