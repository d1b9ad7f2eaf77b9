"""Locks on folders that other processes remove at any moment."""

import threading
from pathlib import Path

import pytest

from pema.errors import StorageError
from pema.files import remove
from pema.locks import exclusive, locked


def test_a_folder_that_is_removed_while_it_is_created_is_created_again(tmp_path, monkeypatch):
    folder, mkdir, calls = tmp_path / "work", Path.mkdir, []

    def removed(self, *args, **settings):
        calls.append(self)
        if len(calls) == 1:  # mkdir of the system says that the folder is there, then it is gone
            raise FileExistsError(17, "File exists", str(self))
        return mkdir(self, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", removed)
    with locked(folder):
        assert folder.is_dir()
    assert calls == [folder, folder]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "work").touch()
    with pytest.raises(StorageError, match=r"cannot work in .*work: File exists"), exclusive(tmp_path / "work"):
        pass


def test_threads_that_remove_the_folder_take_turns(tmp_path):
    folder, inside, done = tmp_path / "work", [], []

    def work():
        for _ in range(50):
            with locked(folder):
                inside.append(1)
                (folder / "file").touch(exist_ok=False)
                assert len(inside) == 1
                inside.pop()
                remove(folder)  # the lock ends here: the next thread may create the folder anew
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4
