"""Addresses: what is one, how it is shown, and what is refused before anything is sent."""

from pathlib import Path

import pytest
from faulty_files import Fault

from pema.cli import main
from pema.errors import ConfigError, ExternalMemoryError, StorageError
from pema.memory.places import MEMORY
from pema.memory.reader import Memory
from pema.storage import remote
from pema.storage.address import is_address, joined, name_of, shown
from pema.storage.fetching import fetch, local
from pema.storage.publishing import destination
from pema.storage.remote import Remote


@pytest.mark.parametrize(
    ("place", "answer"),
    [
        ("s3://bucket/memory", True),
        ("hf://owner/name", True),
        ("memory://x", True),
        ("memory", False),
        ("./s3/memory", False),
        ("/data/memory", False),
        ("owner/name", False),
        ("llamacpp:file.gguf", False),
        (Path("data/memory"), False),
    ],
)
def test_an_address_has_a_protocol(place, answer):
    assert is_address(place) is answer


def test_an_address_in_a_path_is_refused():
    with pytest.raises(ConfigError, match="s3:/bucket/memory is an address in a Path, which drops a slash"):
        Memory.open(Path("s3://bucket/memory"))
    assert not is_address(Path("results:/memory"))  # a folder's name, not a protocol


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("S3://me:secret@bucket/memory", r"^S3://\.\.\. is not an address: .* in small letters"),
        ("simplecache::s3://bucket/memory", r"^simplecache::s3://\.\.\. is not an address: .* without a chain"),
        (" s3://bucket/memory", r"^ s3://\.\.\. is not an address"),
        ("s3:/me:secret@bucket/memory", r"^s3:/\.\.\. has one slash: an address has two, such as s3://bucket/folder"),
    ],
)
def test_what_is_nearly_an_address_is_no_folder_of_this_machine(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message), destination(place, MEMORY):
        pass
    assert not list(tmp_path.iterdir())
    assert not is_address("results:/memory")  # a folder's name, not a protocol


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "adapter", "--plm", "embedded", "--input", "in.txt", "-o", "s3://bucket/out.txt"),
        ("classify", "adapter", "--plm", "embedded", "--input", "in.txt", "--labels", "l", "-o", "s3://bucket/out.txt"),
        ("compare", "experiment.toml", "-o", "s3://bucket/results"),
        ("sweep", "experiment.toml", "--work", "s3://bucket/runs"),
        ("demo", "--report", "s3://bucket/demo.html"),
        ("demo", "-o", "s3://bucket/demo.json"),
        ("demo", "--keep", "s3://bucket/demo"),
        ("demonstrate", "--task", "reply", "--data", "d.jsonl", "--pool", "d.jsonl", "-o", "s3://bucket/shown.jsonl"),
        ("inspect", "adapter", "--plm", "embedded", "--text", "Where?", "-o", "s3://bucket/page.html"),
        ("report", "results", "-o", "s3://bucket/page.html"),
        ("recover", "http://127.0.0.1:1", "--tokenizer", "t", "-o", "s3://bucket/head"),
        ("release", "embedded", "-o", "head", "--mask", "rotation", "--secret", "s3://bucket/secret"),
    ],
)
def test_commands_that_write_locally_refuse_an_address(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pema", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pema: s3://... is an address, where only memories, adapters and head bundles" in capsys.readouterr().err


def test_local_places_stay_as_they_are(tmp_path):
    assert local(tmp_path, MEMORY) == local(str(tmp_path), MEMORY) == tmp_path
    with destination(tmp_path / "new", MEMORY) as folder:
        assert folder == tmp_path / "new"
    assert not folder.exists()
    assert (shown("a/"), name_of("a/b"), joined("a", "b")) == ("a", "b", Path("a/b"))


def test_credentials_are_never_shown(faulty):
    address = "faulty://me:secret@host/memory"
    assert (shown(address), name_of(address)) == ("faulty://host/memory", "memory")
    faulty.faults.append(Fault("info", "*", OSError(5, "me:secret@host: secret is wrong"), times=9))
    with pytest.raises(StorageError, match=r"faulty://host/memory/manifest.json cannot be read") as caught:
        Memory.open(address)
    assert "secret" not in str(caught.value)


def test_credentials_without_effect_are_refused():
    with pytest.raises(ConfigError, match="memory://host/m was given with credentials, which have no effect") as caught:
        Remote("memory://me:secret@host/m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere://bucket/memory", r"nowhere://bucket/memory cannot be used as an address \(ValueError: Protocol not"),
        ("memory://", "memory:// names no folder"),
        ("memory://m?signature=secret", r"memory://m was given with a query \(\?...\)"),
    ],
)
def test_an_impossible_address_is_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        fetch(address, MEMORY)


@pytest.mark.parametrize(
    ("protocol", "remedy"), [("s3", r"(pip install .*s3fs|the extra 's3')"), ("gs", "install gcsfs")]
)
def test_a_missing_library_is_named(monkeypatch, protocol, remedy):
    from fsspec import core
    from fsspec.registry import known_implementations

    def missing(*_, **__):
        raise ImportError(known_implementations[protocol]["err"])

    monkeypatch.setattr(core, "url_to_fs", missing)
    with pytest.raises(
        ConfigError, match=f"{protocol}://bucket/memory needs a library that is not installed: .*{remedy}"
    ):
        Memory.open(f"{protocol}://bucket/memory")


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    ("error", "message", "attempts"),
    [
        (PermissionError("Forbidden"), r"\(PermissionError: Forbidden\): give credentials that allow it", 1),
        (NoCredentialsError("none"), r"give credentials that allow it in the environment", 1),
        (OSError(22, "bad request"), "check the address", 1),
        (OSError(16, "503 Slow Down"), r"Slow Down\): it was tried 5 times; the same command continues once", 5),
        (TimeoutError(), r"\(TimeoutError\): it was tried 5 times", 5),
        (ConnectionResetError("cut"), "it was tried 5 times", 5),
    ],
)
def test_what_passes_is_tried_again_and_what_does_not_is_refused_at_once(faulty, error, message, attempts):
    faulty.faults.append(Fault("info", "*", error, times=9))
    with pytest.raises(StorageError, match=message):
        Memory.open("faulty://memory")
    assert len(faulty.requests("info")) == attempts


def test_pauses_grow(faulty, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote, "PAUSE", 0.5)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    faulty.faults.append(Fault("info", "*", OSError(16, "busy"), times=9))
    with pytest.raises(StorageError, match="busy"):
        Memory.open("faulty://memory")
    assert pauses == [0.5, 1, 2, 4]


def test_a_place_without_an_artifact_is_named(faulty):
    with pytest.raises(ExternalMemoryError, match=r"faulty://m contains no memory \(it has no manifest.json\)"):
        Memory.open("faulty://m")


def test_a_missing_bucket_is_named(faulty, monkeypatch):
    def find(self, path, **_):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(faulty, "find", find)
    with pytest.raises(StorageError, match=r"cannot be listed .*bucket does not exist\): check the address"):
        Memory.open("faulty://m")
    with (
        pytest.raises(StorageError, match="bucket does not exist"),
        destination("faulty://m", MEMORY),
    ):
        pytest.fail("the block must not begin")


def test_an_index_beyond_its_limit_is_not_read(faulty):
    faulty().pipe_file("faulty://m/manifest.json", b"x" * ((1 << 26) + 1))
    with pytest.raises(StorageError, match=r"manifest.json has 67,108,865 bytes, more than the limit of 67,108,864"):
        Memory.open("faulty://m")
    assert faulty.requests("read") == []
