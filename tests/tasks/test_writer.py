"""Written examples are read back as they were."""

import json
from dataclasses import replace

from pema.tasks.example import Example, Turn
from pema.tasks.readers import read_examples, read_sources
from pema.tasks.writer import write_examples

TURNS = (Turn("user", "Hi\nthere"), Turn("assistant", "Grüße\u2028"))
ONE, SEVERAL = Example("a", "x", history=TURNS), Example("b", "y", alternatives=("z",))


def read_back(path):
    return [replace(example, where="") for example in read_examples(path)]


def test_targets_and_histories_are_read_back(tmp_path):
    for examples in ([ONE], [SEVERAL], [ONE, SEVERAL]):
        write_examples(tmp_path / "data.jsonl", examples)
        assert read_back(tmp_path / "data.jsonl") == examples


def test_a_source_without_a_target_has_none(tmp_path):
    write_examples(tmp_path / "new.jsonl", [replace(ONE, target="")])
    assert set(json.loads((tmp_path / "new.jsonl").read_text(encoding="utf-8"))) == {"source", "history"}
    assert [(each.source, each.history) for each in read_sources(tmp_path / "new.jsonl")] == [("a", TURNS)]
