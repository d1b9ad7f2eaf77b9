"""Files are whole or absent."""

import errno
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import DataError, PemaError, StorageError
from pema.files import TEMPORARY, create, exclusive, read_json, remove, sha256, write_json, writing

JSON = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5))


@given(JSON)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "deep" / "file.json"
    write_json(path, value)
    assert read_json(path) == value


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("before", encoding="utf-8")

    def half():
        with writing(path) as partial:
            partial.write_text("half", encoding="utf-8")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        half()
    assert path.read_text(encoding="utf-8") == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for names in (("a", "b"), ("c",)):
        with writing(tmp_path / "folder") as partial:
            partial.mkdir()
            for name in names:
                (partial / name).write_text(name, encoding="utf-8")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["c"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = tmp_path / f"folder{TEMPORARY}"
    left.mkdir()
    (left / "old").write_text("old", encoding="utf-8")
    with writing(tmp_path / "folder") as partial:
        partial.mkdir()
    assert list((tmp_path / "folder").iterdir()) == []
    assert not left.exists()


def test_a_full_disk_is_a_storage_error_and_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("before", encoding="utf-8")

    def fill():
        with writing(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*file: No space left on device. Nothing was changed"):
        fill()
    assert path.read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"{", "cannot be read as JSON"), (b"\xff{}", "cannot be read"), (b"[]", "JSON list")],
)
def test_json_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_json(path)
    assert "file.json" in str(error.value)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_removing_nothing_is_fine(tmp_path):
    remove(tmp_path / "nothing")


def test_every_error_is_a_pema_error():
    import pema.errors as errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 5
    assert all(issubclass(e, PemaError) for e in found)


def test_a_new_file_is_for_its_owner_alone_and_no_other_takes_its_place(tmp_path):
    path = tmp_path / "deep" / "file"
    assert create(path, b"first")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not create(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_new_file_that_cannot_be_written_is_absent(tmp_path, monkeypatch, step):
    def fail(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"pema.files.os.{step}", fail)
    with pytest.raises(StorageError, match=r"cannot write .*file: No space left on device. Nothing was changed"):
        create(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from pema.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    folder = tmp_path / "memory"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=r"another process works in .*memory: wait"), exclusive(folder):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    # What the kill left behind is no lock.
    with exclusive(folder):
        (folder / "a").touch()
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_folder_that_nothing_came_into_is_not_left(tmp_path):
    with pytest.raises(DataError, match="no"), exclusive(tmp_path / "new"):
        raise DataError("no")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with exclusive(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()
