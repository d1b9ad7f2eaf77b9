import csv
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import DataError
from pema.tasks.readers import read_examples
from pema.tasks.tables import table_rows

on_one_folder = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
cells = st.text('ab "\t\n,\\ä', max_size=8) | st.sampled_from(['"', '""', '"a"', '"a""b"', "1", "-2.5e3", "'"])


def put(tmp_path, text):
    path = tmp_path / "d.tsv"
    path.write_bytes(text.encode())
    return path


def read(path):
    return [row for _, row in table_rows(path)]


def written(rows, quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    file = io.StringIO()
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(rows)
    return file.getvalue()


@on_one_folder
@given(
    rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_csv_writer_wrote_means_what_was_written(tmp_path, rows, quoting, end):
    header = ("source", "target", "id")
    assert read(put(tmp_path, written([header, *rows], quoting, end))) == [list(header), *map(list, rows)]


def test_a_line_of_a_quoted_cell_may_look_like_an_escaped_one(tmp_path):
    rows = [["source", "target", "id"], ["x", "\n", '\\"\n']]
    assert '"\t"\\""' in written(rows, end="\n").splitlines()
    assert read(put(tmp_path, written(rows))) == rows


@on_one_folder
@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5), bare=st.sampled_from(['a "b"', '"Yes," he', 'b"'])
)
def test_lines_with_bare_quotation_marks_are_read_verbatim_or_refused(tmp_path, rows, bare):
    rows = [[cell.replace("\t", " ").replace("\n", " ") for cell in row] for row in [*rows, (bare, bare)]]
    needy = [cell for row in rows for cell in row if cell[:1] == cell[-1:] == '"' and '"' in cell[1:-1]]
    try:
        found = read(put(tmp_path, "".join("\t".join(row) + "\n" for row in rows)))
    except DataError:
        found = None
    assert found == rows or (found is None and needy)


@pytest.mark.parametrize(
    "lines",
    [
        ['"Hello."\tHallo.', 'Bye.\t"Tschüss."'],
        ['"Hello," he said.\t"Hallo", sagte er.'],
        ['He said "hello" to me.\tEr sagte "hallo" zu mir.'],
        ['"He came in.\tEr kam herein.', 'He left."\tEr ging.'],
        ['5" pipe\t5-Zoll-Rohr', '"\t"'],
        ['"quoted"\tnot', "1\t2"],
        ["'a'\t''b''", "“a”\t„b“"],
        ['a ""b"" c\td', 'x\t"y'],
        ["1\t2", "-3.5\t"],
    ],
)
def test_plain_tables_are_read_verbatim(tmp_path, lines):
    assert read(put(tmp_path, "\n".join(lines) + "\n")) == [line.split("\t") for line in lines]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said.\t"Er ""ja""."\n"a"\tb\n', [["He said.", 'Er "ja".'], ["a", "b"]]),
        ('"Hello."\t"Hallo."\n"1"\t2\n', [["Hello.", "Hallo."], ["1", "2"]]),
        ('a\tb\n"one\ntwo\n\nthree"\tx\n', [["a", "b"], ["one\ntwo\n\nthree", "x"]]),
        ('a\t"b\tc"\n', [["a", "b\tc"]]),
        ('""\t"a"\n', [["", "a"]]),
        ('"a\rb"\tc\n', [["a\rb", "c"]]),
    ],
)
def test_quoted_tables_mean_their_cells(tmp_path, text, expected):
    assert read(put(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a\t"b ""c"""\nd "e"\tf\n', r"d\.tsv:1: a cell is quoted as by a csv writer, but line 2 is not: it has a"),
        ('d "e"\tf\na\tb\nc\t"""d"""\n', r"d\.tsv:3: a cell is quoted as by a csv writer, but line 1 is not"),
        (
            'a\t"b ""c"""\nd\te\tf\n',
            r"d\.tsv:1: a cell is quoted .* but line 2 is not: it has a different number of columns",
        ),
        (
            'a\t"b ""c"""\nd\t"e\n',
            r"d\.tsv:1: a cell is quoted .* line 2 is not: .* or literal quotation marks\.",
        ),
        ('a\t"b \\"c\\""\n', r"d\.tsv:1: a cell escapes its quotation marks by a backslash: double them\. Write all"),
    ],
)
def test_tables_that_are_quoted_in_part_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(put(tmp_path, text))


def test_rows_are_named_by_the_line_that_they_begin_at(tmp_path):
    path = put(tmp_path, written([("source", "target"), ("a\nb\nc", 'x "y"'), ("d", "e")]))
    found = read_examples(data=path)
    assert [(each.source, each.target) for each in found] == [("a\nb\nc", 'x "y"'), ("d", "e")]
    assert [each.where for each in found] == [f"{path}:2", f"{path}:5"]
    path = put(tmp_path, written([("source", "target"), ("a\nb", 'x "y"'), ("d", " ")]))
    with pytest.raises(DataError, match=r"d\.tsv:4: 'target' is blank"):
        read_examples(data=path)


def test_a_quotation_mark_that_nobody_closes_takes_no_more_than_a_cell_may(tmp_path):
    rows = ['"a\tb', *(f"{i}\tx" for i in range(3_000)), '"c"\td']
    assert read(put(tmp_path, "\n".join(rows))) == [row.split("\t") for row in rows]


def test_blank_lines_are_named_by_the_reader(tmp_path):
    with pytest.raises(DataError, match=r"d\.tsv:2: 1 columns, expected 2"):
        read_examples(data=put(tmp_path, 'a\t"b ""c"""\n\nd\te\n'))
