import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError, StorageError
from pema.evaluation.outputs import read_hypotheses, require_line_breaks, require_writable, write_hypotheses
from pema.tasks.readers import read_lines

ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""Where `str.splitlines` ends a line."""

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff") | st.sampled_from("\n\r\u2028\x85")
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hypotheses=st.lists(texts, min_size=1, max_size=8))
def test_one_line_each_for_every_reader(tmp_path, hypotheses):
    path = tmp_path / "out.txt"
    write_hypotheses(path, hypotheses)
    expected = ["".join(repr(c)[1:-1] if c in ENDS else c for c in text) for text in hypotheses]
    assert read_hypotheses(path) == read_lines(path) == expected
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(hypotheses)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hypotheses=st.lists(texts, min_size=1, max_size=8))
def test_json_lines_keep_texts_as_they_are(tmp_path, hypotheses):
    path = tmp_path / "out.jsonl"
    details = [{"source": str(i), "finish_reason": "length"} for i in range(len(hypotheses))]
    write_hypotheses(path, hypotheses, details)
    assert read_hypotheses(path) == hypotheses
    assert read_hypotheses(path, "source") == [str(i) for i in range(len(hypotheses))]
    assert list(json.loads(path.read_text(encoding="utf-8").split("\n")[0])) == ["source", "finish_reason", "text"]


def test_what_is_not_a_hypothesis_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    for line, message in (
        ('{"text": "a"}\n{"target": "b"}', r"out\.jsonl:2: no text in the field 'text'"),
        ('{"text": null}', r"out\.jsonl:1: no text in the field 'text'"),
        ("[]", r"out\.jsonl:1 contains a JSON list, not an object"),
        ("plain", r"out\.jsonl:1 cannot be read as JSON"),
    ):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_hypotheses(path)


@pytest.mark.parametrize("name", ["out.json", "out.tsv", "out.txt.gz"])
def test_an_output_of_another_format_is_refused(name):
    with pytest.raises(ConfigError, match=r"outputs are text \(one per line\) or JSON Lines: name it \.txt or \.jsonl"):
        require_writable(Path(name))
    require_writable(Path("out.de"))
    require_writable(Path("out.JSONL"))


def test_known_bytes(tmp_path, capsys):
    write_hypotheses(tmp_path / "new" / "out.txt", ["Grüße", "", "a\nb\r\nc", r"C:\new"])
    assert (tmp_path / "new" / "out.txt").read_bytes() == "Grüße\n\na\\nb\\r\\nc\nC:\\new\n".encode()
    said = " ".join(capsys.readouterr().err.split())
    assert r"out.txt: line breaks are written as \n in 1 texts of several lines: name the file .jsonl to keep" in said
    write_hypotheses(tmp_path / "out.jsonl", ["Grüße\n"])
    assert (tmp_path / "out.jsonl").read_bytes() == '{"text": "Grüße\\n"}\n'.encode()
    assert not capsys.readouterr().err


def test_writes_are_atomic(tmp_path):
    path = tmp_path / "out.txt"
    write_hypotheses(path, ["before"])

    def broken():
        yield "after"
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*out\.txt: No space left on device"):
        write_hypotheses(path, broken())
    assert read_lines(path) == ["before"]
    assert list(tmp_path.iterdir()) == [path]


def test_line_breaks_that_were_written_as_two_characters_are_refused(tmp_path):
    """They would cost several points of BLEU without a word."""
    path = tmp_path / "h.txt"
    write_hypotheses(path, ["Hello.", "Dear Ann,\nthank you."])
    texts = read_hypotheses(path)
    with pytest.raises(DataError, match=r"h\.txt:2: contains \\n as two characters.*generate into a \.jsonl file"):
        require_line_breaks(path, texts, [("Hello.",), ("Dear Ann,\nthanks.",)])
    require_line_breaks(path, texts, [("Hello.",), (r"Dear Ann,\nthanks.",)])  # both sides are written so
    kept = tmp_path / "h.jsonl"
    write_hypotheses(kept, [r"echo '\n'"])
    require_line_breaks(kept, read_hypotheses(kept), [("echo '\n'",)])


@pytest.mark.parametrize("name", ["h.csv", "h.tsv", "h.json", "h.parquet"])
def test_hypotheses_in_another_format_are_not_read_as_lines(tmp_path, name):
    (tmp_path / name).write_text("text\na\n")
    with pytest.raises(
        DataError, match=r"texts are read from text \(one per line\) or JSON Lines: write it as \.jsonl"
    ):
        read_hypotheses(tmp_path / name)
