import json

import pytest

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example, Turn
from pema.tasks.readers import read, read_examples, read_references


def bare(examples):
    return [Example(each.source, each.target, "", each.history, each.alternatives) for each in examples]


def examples(*rows, **fields):
    return bare(read_examples(rows, **fields))


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
HISTORY = (Turn("system", "Be brief."), Turn("user", "Hi"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"source": "a", "target": "b", "id": 3}, Example("a", "b")),
        ({"source": "a", "target": "b", "history": None}, Example("a", "b")),
        ({"source": "a", "target": "b", "history": TURNS}, Example("a", "b", "", HISTORY)),
        ({"source": "a", "targets": ["b", "c", 3]}, Example("a", "b", alternatives=("c", "3"))),
        ({"source": "a", "targets": ["b"], "history": TURNS}, Example("a", "b", "", HISTORY)),
        ({"prompt": "a", "completion": " b"}, Example("a", " b")),
        ({"instruction": "Do.", "input": "a", "output": "b", "text": "Do. a b"}, Example("Do.\n\na", "b")),
        ({"instruction": "Do.", "input": "", "output": "b"}, Example("Do.", "b")),
        ({"instruction": "Do.", "input": None, "output": "b"}, Example("Do.", "b")),
        ({"instruction": "Do.", "output": "b"}, Example("Do.", "b")),
        ({"instruction": "", "input": "a", "output": "b"}, Example("a", "b")),
        ({"input": "a", "output": "b"}, Example("a", "b")),
    ],
)
def test_the_shapes_of_rows(row, expected):
    assert examples(row, row) == [expected, expected]


def test_a_prompt_and_a_completion_may_be_turns():
    row = {
        "prompt": [*TURNS, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}],
        "completion": [{"role": "assistant", "content": "So long"}],
    }
    expected = Example("Bye", "So long", "data, row 0, turn 5", (*HISTORY, Turn("assistant", "Hello")))
    assert read_examples([row]) == [expected]


def test_named_columns_come_before_shapes():
    row = {"source": "a", "target": "b", "messages": "c", "refs": ["d", "e"], "gold": {"x": 1}}
    assert examples(row, source_field="messages", target_field="refs") == [Example("c", "d", alternatives=("e",))]
    assert examples(row, source_field="messages") == [Example("c", "b")]
    assert examples(row, target_field="gold.x") == [Example("a", "1")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a"}],
            r"row 0: the texts are not recognised: the columns are 'text', known are source and",
        ),
        ([{"source": "a", "target": "b", "targets": ["c"]}], r"row 0: source and target as well as source and targets"),
        (
            [{"prompt": "a", "completion": "b", "messages": []}],
            r"prompt and completion as well as messages are both there: name the columns",
        ),
        (
            [{"source": "a", "target": "b"}, {"prompt": "a", "completion": "b"}],
            r"row 1: the row contains prompt and completion, but the rows before contain source and target: write all",
        ),
        ([{"source": "a", "targets": []}], r"row 0: 'targets' is an empty list"),
        ([{"source": "a", "targets": "b"}], r"row 0: 'targets' is a str, not a list of texts"),
        ([{"source": "a", "targets": ["b", " "]}], r"row 0: 'targets.1' is blank"),
        ([{"source": "a", "targets": [["b"]]}], r"row 0: 'targets.0' is a list, not a text"),
        ([{"source": "a", "target": "b", "history": "c"}], r"row 0: 'history' is a str, not a list of turns"),
        ([{"instruction": "", "input": None, "output": "b"}], r"row 0: 'instruction' and 'input' are both empty"),
        ([{"instruction": "a", "output": ""}], r"row 0: 'output' is blank"),
        ([{"prompt": None, "completion": "b"}], r"row 0: 'prompt' is missing"),
        ([{"prompt": "a", "completion": [1]}], r"row 0: 'completion' is a list, not a text"),
        (["a"], r"row 0 is a str, not an object"),
        ([("a", "b")], r"row 0 is a tuple, not an object"),
    ],
)
def test_rows_without_a_shape(rows, message):
    with pytest.raises(DataError, match=message):
        read_examples(rows)


def test_columns_may_come_and_go_inside_a_shape():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e", "id": 1}]
    assert examples(*rows, *rows) == [Example("a", "b"), Example("c\n\nd", "e")] * 2


def test_the_number_of_examples_is_reported(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"source": "a", "targets": ["b", "c"]}) + "\n")
    assert str(read(tmp_path / "d.jsonl")) == f"{tmp_path}/d.jsonl: 1 examples with 2 targets (source and targets)"
    assert str(read([{"en": "a", "de": "b"}] * 1500, source_field="en", target_field="de")) == (
        "data: 1,500 examples (en and de)"
    )
    for name in ("a", "b"):
        (tmp_path / name).write_text("x\n")
    reading = read(source=tmp_path / "a", target=tmp_path / "b")
    assert str(reading) == f"{tmp_path}/a and {tmp_path}/b: 1 examples (one text per line)"


def test_references(tmp_path):
    def references(name, content):
        (tmp_path / name).write_text(content)
        return read_references(tmp_path / name)

    assert references("r.txt", "a\n\nb c\n") == [("a",), ("",), ("b c",)]
    assert references("r.jsonl", '{"targets": ["a", "b"]}\n{"targets": ["c"], "source": "x"}\n') == [("a", "b"), ("c",)]
    assert references("s.jsonl", '{"source": "x", "target": "a"}\n{"target": 1}\n') == [("a",), ("1",)]
    assert references("p.csv", "prompt,completion\nx,a\n") == [("a",)]
    (tmp_path / "c.csv").write_text("\ufeffMail;Reply\nx;a\ny;b\n")
    assert read_references(tmp_path / "c.csv", "Reply") == [("a",), ("b",)]
    with pytest.raises(DataError, match=r"no column 'reply': the columns are 'Mail', 'Reply'"):
        read_references(tmp_path / "c.csv", "reply")
    with pytest.raises(ConfigError, match=r"target_field='Reply' names a column, and .*r\.txt has one text per line"):
        read_references(tmp_path / "r.txt", "Reply")
    with pytest.raises(DataError, match=r"e\.jsonl is empty"):
        references("e.jsonl", "\n")
    with pytest.raises(DataError, match=r"m\.jsonl:1: target as well as targets are both there"):
        references("m.jsonl", '{"target": "a", "targets": ["a"]}')
