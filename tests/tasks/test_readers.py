import bz2
import gzip
import json
import lzma
import re
import sys

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example
from pema.tasks.readers import from_dataset, read_examples, read_lines

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
anything = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(SEPARATORS),
    min_size=1,
    max_size=20,
)
values = anything.filter(str.strip)
lines = anything.map(lambda text: text.replace("\n", " ").replace("\r", " ")).filter(str.strip)
cells = lines.map(lambda text: text.replace("\t", " ").replace('"', "'")).filter(str.strip)
on_one_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ends = st.sampled_from(["\n", "\r\n"])
starts = st.sampled_from(["", "\ufeff"])


def texts(examples):
    return [(example.source, example.target) for example in examples]


def put(path, content):
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def guarded(pairs):
    """A file's first character is no byte-order mark but one that was asked for."""
    return [(a.removeprefix("\ufeff") or "x", b.removeprefix("\ufeff") or "x") for a, b in pairs]


@on_one_folder
@given(
    pairs=st.lists(st.tuples(lines, lines), min_size=1),
    end=ends,
    start=starts,
    zipped=st.booleans(),
    last=st.booleans(),
)
def test_parallel_files_round_trip(tmp_path, pairs, end, start, zipped, last):
    pairs = [(a.strip() or "x", b.strip() or "x") for a, b in guarded(pairs)]
    suffix = ".gz" if zipped else ""
    sides = zip(*pairs, strict=True)
    source, target = (
        put(tmp_path / f"{name}{suffix}", start + end.join(side) + (end if last else ""))
        for name, side in zip(("train.en", "train.de"), sides, strict=True)
    )
    found = read_examples(source=source, target=str(target))
    assert texts(found) == pairs
    assert [example.where for example in found] == [f"{source}:{i + 1}" for i in range(len(pairs))]
    assert read_lines(source) == [a for a, _ in pairs]


@on_one_folder
@given(pairs=st.lists(st.tuples(values, values), min_size=1), end=ends, start=starts, ascii_only=st.booleans())
def test_jsonl_round_trips(tmp_path, pairs, end, start, ascii_only):
    rows = [json.dumps({"en": a, "du": b, "id": i}, ensure_ascii=ascii_only) for i, (a, b) in enumerate(pairs)]
    path = put(tmp_path / "data.jsonl.gz", start + end.join(rows) + end)
    assert texts(read_examples(data=path, source_field="en", target_field="du")) == pairs


@on_one_folder
@given(pairs=st.lists(st.tuples(cells, cells), min_size=1), end=ends, start=starts)
def test_tsv_round_trips(tmp_path, pairs, end, start):
    pairs = guarded(pairs)
    path = put(tmp_path / "data.tsv", start + "".join(f"{a}\t{b}{end}" for a, b in pairs))
    assert texts(read_examples(data=path)) == pairs
    path = put(tmp_path / "named.tsv", start + f"id\tde\ten{end}" + "".join(f"7\t{b}\t{a}{end}" for a, b in pairs))
    assert texts(read_examples(data=path, source_field="en", target_field="de")) == pairs
    assert texts(read_examples(data=path, source_field="3", target_field="2"))[1:] == pairs


def test_a_line_separator_inside_a_line_splits_nothing(tmp_path):
    path = put(tmp_path / "a.txt", f"one{SEPARATORS}still one\ntwo\rstill two\n")
    assert read_lines(path) == [f"one{SEPARATORS}still one", "two\rstill two"]


def test_blank_lines_are_lines(tmp_path):
    assert read_lines(put(tmp_path / "a.txt", "a\n\nb\n\n")) == ["a", "", "b", ""]
    assert read_lines(put(tmp_path / "b.txt", "\ufeff\n")) == [""]


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    row = '{"source": "a", "target": "b"}'
    found = read_examples(data=put(tmp_path / "d.jsonl", f"{row}\n\n{row}\n"))
    assert [example.where for example in found] == [f"{tmp_path}/d.jsonl:1", f"{tmp_path}/d.jsonl:3"]


def test_limit_reads_no_further(tmp_path):
    row = '{"source": "a", "target": "b"}\n'
    assert len(read_examples(data=put(tmp_path / "d.jsonl", row * 3 + "broken"), limit=3)) == 3
    source, target = put(tmp_path / "s", "a\nb\nc\n"), put(tmp_path / "t", "x\ny\nz\n")
    assert texts(read_examples(source=source, target=target, limit=2)) == [("a", "x"), ("b", "y")]
    assert len(read_examples(source=source, target=target, limit=9)) == 3


def test_limit_does_not_hide_a_misalignment(tmp_path):
    source, target = put(tmp_path / "s", "a\nb\nc\n"), put(tmp_path / "t", "x\ny\n")
    with pytest.raises(DataError, match="3 and 2 lines"):
        read_examples(source=source, target=target, limit=1)


@pytest.mark.parametrize(
    ("row", "source_field", "target_field"),
    [
        ({"translation": {"en": "a", "de": "b"}}, "translation.en", "translation.de"),
        ({"translation.en": "a", "translation": {"de": "b"}}, "translation.en", "translation.de"),
        ({"question": "a", "answers": {"text": ["b", "c"]}}, "question", "answers.text.0"),
    ],
)
def test_nested_fields(tmp_path, row, source_field, target_field):
    path = put(tmp_path / "d.jsonl", json.dumps(row))
    found = read_examples(data=path, source_field=source_field, target_field=target_field)
    assert texts(found) == [("a", "b")]


def test_labels_that_are_numbers_become_text(tmp_path):
    path = put(tmp_path / "d.json", '{"source": "a", "target": 1}\n{"source": "b", "target": 0.5}')
    assert texts(read_examples(data=path)) == [("a", "1"), ("b", "0.5")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"source": "a", "target": "b"}\n{"source": "a"', r"d\.jsonl:2: not JSON, column 15"),
        ('["a", "b"]', r"d\.jsonl:1: a JSON list, not an object\. Write one object per line"),
        ('{"source": "a", "du": "b"}', r"d\.jsonl:1: no field 'target'; there: 'source', 'du'\. Name the fields"),
        ('{"source": "a", "target": null}', r"d\.jsonl:1: field 'target' is missing \(None\)\. Remove the"),
        ('{"source": "a", "target": NaN}', r"d\.jsonl:1: field 'target' is missing \(nan\)\. Remove the pair"),
        ('{"source": "a", "target": Infinity}', r"d\.jsonl:1: field 'target' is inf, not a text"),
        ('{"source": "a", "target": -1e999}', r"d\.jsonl:1: field 'target' is -inf, not a text"),
        ('{"source": NaN, "target": "b"}', r"d\.jsonl:1: field 'source' is missing \(nan\)"),
        ('{"source": "a", "target": ["b"]}', r"d\.jsonl:1: field 'target' is a list, not a text"),
        ('{"source": "a", "target": {"de": 1}}', r"d\.jsonl:1: field 'target' is a dict \('de'\), not a text"),
        ('{"source": "a", "target": true}', r"d\.jsonl:1: field 'target' is a bool, not a text"),
        ('{"source": " ", "target": "b"}', r"d\.jsonl:1: source is blank"),
        ('{"source": "a", "target": ""}', r"d\.jsonl:1: target is blank"),
        (
            '{"source": "a", "target": "x\\ud800"}',
            r"d\.jsonl:1: target contains half of a surrogate pair at character 2",
        ),
        ("[" * 200_000, r"d\.jsonl:1: JSON nested too deeply"),
        ("\n\n", r"d\.jsonl is empty: it contains no example"),
        ("", r"d\.jsonl is empty"),
        (b"\xef\xbb\xbf", r"d\.jsonl is empty"),
        (
            b'{"source": "a", "target": "b"}\n{"source": "\xff"}',
            r"d\.jsonl:2: invalid UTF-8 at byte 13 of the line \(0xff\)",
        ),
    ],
)
def test_jsonl_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_examples(data=put(tmp_path / "d.jsonl", content))


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("a\tb\nc\n", {}, r"d\.tsv:2: 1 columns, expected 2"),
        ("a\tb\tc\n", {}, r"d\.tsv:1: 3 columns, expected 2 .* Give column numbers"),
        ("en\tde\tid\na\tb\n", {"source_field": "en", "target_field": "de"}, r"d\.tsv:2: 2 columns, expected 3"),
        ("en\tde\n", {"source_field": "en", "target_field": "de"}, r"d\.tsv is empty: it contains no example"),
        (
            "en\tde\na\tb\n",
            {"source_field": "en", "target_field": "du"},
            r"d\.tsv:1: no columns 'en' and 'du'; .* 'en', 'de'",
        ),
        ("a\tb\n", {"source_field": "1", "target_field": "3"}, r"d\.tsv:1: no column 3; the line has 2"),
        ("a\tb\n", {"source_field": "0", "target_field": "1"}, r"d\.tsv:1: no columns '0' and '1'"),
        ("a\tb\n\nc\td\n", {}, r"d\.tsv:2: 1 columns, expected 2"),
        ("a\tb\n \td\n", {}, r"d\.tsv:2: source is blank"),
        ("a\tb\nc\t\n", {}, r"d\.tsv:2: target is blank"),
        ("", {}, r"d\.tsv is empty"),
    ],
)
def test_tsv_that_cannot_be_read(tmp_path, content, fields, message):
    with pytest.raises(DataError, match=message):
        read_examples(data=put(tmp_path / "d.tsv", content), **fields)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "x\n", r"s and .*t are not aligned: 2 and 1 lines; .*s:2 has no partner"),
        ("a\n", "x\ny\nz\n", r"s and .*t are not aligned: 1 and 3 lines; .*t:2 has no partner"),
        ("a\n\n", "x\ny\n", r"s:2: source is blank"),
        ("a\nb\n", "x\n  \n", r"t:2: target is blank"),
        ("a\n", "", r"t is empty"),
        ("", "x\n", r"s is empty"),
        ("a\nb\n", b"x\n\xe4 b\n", r"t:2: invalid UTF-8 at byte 1 of the line \(0xe4\)"),
        ("ä".encode("utf-16"), "x\n", r"s is in UTF-16, not in UTF-8: convert it, e\.g\. with iconv -f UTF-16 -t"),
        ("ä".encode("utf-32"), "x\n", r"s is in UTF-32, not in UTF-8: convert it"),
        ("a dog\n".encode("utf-16le"), "x\n", r"s looks like UTF-16 without a byte-order mark .*iconv -f UTF-16LE"),
    ],
)
def test_parallel_files_that_cannot_be_read(tmp_path, source, target, message):
    with pytest.raises(DataError, match=message):
        read_examples(source=put(tmp_path / "s", source), target=put(tmp_path / "t", target))


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tsv does not exist: check the path"):
        read_examples(data=tmp_path / "gone.tsv")
    with pytest.raises(DataError, match=r"gone\.csv does not exist"):
        read_examples(data=tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"gone does not exist"):
        read_lines(tmp_path / "gone")
    with pytest.raises(DataError, match=r"is a folder, not a text file"):
        read_lines(tmp_path)
    with pytest.raises(DataError, match=r"d\.csv: cannot tell the format from the name\. Name it \.jsonl or \.tsv"):
        read_examples(data=put(tmp_path / "d.csv", "a,b"))


def test_gzip_files_that_cannot_be_read(tmp_path):
    whole = gzip.compress(b"line\n" * 1000)
    for name, raw, message in (
        ("plain.gz", b"line\n", r"plain\.gz is a damaged compressed file"),
        ("cut.gz", whole[:-9], r"cut\.gz is truncated"),
        ("bad.gz", whole[:12] + b"\xff\xff\xff\xff" + whole[16:], r"bad\.gz is a damaged compressed file"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message):
            read_lines(tmp_path / name)


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_read_whatever_their_name(tmp_path, ending, compress):
    raw = compress("\ufeffa\tb\nä\tö\n".encode())
    for name in (f"d.tsv{ending}", f"D.TSV{ending.upper()}", "d.tsv"):
        (tmp_path / name).write_bytes(raw)
        assert texts(read_examples(data=tmp_path / name)) == [("a", "b"), ("ä", "ö")]
    (tmp_path / f"cut.tsv{ending}").write_bytes(compress(b"a\tb\n" * 1000)[:-9])
    with pytest.raises(DataError, match=rf"cut\.tsv{ending} is truncated: its compressed stream has no end"):
        read_examples(data=tmp_path / f"cut.tsv{ending}")
    (tmp_path / f"plain.tsv{ending}").write_bytes(b"a\tb\n")
    with pytest.raises(DataError, match=rf"plain\.tsv{ending} (is a damaged compressed file|cannot be read)"):
        read_examples(data=tmp_path / f"plain.tsv{ending}")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"PK\x03\x04...", r"is a zip archive \(as \.xlsx is\), not a text file: unpack it, or save a sheet as TSV"),
        (b"\x28\xb5\x2f\xfd...", r"is compressed by zstd, not a text file: decompress it \(zstd -d FILE\), or"),
        (b"7z\xbc\xaf\x27\x1c...", "is a 7-Zip archive, not a text file: unpack it"),
        (b"\x04\x22\x4d\x18...", "is compressed by LZ4, not a text file: decompress it"),
        (b"PAR1...", "is a Parquet file, not a text file: load it with datasets"),
        (b"ARROW1...", "is an Arrow file, not a text file: give the folder"),
        (b"SQLite format 3\0...", "is an SQLite database, not a text file: export"),
        (b"%PDF-1.7\n...", "is a PDF, not a text file"),
    ],
)
def test_files_that_are_no_text_say_what_they_are(tmp_path, raw, message):
    for name in ("d.tsv", "d.jsonl", "d.tsv.zst", "d.zip", "d.parquet"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message):
            read_examples(data=tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_lines(tmp_path / "d.zip")


def test_a_disk_error_is_named(tmp_path, monkeypatch):
    path = put(tmp_path / "a.txt", "a\n")

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        read_lines(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no data: give source and target"),
        ({"source": "s"}, "no data: give source and target"),
        ({"data": "d.tsv", "source": "s"}, "give either data .* or source and target, not both"),
        ({"data": "d.tsv", "limit": 0}, "limit 0 leaves no example"),
        ({"data": "hf:name"}, "is not hf:NAME:SPLIT"),
        ({"data": "hf:name:a:b:c"}, "is not hf:NAME:SPLIT"),
        ({"data": "hf::train"}, "is not hf:NAME:SPLIT"),
    ],
)
def test_arguments_that_name_no_data(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_examples(**arguments)


ROWS = [{"translation": {"en": f"a{i}", "de": f"b{i}"}, "label": i} for i in range(3)]


def test_datasets(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    expected = [Example(f"a{i}", f"b{i}", f"dataset, row {i}") for i in range(3)]
    assert from_dataset(dataset, "translation.en", "translation.de") == expected
    assert from_dataset(dataset, "translation.en", "translation.de", limit=2) == expected[:2]
    assert texts(from_dataset(dataset, "translation.en", "label")) == [("a0", "0"), ("a1", "1"), ("a2", "2")]
    with pytest.raises(DataError, match=r"dataset, row 0: no field 'en'; there: 'translation', 'label'"):
        from_dataset(dataset, "en", "de")
    with pytest.raises(DataError, match="dataset is empty"):
        from_dataset(dataset.select([]), "translation.en", "translation.de")
    with pytest.raises(DataError, match=r"dataset, row 0: no field 'en'; it is a str"):
        from_dataset(["text"], "en", "de")
    with pytest.raises(DataError, match=r"contains several splits \('train'\): name one, e\.g\. dataset\['train'\]"):
        from_dataset(datasets.DatasetDict(train=dataset), "translation.en", "translation.de")

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
        assert texts(from_dataset(rows, "text", field)) == [("a", "positive")]
    datasets.disable_progress_bars()
    dataset.save_to_disk(tmp_path / "saved")
    assert texts(read_examples(data=tmp_path / "saved", source_field="text", target_field=field)) == [("a", "positive")]


def test_a_column_with_dots_in_its_name_gives_the_names_of_its_classes():
    features = datasets.Features({"a.b": datasets.Value("string"), "label.fine": LABEL})
    dataset = datasets.Dataset.from_dict({"a.b": ["x"], "label.fine": [0]}, features=features)
    assert texts(from_dataset(dataset, "a.b", "label.fine")) == [("x", "negative")]


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (
            LABEL,
            [0, -1],
            r"dataset, row 1: field 'label' is class -1, which has no name \(only 0 to 1 do\): give a split",
        ),
        (LABEL, [0, None], r"dataset, row 1: field 'label' is missing \(None\)"),
        (datasets.Value("float64"), [0.5, float("nan")], r"dataset, row 1: field 'label' is missing \(nan\)"),
        (datasets.Value("float64"), [float("inf")], r"dataset, row 0: field 'label' is inf, not a text"),
        (datasets.Value("bool"), [True], r"dataset, row 0: field 'label' is a bool, not a text"),
        (datasets.Value("binary"), [b"b"], r"dataset, row 0: field 'label' is a bytes, not a text"),
        (datasets.List(LABEL), [[1]], r"dataset, row 0: field 'label' is a list, not a text"),
    ],
)
def test_values_that_are_no_text_are_refused(feature, values, message):
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    rows = {"text": ["a"] * len(values), "label": values}
    with pytest.raises(DataError, match=message):
        from_dataset(datasets.Dataset.from_dict(rows, features), "text", "label")


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
    with pytest.raises(ConfigError, match=re.escape("pip install 'pema[datasets]'")):
        read_examples(data="hf:org/name:test")
    with pytest.raises(ConfigError, match=re.escape("pip install 'pema[datasets]'")):
        read_examples(data=tmp_path)
