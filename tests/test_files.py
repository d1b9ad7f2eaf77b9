"""Atomic writes."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faults import failing, leftovers, no_space

from pema import files
from pema.errors import DataError, PemaError, StorageError
from pema.files import (
    TEMPORARY,
    clear,
    clear_below,
    create,
    digest,
    discard,
    parse_json,
    read_bytes,
    read_json,
    recover,
    remove,
    seal,
    sha256,
    unseal,
    write_json,
    writing,
)
from pema.locks import exclusive

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


def state(path):
    """What stands at a path: a text, or a folder's texts by name."""
    if path.is_dir():
        return {p.name: p.read_text(encoding="utf-8") for p in path.iterdir()}
    return path.read_text(encoding="utf-8") if path.exists() else None


def write_file(path, text):
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_folder(path, text):
    with writing(path) as temporary:
        temporary.mkdir()
        for name in ("a", text):
            (temporary / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_an_error_at_any_step_leaves_the_old_or_the_new_content_and_names_it(tmp_path, write, behind):
    path, at, ran = tmp_path / "it", 0, False
    write(tmp_path / "new", "new")
    new = state(tmp_path / "new")
    remove(tmp_path / "new")
    while not ran:
        write(path, "before")
        before = state(path)
        with failing(at, no_space, behind) as taken:
            said = ""
            try:
                write(path, "new")
            except StorageError as error:
                said = str(error)
        ran = len(taken) <= at
        if "Nothing was changed" in said:
            assert state(path) == before
        elif "the disk did not confirm it" in said:
            assert state(path) == new
        else:  # what fails while rests are cleared is no error: the next writer does it
            assert not said or "move it back" in said
        recover(path)
        assert state(path) in (before, new)
        write(path, "again")
        assert not leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["it"]
        at += 1
    assert at > (5 if write is write_file else 8)


def test_a_folder_that_cannot_be_put_back_is_named(tmp_path, monkeypatch):
    path = tmp_path / "it"
    write_folder(path, "before")
    rename = Path.rename

    def once(self, target):
        if self.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", once)
        patched.setattr(Path, "replace", lambda *_: no_space("replace"))
        with pytest.raises(
            StorageError, match=r"cannot replace .*it: Input/output error. The previous content is in .*old"
        ):
            write_folder(path, "new")
        with pytest.raises(StorageError, match=r"is in .*it.old: move it back"):
            recover(path)
    assert not path.exists()
    recover(path)
    assert state(path) == {"a": "before", "before": "before"}
    assert not leftovers(tmp_path)


KILLED = """
import sys
from pathlib import Path
from tests.faults import killed
from tests.test_files import create, leftovers, recover, state, write_file, write_folder

folder = Path(sys.argv[1])
for write, after in ((write_file, "new"), (write_folder, {"a": "new", "new": "new"})):
    for behind in (False, True):
        path, at = folder / "it", 0
        write(path, "before")
        before = state(path)
        while killed(at, lambda: write(path, "new"), behind):
            recover(path)
            assert state(path) in (before, after), (at, state(path))
            write(path, "before")
            assert not leftovers(folder), (at, leftovers(folder))
            at += 1
        print(at)
        (path.unlink() if path.is_file() else __import__("shutil").rmtree(path))
for behind in (False, True):
    at = 0
    while killed(at, lambda: create(path, b"new"), behind):
        assert state(path) in (None, "new")
        create(path, b"again")
        assert state(path) in ("again", "new")
        assert not [p for p in leftovers(folder) if state(path) == "again"]
        path.unlink()
        at += 1
    print(at)
    path.unlink()
"""


def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": f"{Path(files.__file__).parents[1]}{os.pathsep}{Path(__file__).parents[1]}"},
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) > 4 for line in done.stdout.split()] == [True] * 6


def test_a_live_writer_is_left_alone(tmp_path):
    path = tmp_path / "it"
    with writing(path) as mine:
        mine.write_text("mine", encoding="utf-8")
        with pytest.raises(StorageError, match=r"another process writes .*it: wait until it has ended"):
            write_file(path, "other")
    assert state(path) == "mine"


def test_a_reader_waits_for_the_writer_that_has_moved_the_old_folder_aside(tmp_path, monkeypatch):
    path = tmp_path / "it"
    write_folder(path, "before")
    seen, replace = [], Path.replace

    def slow(self, target):
        reader = threading.Thread(target=lambda: (recover(path), seen.append(state(path))))
        reader.start()
        reader.join(0.2)
        assert not seen
        result = replace(self, target)
        readers.append(reader)
        return result

    readers = []
    monkeypatch.setattr(Path, "replace", slow)
    write_folder(path, "new")
    readers[0].join()
    assert seen == [{"a": "new", "new": "new"}]
    assert not leftovers(tmp_path)


def test_what_is_private_is_for_its_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        for private, modes in ((True, {0o600, 0o700}), (False, {0o644, 0o755})):
            with writing(tmp_path / "folder", private=private) as temporary:
                (temporary / "deep").mkdir(parents=True)
                (temporary / "deep" / "file").touch()
            found = [tmp_path / "folder", *(tmp_path / "folder").rglob("*")]
            assert {stat.S_IMODE(p.stat().st_mode) for p in found} == modes
        with exclusive(tmp_path / "held", private=True):
            assert stat.S_IMODE((tmp_path / "held").stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"a": {"b": NaN}}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' * 200_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_json_is_read_strictly(text, words):
    with pytest.raises(DataError, match=words):
        parse_json(text.encode(), "it")


def test_what_json_cannot_say_is_not_written(tmp_path):
    with pytest.raises(DataError, match=r"it.json cannot be written as JSON: Out of range"):
        write_json(tmp_path / "it.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (read_json, lambda path: read_bytes(path, 10)):
            with pytest.raises(DataError, match=rf"{name} cannot be read: it is not a regular file"):
                read(tmp_path / name)
        with pytest.raises(OSError, match="not a regular file"):
            sha256(tmp_path / name)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    with pytest.raises(DataError, match=r"huge has 1,099,511,627,776 bytes, more than the limit of 67,108,864"):
        read_json(tmp_path / "huge")


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
from pema.locks import exclusive
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


def test_what_a_killed_writer_left_is_cleared_and_what_a_live_one_works_on_is_not(tmp_path):
    for name in ("one", "two"):
        left = tmp_path / f"{name}{TEMPORARY}"
        left.mkdir()
        (left / ".tmpAbc").write_text("half", encoding="utf-8")
    clear(tmp_path / "one")
    assert not (tmp_path / f"one{TEMPORARY}").exists()
    (tmp_path / f"file{TEMPORARY}").write_text("somebody's", encoding="utf-8")
    with writing(tmp_path / "live") as temporary:
        temporary.write_text("new", encoding="utf-8")
        clear_below(tmp_path)
        assert temporary.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"live", f"file{TEMPORARY}"}
    write_file(tmp_path / "file", "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"live", "file"}


def test_a_full_disk_inside_safetensors_is_a_storage_error(tmp_path):
    from safetensors import SafetensorError

    def fail(text):
        with writing(tmp_path / "it"):
            raise SafetensorError(text)

    with pytest.raises(StorageError, match=r"cannot write .*it: No space left on device. Nothing was changed there"):
        fail("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="invalid header"):
        fail("Error while deserializing: invalid header")


def test_safetensors_itself_names_the_systems_error(tmp_path):
    """Where this fails, the library words a full disk in another way."""
    import resource

    import torch

    from pema.tensors import save_tensors

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(StorageError, match=r"cannot write .*it: File too large. Nothing was changed"),
            writing(tmp_path / "it") as temporary,
        ):
            save_tensors({"a": torch.zeros(1000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_seal_covers_exactly_its_values():
    values = {"b": [1, "ö"], "a": {"x": None}}
    sealed = seal(values)
    assert list(sealed) == ["b", "a", "digest"]
    assert unseal(sealed) == values
    assert digest({"a": {"x": None}, "b": [1, "ö"]}) == sealed["digest"]
    for broken in (values, sealed | {"b": [1, "o"]}, sealed | {"c": 1}, sealed | {"digest": "0" * 64}):
        with pytest.raises(DataError, match="its digest does not match"):
            unseal(broken)


def test_a_file_is_discarded_and_one_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        discard(tmp_path / "file")
        assert not (tmp_path / "file").exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"cannot remove .*folder: "):
        discard(tmp_path / "folder")
