"""Memories in object storage: the same bytes as on the disk, whatever fails on the way."""

import shutil
import threading
from dataclasses import replace

import pytest
from fake_plm import FakePLM, FakeTask, build, files, some_examples
from faulty_files import Fault

from pema.cli import main
from pema.errors import ConfigError, ExternalMemoryError, StorageError
from pema.memory.build import build_memory
from pema.memory.merge import merge
from pema.memory.places import MEMORY, read_manifest
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.storage import fetching, remote
from pema.storage.publishing import publish

AT = "faulty://bucket/memory"
FILES = ["head.json", "head.safetensors", *(f"shard-0000{k}.safetensors" for k in range(3)), "manifest.json"]


def built(place=AT, *, count=12, seed=0, plm=None, append=False):
    return build_memory(
        plm or FakePLM(), some_examples(count, seed), FakeTask(), place, examples_per_shard=4, append=append
    )


def left(tmp_path):
    """What the cache keeps beside whole artifacts."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".partial")] + list(
        (tmp_path / "cache" / "storage" / "work").glob("*")
    )


class Killed(BaseException):
    """The end of the process, which no code handles."""


def test_a_build_at_an_address_is_the_same_as_on_the_disk(tmp_path, faulty):
    here, there = built(tmp_path / "memory"), built()
    assert faulty.content("bucket/memory") == files(tmp_path / "memory")
    assert there.manifest == here.manifest
    writes = faulty.requests("write")
    assert writes == FILES  # the manifest last
    assert not left(tmp_path)
    (batch,), (expected,) = (each.view().batches(1000) for each in (there, here))
    assert batch.representations.equal(expected.representations)
    assert batch.targets.equal(expected.targets)


def test_a_memory_is_read_once(tmp_path, faulty):
    publish(built(tmp_path / "memory").path, AT, MEMORY)
    removed_cache(tmp_path)
    faulty.calls.clear()
    first = Memory.open(AT)
    assert sorted(faulty.requests("read")) == sorted(FILES)
    assert files(first.path) == files(tmp_path / "memory")
    again = Memory.open(AT)
    assert again.path == first.path
    assert faulty.requests("read") == ["manifest.json"]
    assert read_manifest(AT) == first.manifest
    for path in (first.path, *first.path.glob("*.*"), tmp_path / "cache" / "storage"):
        assert path.stat().st_mode & 0o077 == 0  # a memory is private text


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_killed_upload_is_no_memory_and_the_same_build_completes_it(tmp_path, faulty, file, after):
    faulty.faults.append(Fault("write", file, Killed(), after=after))
    with pytest.raises(Killed):
        built()
    whole = (file, after) == ("manifest.json", 1.0)
    if not whole:
        with pytest.raises(ExternalMemoryError, match=r"contains no memory|is damaged"):
            Memory.open(AT)
    faulty.calls.clear()
    plm = FakePLM()
    memory = built(plm=plm)
    assert plm.calls == []  # nothing is asked of the PLM again
    uploaded = FILES[FILES.index(file) :] if after < 1 else FILES[FILES.index(file) + 1 :]
    assert faulty.requests("write") == uploaded
    assert faulty.content("bucket/memory") == files(
        build(tmp_path / "here", some_examples(12), examples_per_shard=4).path
    )
    verify(AT)
    assert memory.pairs
    assert not left(tmp_path)


def test_a_killed_build_resumes_from_the_cache(tmp_path, faulty):
    def die(answer, sequence):
        if answer.index == 1 and len(plm.calls) == 2:
            raise Killed
        return answer

    plm = FakePLM(change=die)
    with pytest.raises(Killed):
        built(plm=plm)
    assert faulty.content("bucket/memory") == {}
    plm = FakePLM()
    built(plm=plm)
    assert len(plm.calls) == 2  # the first shard of three is kept
    assert faulty.requests("write") == FILES


def test_an_upload_that_arrives_damaged_is_refused(faulty):
    faulty.faults.append(Fault("write", "shard-00001*", None))
    with pytest.raises(StorageError, match=r"shard-00001.safetensors is not what was uploaded \(size or SHA-256"):
        built()
    with pytest.raises(ExternalMemoryError, match="contains no memory"):
        Memory.open(AT)
    built()
    verify(AT)


def test_passing_faults_change_nothing(tmp_path, faulty, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1000)
    for request in ("info", "read", "write"):
        for error in (OSError(16, "503"), ConnectionResetError("cut"), TimeoutError()):
            faulty.faults += [Fault(request, name, error, after=0.3) for name in FILES]
    built()
    assert faulty.content("bucket/memory") == files(built(tmp_path / "memory").path)
    verify(AT)


def removed_cache(tmp_path):
    shutil.rmtree(tmp_path / "cache")


def test_an_interrupted_fetch_continues_inside_the_file(tmp_path, faulty, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 500)
    built()
    removed_cache(tmp_path)
    size = len(faulty.content("bucket/memory")["shard-00001.safetensors"])
    faulty.faults.append(Fault("read", "shard-00001*", OSError(16, "503"), times=0))
    reads = faulty.cat_file

    def third_fails(self, path, start=None, end=None, **options):
        if "shard-00001" in path and start == 1000:
            raise Killed
        return reads(self, path, start, end, **options)

    monkeypatch.setattr(faulty, "cat_file", third_fails)
    with pytest.raises(Killed):
        Memory.open(AT)
    monkeypatch.setattr(faulty, "cat_file", reads)
    faulty.calls.clear()
    Memory.open(AT)
    names = faulty.requests("read")
    assert names.count("shard-00000.safetensors") == 0
    assert names.count("shard-00001.safetensors") == -(-size // 500) - 2
    assert not left(tmp_path)
    verify(AT)


def test_the_damaged_rest_of_an_interrupted_fetch_is_read_again(tmp_path, faulty):
    built()
    removed_cache(tmp_path)
    digest = read_manifest(AT).shards[0].sha256
    work = tmp_path / "cache" / "storage" / "files" / f"{digest}.partial"
    for content in (b"damaged", b"x" * 100_000):
        work.mkdir(parents=True)
        (work / "data").write_bytes(content)
        Memory.open(AT)
        assert not left(tmp_path)
        removed_cache(tmp_path)


def test_damage_in_the_storage_is_refused(tmp_path, faulty):
    built()
    removed_cache(tmp_path)
    faulty.faults.append(Fault("read", "shard-00002*", None))
    with pytest.raises(
        StorageError, match=r"shard-00002.safetensors is damaged \(its SHA-256 is not the one in the index"
    ):
        Memory.open(AT)
    faulty.faults.append(Fault("read", "shard-00002*", None))
    with pytest.raises(
        ExternalMemoryError, match=r"faulty://bucket/memory is damaged: shard-00002.safetensors has chang"
    ):
        verify(AT)
    verify(AT)


@pytest.mark.parametrize("change", [lambda content: None, lambda content: content[:-7]])
def test_a_missing_or_truncated_file_is_refused_before_it_is_read(tmp_path, faulty, change):
    built()
    removed_cache(tmp_path)
    path = f"{AT}/shard-00002.safetensors"
    content = change(faulty().cat_file(path))
    faulty().rm_file(path)
    message, fault = "is missing: upload it again", "is missing"
    if content is not None:
        faulty().pipe_file(path, content)
        message, fault = r"has [\d,]+ bytes, expected [\d,]+: upload it again", r"has [\d,]+ bytes, expected"
    with pytest.raises(StorageError, match=message):
        Memory.open(AT)
    with pytest.raises(ExternalMemoryError, match=f"shard-00002.safetensors {fault}"):
        verify(AT)


def test_the_same_build_uploads_what_was_lost(faulty):
    built()
    faulty().rm_file(f"{AT}/shard-00002.safetensors")
    faulty.calls.clear()
    built()
    assert faulty.requests("write") == ["shard-00002.safetensors"]
    verify(AT)


def test_a_file_that_disappears_while_it_is_read_is_named(tmp_path, faulty, monkeypatch):
    built()
    removed_cache(tmp_path)
    faulty.faults.append(Fault("read", "shard-00000*", FileNotFoundError()))
    with pytest.raises(StorageError, match=r"shard-00000.safetensors is missing: upload it again"):
        Memory.open(AT)


def test_a_damaged_cache_is_repaired(tmp_path, faulty):
    path = built().path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    faulty.calls.clear()
    memory = Memory.open(AT)
    assert faulty.requests("read") == ["manifest.json", "shard-00001.safetensors"]
    verify(memory.path)


def test_processes_share_a_fetch(tmp_path, faulty):
    built()
    removed_cache(tmp_path)
    faulty.calls.clear()
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(Memory.open(AT).path)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(opened)) == 1
    assert len(opened) == 6
    names = faulty.requests("read")
    assert [names.count(name) for name in FILES[:-1]] == [1] * 5


def test_appending_uploads_and_fetches_the_new_shards_alone(tmp_path, faulty):
    built()
    removed_cache(tmp_path)
    before = faulty.content("bucket/memory")
    faulty.calls.clear()
    memory = built(seed=1, append=True)
    assert faulty.requests("write") == [f"shard-0000{k}.safetensors" for k in (3, 4, 5)] + ["manifest.json"]
    after = faulty.content("bucket/memory")
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    here = build(tmp_path / "here", some_examples(12), examples_per_shard=4)
    build(here.path, some_examples(12, 1), examples_per_shard=4, append=True)
    assert after == files(here.path)
    assert memory.examples == 24


def test_another_memory_is_never_overwritten(tmp_path, faulty):
    built()
    before = faulty.content("bucket/memory")
    other = build(tmp_path / "other", some_examples(5, 7))
    with pytest.raises(StorageError, match="already contains another memory: choose another address"):
        publish(other.path, AT, MEMORY)
    appended = built(seed=1, append=True)
    with pytest.raises(StorageError, match="already contains another memory"):  # an older state of it
        publish(build(tmp_path / "old", some_examples(12), examples_per_shard=4).path, AT, MEMORY)
    assert {name: faulty.content("bucket/memory")[name] for name in before if "shard" in name}.items() <= before.items()
    assert appended.examples == 24


def test_a_folder_with_other_files_is_refused_before_the_work(faulty):
    faulty().pipe_file("faulty://bucket/memory/thesis.tex", b"x")
    plm = FakePLM()
    with pytest.raises(StorageError, match=r"contains 'thesis.tex' but no memory: choose another address"):
        built(plm=plm)
    assert plm.calls == []


def test_a_damaged_memory_is_not_published(tmp_path, faulty):
    memory = built(tmp_path / "memory")
    path = memory.path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        ExternalMemoryError, match=r"shard-00001.safetensors is missing or damaged .* nothing was published"
    ):
        publish(memory.path, AT, MEMORY)
    assert faulty.requests("write") == []


def test_an_unfinished_memory_is_not_published(tmp_path, faulty):
    memory = built(tmp_path / "memory")
    replace(memory.manifest, complete=False, shards=memory.manifest.shards[:1]).write(memory.path)
    with pytest.raises(ExternalMemoryError, match="is incomplete"):
        publish(memory.path, AT, MEMORY)
    assert faulty.requests("write") == []


def test_only_one_process_writes_to_an_address(faulty):
    errors = []

    def answer(answer, sequence):
        if not errors:
            try:
                built()
            except StorageError as error:
                errors.append(str(error))
        return answer

    built(plm=FakePLM(change=answer))
    assert "another process works in" in errors[0]


def test_merge_and_sample_take_and_give_addresses(tmp_path, faulty):
    parts = [built(f"faulty://bucket/{k}", seed=k).path for k in range(2)]
    merged = merge(["faulty://bucket/0", parts[1]], "faulty://bucket/both")
    merge(parts, tmp_path / "both")
    assert faulty.content("bucket/both") == files(tmp_path / "both")
    sample("faulty://bucket/both", "faulty://bucket/small", pairs=20)
    sample(tmp_path / "both", tmp_path / "small", pairs=20)
    assert faulty.content("bucket/small") == files(tmp_path / "small")
    assert merged.examples == 24
    with pytest.raises(ConfigError, match="is given twice"):
        merge(["faulty://bucket/0", "faulty://bucket/0"], "faulty://bucket/twice")
    with pytest.raises(StorageError, match="already contains another memory"):
        merge(list(reversed(parts)), "faulty://bucket/both")


@pytest.fixture
def pema(monkeypatch, capsys):
    """Run a command; returns its exit status, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pema", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return run


def test_the_command_line_reads_and_writes_addresses(faulty, pema):
    built()
    built("faulty://bucket/other", seed=1)
    status, printed = pema("memory", "info", AT)
    assert (status, AT in printed) == (0, True)
    status, printed = pema("memory", "merge", AT, "faulty://bucket/other", "-o", "faulty://me:secret@bucket/both")
    assert (status, "faulty://bucket/both" in printed, "secret" in printed) == (0, True, False)
    assert pema("memory", "verify", "faulty://bucket/both")[0] == 0
    assert pema("memory", "sample", AT, "-o", "faulty://bucket/small", "--pairs", "20")[0] == 0
    assert Memory.open("faulty://bucket/small").pairs <= 20
    status, printed = pema("memory", "info", "faulty://bucket/none")
    assert (status, "faulty://bucket/none contains no memory" in printed) == (1, True)


def test_a_full_disk_is_named(tmp_path, faulty, monkeypatch):
    built()
    removed_cache(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "_append", full)
    with pytest.raises(StorageError, match=r"cannot be kept in .*cache: No space left on device. Make room there"):
        Memory.open(AT)
