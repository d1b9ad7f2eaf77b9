import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.tasks.readers import read_examples, read_lines

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
        ('["a", "b"]', r"d\.jsonl, row 0 is a str, not an object with texts by their names"),
        ("7", r"d\.jsonl:1 is an int, not an object"),
        (
            '{"source": "a", "du": "b"}',
            r"d\.jsonl:1: the texts are not recognised: the columns are 'source', 'du', known are source and",
        ),
        ('{"source": "a", "target": null}', r"d\.jsonl:1: 'target' is missing \(None\)\. Remove the row or fill"),
        ('{"source": "a", "target": NaN}', r"d\.jsonl:1: 'target' is missing \(nan\)\. Remove the row"),
        ('{"source": "a", "target": Infinity}', r"d\.jsonl:1: 'target' is inf, not a text"),
        ('{"source": "a", "target": -1e999}', r"d\.jsonl:1: 'target' is -inf, not a text"),
        ('{"source": NaN, "target": "b"}', r"d\.jsonl:1: 'source' is missing \(nan\)"),
        ('{"source": "a", "target": ["b"]}', r"d\.jsonl:1: 'target' is a list, not a text"),
        ('{"source": "a", "target": {"de": 1}}', r"d\.jsonl:1: 'target' is a dict \('de'\), not a text"),
        ('{"source": "a", "target": true}', r"d\.jsonl:1: 'target' is a bool, not a text"),
        ('{"source": " ", "target": "b"}', r"d\.jsonl:1: 'source' is blank"),
        ('{"source": "a", "target": ""}', r"d\.jsonl:1: 'target' is blank"),
        (
            '{"source": "a", "target": "x\\ud800"}',
            r"d\.jsonl:1: 'target' contains half of a surrogate pair at character 2",
        ),
        ("[" * 200_000, r"d\.jsonl, row 0: JSON nested too deeply"),
        ('{"a":' * 200_000, r"d\.jsonl:1: JSON nested too deeply"),
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
        ("a\tb\tc\n", {}, r"d\.tsv:1: 3 columns, and no names that are known: expected two .* give their numbers"),
        ("en\tde\tid\na\tb\n", {"source_field": "en", "target_field": "de"}, r"d\.tsv:2: 2 columns, expected 3"),
        ("en\tde\n", {"source_field": "en", "target_field": "de"}, r"d\.tsv is empty: it contains no example"),
        (
            "en\tde\na\tb\n",
            {"source_field": "en", "target_field": "du"},
            r"d\.tsv: no column 'du': the columns are 'en', 'de'\. Name the columns",
        ),
        (
            "a\tb\n",
            {"source_field": "1", "target_field": "3"},
            r"d\.tsv:1: no field '3'; the row contains '1', '2'",
        ),
        ("a\tb\n", {"source_field": "0", "target_field": "1"}, r"d\.tsv: no column '0': the columns are 'a', 'b'"),
        ("a\tb\n\nc\td\n", {}, r"d\.tsv:2: 1 columns, expected 2"),
        ("a\tb\n \td\n", {}, r"d\.tsv:2: 'source' is blank"),
        ("a\tb\nc\t\n", {}, r"d\.tsv:2: 'target' is blank"),
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
        ("a\n\n", "x\ny\n", r"s:2: 'source' is blank"),
        ("a\nb\n", "x\n  \n", r"t:2: 'target' is blank"),
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
    with pytest.raises(
        DataError, match=r"d\.txt: cannot tell the format from the name: name it \.jsonl, .*two such files"
    ):
        read_examples(data=put(tmp_path / "d.txt", "a,b"))
    with pytest.raises(DataError, match=r"d\.parquet is not a Parquet file, whatever its name"):
        read_examples(data=put(tmp_path / "d.parquet", "a,b"))


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
        (b"PK\x03\x04...", r"is a zip archive \(as \.xlsx is\), not a text file: unpack it, or save the sheet as CSV"),
        (b"7z\xbc\xaf\x27\x1c...", "is a 7-Zip archive, not a text file: unpack it"),
        (b"\x04\x22\x4d\x18...", "is compressed by LZ4, not a text file: decompress it"),
        (b"ARROW1...", "is an Arrow file, not a text file: give the folder"),
        (b"SQLite format 3\0...", "is an SQLite database, not a text file: export"),
        (b"\xd0\xcf\x11\xe0...", r"is an old Office file \(as \.xls is\), not a text file: save the sheet as CSV"),
        (b"\x80\x04\x95...", "is a pickle, which can run any code when it is read, not a text file: write JSONL"),
        (b"\x93NUMPY...", "is an array of numpy, not a text file: write JSONL"),
        (b"\x89HDF...", "is an HDF5 file, not a text file"),
        (b"\x89PNG...", "is an image, not a text file"),
        (b"d.jsonl".ljust(257, b"\0") + b"ustar\0...", "is a tar archive, not a text file: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file itself, not a text"),
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
        ({"data": "d.tsv", "source": "s"}, "give either data .* or source and target .*, not both"),
        ({"data": "d.tsv", "limit": 0}, "limit 0 leaves no example"),
        ({"data": "hf:name"}, "is not hf:NAME:SPLIT"),
        ({"data": "hf:name:a:b:c"}, "is not hf:NAME:SPLIT"),
        ({"data": "hf::train"}, "is not hf:NAME:SPLIT"),
    ],
)
def test_arguments_that_name_no_data(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_examples(**arguments)
