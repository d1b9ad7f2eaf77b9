import gzip
import io
import re
import sys

import datasets
import pandas
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example
from pema.tasks.readers import from_dataset, read_examples, read_lines

values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(examples):
    return [(example.source, example.target) for example in examples]


class Stream:
    """A frame of another library: only the interface of Arrow."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


@quick
@given(st.lists(st.tuples(values, values), min_size=1), st.sampled_from(["snappy", "zstd", None]), st.booleans())
def test_frames_and_parquet_round_trip(tmp_path, pairs, compression, zipped):
    columns = {"source": [a for a, _ in pairs], "id": list(range(len(pairs))), "target": [b for _, b in pairs]}
    table = pyarrow.table(columns)
    frame = pandas.DataFrame(columns, index=[7] * len(pairs))
    file = io.BytesIO()
    parquet.write_table(table, file, compression=compression)
    path = tmp_path / "d.parquet"
    path.write_bytes(gzip.compress(file.getvalue()) if zipped else file.getvalue())
    streamed = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    for data in (path, str(path), table, Stream(table), frame, streamed, iter(table.to_pylist())):
        examples = read_examples(data)
        assert texts(examples) == pairs
        name = str(path) if isinstance(data, type(path) | str) else "data"
        assert [example.where for example in examples] == [f"{name}, row {i}" for i in range(len(pairs))]


def test_parquet_with_nested_columns(tmp_path):
    rows = [{"translation": {"en": "a", "de": "b"}, "refs": ["c", "d"], "other": 1}] * 2000
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=700)
    examples = read_examples(tmp_path / "d.parquet", source_field="translation.en", target_field="translation.de")
    assert texts(examples) == [("a", "b")] * 2000
    examples = read_examples(tmp_path / "d.parquet", source_field="translation.en", target_field="refs", limit=1500)
    assert len(examples) == 1500
    assert examples[-1].references == ("c", "d")


def test_conversations_in_parquet(tmp_path):
    turns = [{"role": "user", "content": "u", "tool_calls": None}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "d.parquet")
    expected = [Example("u", "a", f"{tmp_path}/d.parquet, row 0, turn 2")]
    assert read_examples(tmp_path / "d.parquet") == expected


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"source": ["a"] * 9, "target": [str(i) for i in range(9)]}), path)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"d\.parquet: no column 'en': the columns are 'source', 'target'"):
        read_examples(path, source_field="en", target_field="target")
    with pytest.raises(DataError, match=r"d\.parquet is a Parquet file, not a text file: give it as data \(--data\)"):
        read_lines(path)
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"d\.parquet is a damaged Parquet file: .* Copy or download it again"):
        read_examples(path)
    path.write_bytes(whole[:8] + b"\xff" * 60 + whole[68:])
    with pytest.raises(DataError, match=r"d\.parquet is a damaged Parquet file: "):
        read_examples(path)
    parquet.write_table(pyarrow.table({"source": ["a", "b"], "target": ["c", None]}), path)
    with pytest.raises(DataError, match=r"d\.parquet, row 1: 'target' is missing \(None\)"):
        read_examples(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=re.escape("Parquet files need the package pyarrow: pip install 'datasets>=")):
        read_examples(path)
    with pytest.raises(ConfigError, match=re.escape("a Stream is read through pyarrow; such frames need the package")):
        read_examples(Stream(None))


def test_zstd(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(b'{"source": "a", "target": "b"}\n' * 5000)
    assert texts(read_examples(path)) == [("a", "b")] * 5000
    assert len(read_lines(path.rename(tmp_path / "plain.name"))) == 5000
    (tmp_path / "plain.name").rename(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"d\.jsonl\.zst (cannot be read|is truncated): "):
        read_examples(path)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"d\.jsonl\.zst cannot be read: "):
        read_examples(path)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigError, match=r"compressed by zstd, which needs the package pyarrow: pip install 'datasets>="
    ):
        read_examples(path)


def test_pandas_values():
    frame = pandas.DataFrame({"source": ["a", "b"], "target": [1, 0]})
    assert texts(read_examples(frame)) == [("a", "1"), ("b", "0")]
    assert texts(read_examples(frame.astype({"target": "category"}))) == [("a", "1"), ("b", "0")]
    assert texts(read_examples(frame.iloc[1:])) == [("b", "0")]
    long = pandas.concat([frame] * 1500, ignore_index=True)
    assert [example.where for example in read_examples(long)][2047] == "data, row 2047"
    lists = pandas.DataFrame({"source": ["a"], "targets": [["b", "c"]]})
    assert read_examples(lists)[0].references == ("b", "c")
    for missing in (None, float("nan"), pandas.NA):
        with pytest.raises(DataError, match=r"data, row 1: 'target' is missing"):
            read_examples(pandas.DataFrame({"source": ["a", "b"], "target": ["c", missing]}))
    with pytest.raises(DataError, match=r"data, row 0: 'target' is a Timestamp, not a text"):
        read_examples(pandas.DataFrame({"source": ["a"], "target": pandas.to_datetime(["2024-01-01"])}))
    with pytest.raises(DataError, match="data is empty"):
        read_examples(frame.iloc[:0])
    with pytest.raises(DataError, match=r"data: two columns are called 'source'"):
        read_examples(pandas.DataFrame([["a", "b"]], columns=["source", "source"]))


class Lazy:
    def collect(self): ...


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"d.jsonl", "data is a bytes: give a path, a data frame"),
        (7, "data is an int: give a path"),
        (Lazy(), r"data is a Lazy: give .* Call its collect\(\) first"),
    ],
)
def test_objects_that_are_no_rows(data, message):
    with pytest.raises(ConfigError, match=message):
        read_examples(data)


def test_a_mapping_of_columns_is_refused():
    with pytest.raises(DataError, match=r"data is a mapping of 'source', 'target', not rows: .*pandas\.DataFrame"):
        read_examples({"source": ["a"], "target": ["b"]})


def test_rows_are_consumed_once_and_no_further_than_the_limit():
    taken = []

    def rows():
        for i in range(10):
            taken.append(i)
            yield {"source": f"a{i}", "target": "b"}

    stream = rows()
    assert [example.source for example in read_examples(stream, limit=3)] == ["a0", "a1", "a2"]
    assert taken == [0, 1, 2]
    assert next(stream)["source"] == "a3"
    stream = datasets.IterableDataset.from_generator(rows)
    taken.clear()
    assert len(read_examples(stream)) == 10
    assert taken.count(9) == 1


ROWS = [{"translation": {"en": f"a{i}", "de": f"b{i}"}, "label": i} for i in range(3)]


def test_datasets(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    expected = [Example(f"a{i}", f"b{i}", f"data, row {i}") for i in range(3)]
    assert read_examples(dataset, source_field="translation.en", target_field="translation.de") == expected
    assert read_examples(dataset, source_field="translation.en", target_field="translation.de", limit=2) == expected[:2]
    assert texts(read_examples(dataset, source_field="translation.en", target_field="label")) == [
        ("a0", "0"),
        ("a1", "1"),
        ("a2", "2"),
    ]
    with pytest.raises(DataError, match=r"data: no column 'en': the columns are 'translation', 'label'"):
        read_examples(dataset, source_field="en", target_field="de")
    with pytest.raises(DataError, match="data is empty"):
        read_examples(dataset.select([]), source_field="translation.en", target_field="translation.de")
    with pytest.raises(DataError, match=r"data, row 0 is a str, not an object"):
        read_examples(["text"], source_field="en", target_field="de")
    with pytest.raises(
        DataError, match=r"data is a mapping of 'train', not rows: of several splits, give one \(data\['train'\]\)"
    ):
        read_examples(datasets.DatasetDict(train=dataset), source_field="translation.en", target_field="translation.de")

    datasets.disable_progress_bars()
    dataset.save_to_disk(tmp_path / "saved")
    fields = {"source_field": "translation.en", "target_field": "translation.de"}
    assert texts(read_examples(data=tmp_path / "saved", **fields)) == texts(expected)
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    assert texts(read_examples(data=tmp_path / "splits" / "train", **fields)) == texts(expected)
    with pytest.raises(DataError, match=r"splits contains several splits \('train'\): name one, e\.g\. .*splits/train"):
        read_examples(data=tmp_path / "splits", **fields)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other is a folder, but not one that Dataset\.save_to_disk wrote"):
        read_examples(data=tmp_path / "other")


def test_the_former_name():
    assert from_dataset(ROWS, "translation.en", "label", 1) == [Example("a0", "0", "data, row 0")]


LABEL = datasets.ClassLabel(names=["negative", "positive"])


@pytest.mark.parametrize(
    ("feature", "value", "field"),
    [
        (LABEL, 1, "label"),
        ({"gold": LABEL}, {"gold": 1}, "label.gold"),
        (datasets.List(LABEL), [0, 1], "label.1"),
        (datasets.LargeList(LABEL), [1], "label.0"),
        (datasets.List({"gold": LABEL}), [{"gold": 0}, {"gold": 1}], "label.1.gold"),
        (datasets.Sequence({"gold": LABEL}), {"gold": [0, 1]}, "label.gold.1"),
        (datasets.Value("string"), "positive", "label"),
    ],
)
def test_classes_give_their_names(tmp_path, feature, value, field):
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    dataset = datasets.Dataset.from_dict({"text": ["a"], "label": [value]}, features=features)
    for rows in (dataset, dataset.to_iterable_dataset()):
        assert texts(read_examples(rows, source_field="text", target_field=field)) == [("a", "positive")]
    datasets.disable_progress_bars()
    dataset.save_to_disk(tmp_path / "saved")
    assert texts(read_examples(data=tmp_path / "saved", source_field="text", target_field=field)) == [("a", "positive")]


def test_a_column_with_dots_in_its_name_gives_the_names_of_its_classes():
    features = datasets.Features({"a.b": datasets.Value("string"), "label.fine": LABEL})
    dataset = datasets.Dataset.from_dict({"a.b": ["x"], "label.fine": [0]}, features=features)
    assert texts(read_examples(dataset, source_field="a.b", target_field="label.fine")) == [("x", "negative")]


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (
            LABEL,
            [0, -1],
            r"data, row 1: 'label' is class -1, which has no name \(only 0 to 1 do\): give a split",
        ),
        (LABEL, [0, None], r"data, row 1: 'label' is missing \(None\)"),
        (datasets.Value("float64"), [0.5, float("nan")], r"data, row 1: 'label' is missing \(nan\)"),
        (datasets.Value("float64"), [float("inf")], r"data, row 0: 'label' is inf, not a text"),
        (datasets.Value("bool"), [True], r"data, row 0: 'label' is a bool, not a text"),
        (datasets.Value("binary"), [b"b"], r"data, row 0: 'label' is a bytes, not a text"),
        (datasets.List(LABEL), [[1]], r"data, row 0: 'label' is a list, not a text"),
    ],
)
def test_values_that_are_no_text_are_refused(feature, values, message):
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    rows = {"text": ["a"] * len(values), "label": values}
    with pytest.raises(DataError, match=message):
        read_examples(datasets.Dataset.from_dict(rows, features), source_field="text", target_field="label")


def test_datasets_of_the_hub(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    fields = {"source_field": "translation.en", "target_field": "translation.de", "limit": 1}
    assert read_examples(data="hf:org/name:train[:10%]+test[5:]", **fields)[0].source == "a0"
    assert read_examples(data="hf:org/name:de-en:test", **fields) == [
        Example("a0", "b0", "hf:org/name:de-en:test, row 0")
    ]
    assert asked == [
        (("org/name", None), {"split": "train[:10%]+test[5:]"}),
        (("org/name", "de-en"), {"split": "test"}),
    ]

    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=re.escape("hf:org/name:test cannot be loaded: offline")):
        read_examples(data="hf:org/name:test")


def test_datasets_are_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'datasets>=")):
        read_examples(data="hf:org/name:test")
    with pytest.raises(ConfigError, match=re.escape("pip install 'datasets>=")):
        read_examples(data=tmp_path)
