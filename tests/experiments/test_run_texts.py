import pytest

from pema.errors import DataError
from pema.experiments.texts import read_texts, texts_file, write_texts


def test_texts_of_several_lines_are_objects_and_others_lines(tmp_path):
    cases = ((["one", "", r"C:\new"], "txt"), (["one", "two\n\nlines"], "jsonl"), (["one\u2028x"], "jsonl"))
    for texts, suffix in cases:
        write_texts(tmp_path, "pema-lr=0.001-seed0", texts)
        (file,) = tmp_path.iterdir()
        assert file == texts_file(tmp_path, "pema-lr=0.001-seed0") == tmp_path / f"pema-lr=0.001-seed0.{suffix}"
        assert read_texts(tmp_path, "pema-lr=0.001-seed0") == texts


def test_missing_texts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"alone-seed0\.txt does not exist"):
        read_texts(tmp_path, "alone-seed0")
