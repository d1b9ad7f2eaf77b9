"""Files of results: one line per run, written atomically, read strictly."""

import pytest

from pema.errors import DataError
from reproduction.lines import files, put_run, read_lines, read_runs, write_lines


def test_a_run_keeps_its_place_and_a_new_one_comes_last(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    put_run(file, "a", {"score": 1.5, "text": "für\u2028x"})
    put_run(file, "b", {"score": 2})
    put_run(file, "a", {"score": 3})
    assert read_lines(file) == [{"run": "a", "score": 3}, {"run": "b", "score": 2}]
    assert list(read_runs(file)) == ["a", "b"]


def test_text_with_odd_line_ends_is_one_line(tmp_path):
    file = tmp_path / "results.jsonl"
    line = {"run": "a", "texts": ["für\u2028x", "y\r\nz\x0b\x85"]}
    write_lines(file, [line])
    assert read_lines(file) == [line]
    assert file.read_bytes().count(b"\n") == 1


def test_a_file_that_is_not_there_holds_no_runs_and_cannot_be_read(tmp_path):
    assert read_runs(tmp_path / "none.jsonl") == {}
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file .* Run the experiment"):
        read_lines(tmp_path / "none.jsonl")


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"run": "a"}\n{"run": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl, line 2 cannot be read as JSON"):
        read_lines(tmp_path / "a.jsonl")


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"run": "a"}, {"run": "a"}])
    with pytest.raises(DataError, match=r"contains the run 'a' twice. Remove one"):
        read_runs(tmp_path / "a.jsonl")


def test_files_are_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a-14m", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [])
    assert [file.stem for file in files(tmp_path)] == ["a", "a-14m", "b"]
