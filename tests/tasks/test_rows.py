import csv
import gzip
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.tasks.readers import read, read_examples

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pairs_of(examples):
    return [(example.source, example.target) for example in examples]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1), st.booleans(), st.sampled_from([None, 0, 2]), st.booleans())
def test_json_lists_round_trip(tmp_path, pairs, ascii_only, indent, zipped):
    rows = [{"source": a, "id": i, "target": b} for i, (a, b) in enumerate(pairs)]
    raw = ("\ufeff \n" + json.dumps(rows, ensure_ascii=ascii_only, indent=indent) + "\n").encode()
    path = put(tmp_path / f"d.json{'.gz' if zipped else ''}", gzip.compress(raw) if zipped else raw)
    examples = read_examples(path)
    assert pairs_of(examples) == pairs
    assert [example.where for example in examples] == [f"{path}, row {i}" for i in range(len(pairs))]


@quick
@given(
    st.lists(st.tuples(texts, texts), min_size=1),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["", "\ufeff"]),
)
def test_csv_round_trips(tmp_path, pairs, separator, end, quoting, start):
    if quoting == csv.QUOTE_MINIMAL:  # Python 3.11 writes a carriage return without quotation marks
        pairs = [(a.replace("\r", "x"), b.replace("\r", "x")) for a, b in pairs]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(["target", "", "source"])
    writer.writerows([b, i, a] for i, (a, b) in enumerate(pairs))
    examples = read_examples(put(tmp_path / "d.csv", start + file.getvalue()))
    assert pairs_of(examples) == [(a.replace("\r\n", "\n"), b.replace("\r\n", "\n")) for a, b in pairs]


def test_rows_of_csv_are_named_by_the_line_that_they_begin_at(tmp_path):
    path = put(tmp_path / "d.csv", 'source,target\n"a\n\nb",c\n\nd,"e ""f"", g"\n')
    examples = read_examples(path)
    assert pairs_of(examples) == [("a\n\nb", "c"), ("d", 'e "f", g')]
    assert [example.where for example in examples] == [f"{path}:2", f"{path}:6"]


def test_csv_without_names_has_numbers(tmp_path):
    path = put(tmp_path / "d.csv", "7,a,b\n8,c,d\n")
    assert pairs_of(read_examples(path, source_field="3", target_field="2")) == [("b", "a"), ("d", "c")]
    path = put(tmp_path / "n.csv", "1,2\na,b\n")
    assert pairs_of(read_examples(path, source_field="1", target_field="2")) == [("a", "b")]


@pytest.mark.parametrize("separator", ",;\t")
def test_the_separator_of_csv_is_what_divides_the_rows_evenly(tmp_path, separator):
    """Commas in texts or in names of columns are no separators, whether the first line names the columns or not."""
    other = ";" if separator == "," else ","
    names = [f"mail{other} new", f"reply{other} a{other} b"]
    pairs = [(f"a{other} b{other} c", "x"), (f"d{other} e\nf", f"y{separator}")]
    for rows, source, target in ((pairs, "1", "2"), ([names, *pairs], *names)):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=separator).writerows(rows)
        path = put(tmp_path / "d.csv", file.getvalue())
        assert pairs_of(read_examples(path, source_field=source, target_field=target)) == pairs


def test_a_separator_that_the_rows_do_not_tell_is_refused_without_names(tmp_path):
    path = put(tmp_path / "d.csv", "a, b;c\nd, e;f\n")
    with pytest.raises(DataError, match="separated by commas or semicolons, and the first rows do not tell: enclose"):
        read_examples(path, source_field="1", target_field="2")
    path = put(tmp_path / "q.csv", '"a, b";c\nd;"e, f"\n')
    assert pairs_of(read_examples(path, source_field="1", target_field="2")) == [("a, b", "c"), ("d", "e, f")]


def test_the_line_that_tells_excel_the_separator_is_no_row(tmp_path):
    assert pairs_of(read_examples(put(tmp_path / "d.csv", "\ufeffsep=;\r\nsource;target\r\na, b;c\r\n"))) == [
        ("a, b", "c")
    ]


def test_columns_by_number_are_read_from_the_first_line_on(tmp_path):
    path = put(tmp_path / "d.csv", "Mail;Reply\na;b\n")
    assert str(read(path, source_field="1", target_field="2")) == (
        f"{path}: 2 examples (columns 1 and 2, from the first line on)"
    )
    assert str(read(path, source_field="Mail", target_field="Reply")) == f"{path}: 1 examples (Mail and Reply)"


def test_a_column_number_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="source_field=1 must be a text"):
        read_examples(put(tmp_path / "d.csv", "a,b\n"), source_field=1, target_field=2)


def test_line_breaks_in_cells_are_line_feeds(tmp_path):
    """As in TSV, and as a spreadsheet means them."""
    assert pairs_of(read_examples(put(tmp_path / "d.csv", 'source,target\r\n"a\r\nb",c\r\n'))) == [("a\nb", "c")]


def test_long_cells(tmp_path):
    long = "a" * 200_000
    assert pairs_of(read_examples(put(tmp_path / "d.csv", f"source,target\n{long},b\n"))) == [(long, "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mr,ref\na,b\n", r"d\.csv: the texts are not recognised: the columns are 'mr', 'ref', .*source_field"),
        ("source,target\na,b,c\n", r"d\.csv:2: 3 columns, expected 2 \(separated by commas\)"),
        ("source;target\na\n", r"d\.csv:2: 1 columns, expected 2 \(separated by semicolons\)"),
        ('source,target\na,b\n"c,d\ne,f\n', r"d\.csv:3: the row that begins here is not CSV \(unexpected end of data"),
        ("source,target\na,b\rc\n", r"d\.csv:2: .* is not CSV \(a carriage return outside quotation marks\): enclose"),
        ('source,target\na,"b" c\n', r"d\.csv:2: the row that begins here is not CSV .* double those inside"),
        ("source,target\n", r"d\.csv is empty: it contains no example"),
        ("source,target,source\na,b,c\n", r"d\.csv: two columns are called 'source': rename one"),
        ("", r"d\.csv is empty"),
        ("source,target\na,\n", r"d\.csv:2: 'target' is blank"),
        (b"source,target\nM\xfcller,b\n", r"d\.csv:2: invalid UTF-8 at byte 2 .*WINDOWS-1252"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_examples(put(tmp_path / "d.csv", content))


ROW = '{"source": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"d\.json is empty: it contains no example"),
        (f"[{ROW},\n{ROW}", r"d\.json:2: not JSON, column 31: expected ',' or '\]' after an item"),
        (f"[{ROW},\n]", r"d\.json:2: not JSON, column 1: Expecting value"),
        (f"[{ROW}]\n[{ROW}]", r"d\.json:2: not JSON, column 1: expected nothing after the list\. Write one list"),
        (f'[{ROW},\n\n{{"source": 1,,}}]', r"d\.json:3: not JSON, column 14"),
        (f"[{ROW}, 7]", r"d\.json, row 1 is an int, not an object"),
        (
            '{\n"source": "a",\n"target": "b"}',
            r"d\.json:1: not JSON, .*Write one object per line, or a list",
        ),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_examples(put(tmp_path / "d.json", content))


def test_a_limit_reads_no_further(tmp_path):
    assert len(read_examples(put(tmp_path / "d.json", f"[{ROW}, {ROW}, broken"), limit=2)) == 2
    assert len(read_examples(put(tmp_path / "d.csv", 'source,target\na,b\nc,d\n"'), limit=2)) == 2
