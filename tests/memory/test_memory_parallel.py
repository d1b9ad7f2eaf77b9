"""Builds in several processes: the bytes of one, however many, and whatever ends one of them."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_plm import FakePLM, build, files, some_examples
from launched_build import build_as

from launched import LIMIT, launch
from pema.errors import ConfigError, ProcessError, StorageError
from pema.exchange import Exchange
from pema.files import read_json, seal, write_json
from pema.memory import register as register_module
from pema.memory.engines.launched import Team
from pema.memory.manifest import Manifest
from pema.memory.places import require_folder
from pema.memory.reader import Memory
from pema.memory.register import Register, read_receipts, receipt_name
from pema.processes import ALONE, Processes

EXAMPLES = 64
"""In 8 shards."""

KINDS = {
    "teacher": {"examples": EXAMPLES},
    "int8": {"examples": EXAMPLES, "dtype": "int8"},
    "predicted": {"examples": EXAMPLES, "contexts": "predicted", "targets": "aligned"},
}


def answers(folder):
    """The sequences that the PLM was asked for, each as often as it was."""
    path = folder.with_name(folder.name + ".answers")
    return [line.split(maxsplit=1)[1] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of the builds of one process, by kind."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: files(build(folder / name, **kind).path) for name, kind in KINDS.items()}


@pytest.mark.parametrize(("kind", "count"), [("teacher", 2), ("int8", 3), ("predicted", 2)])
def test_the_files_are_those_of_one_process(kind, count, alone, tmp_path):
    codes, out, err = launch(tmp_path / "printed", count, tmp_path / "m", KINDS[kind], program=build_as)
    assert codes == [0] * count, err
    assert files(tmp_path / "m") == alone[kind]
    assert len(answers(tmp_path / "m")) == EXAMPLES
    assert out == [""] * count
    assert err[1:] == [""] * (count - 1)


def test_a_process_that_begins_late_leaves_none_of_its_shards_to_the_others(alone, tmp_path):
    codes, _, err = launch(tmp_path / "printed", 2, tmp_path / "m", KINDS["teacher"], (1, 0, "late"), program=build_as)
    assert codes == [0, 0], err
    assert files(tmp_path / "m") == alone["teacher"]
    assert len(answers(tmp_path / "m")) == EXAMPLES


@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_builds_resume_with_any_number_of_processes_and_ask_for_nothing_twice(kind, alone, tmp_path):
    for count, fault in ((2, (1, 3, "kill")), (3, (0, 2, "kill")), (2, (1, 1, "interrupt"))):
        codes, _, err = launch(tmp_path / "printed", count, tmp_path / "m", KINDS[kind], fault, program=build_as)
        rank = fault[0]
        assert codes[rank] == {"kill": -9, "interrupt": 130}[fault[2]], err
        assert all(code == 1 for k, code in enumerate(codes) if k != rank), err
        messages = "".join(err)
        assert messages.count("pema: ") == 1, err
        if fault[2] == "kill":
            assert "another process of this command has ended or does not answer: its message" in messages
        assert not Manifest.read(tmp_path / "m").complete
    codes, _, err = launch(tmp_path / "printed", 1, tmp_path / "m", KINDS[kind], program=build_as)
    assert codes == [0], err
    assert files(tmp_path / "m") == alone[kind]
    assert len(answers(tmp_path / "m")) == EXAMPLES


def test_a_complete_memory_is_appended_to_and_then_left_alone(alone, tmp_path):
    build(tmp_path / "whole", 40)
    build(tmp_path / "m", 40)
    more = {"examples": 21, "seed": 5, "append": True}
    for _ in range(2):
        codes, _, err = launch(tmp_path / "printed", 2, tmp_path / "m", more, program=build_as)
        assert codes == [0, 0], err
    assert "already contains these 21 examples: nothing to do" in err[0]
    build(tmp_path / "whole", some_examples(21, 5), append=True)
    assert files(tmp_path / "m") == files(tmp_path / "whole")
    assert len(answers(tmp_path / "m")) == 21


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((0, 6, "nan"), "the PLM's representation contains NaN or infinity"),
        ((1, 6, "nan"), "the PLM's representation contains NaN or infinity"),
        ((1, 0, "other input"), "the memory of process 0, seen from process 1, is built from another input"),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_message(fault, message, tmp_path):
    codes, _, err = launch(tmp_path / "printed", 2, tmp_path / "m", {}, fault, program=build_as)
    assert codes == [1, 1], err
    assert "".join(err).count("pema: ") == 1
    assert message in err[fault[0]]


def test_an_error_in_all_processes_is_told_once(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "letter.txt").write_text("Dear")
    codes, _, err = launch(tmp_path / "printed", 2, tmp_path / "m", {}, program=build_as)
    assert sorted(codes) == [1, 2]
    assert "".join(err).count("pema: ") == 1
    assert "m contains files but no memory" in err[0]


def test_accelerate_launches_it(tmp_path):
    lines = [json.dumps({"source": e.source, "target": e.target}) for e in some_examples(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    build_words = ["build", "--plm", "embedded", "--task", "style", "--data", str(tmp_path / "pairs.jsonl")]
    build_words += ["--set", "examples_per_shard=3", "--json", "-o"]
    path = os.pathsep.join(str(each) for each in sys.path if each)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    printed = []
    two = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"]
    for name, launcher in (("one", []), ("two", two)):
        words = [sys.executable, "-m", *launcher, "pema", *build_words, str(tmp_path / name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout) | {"memory": ""})
    assert printed[0] == printed[1]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(Memory.open(tmp_path / "two").manifest.shards) == 4


class Told(Exchange):
    """An exchange in which everything has been told."""

    def wait(self, until):
        return until()


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    build(tmp_path / "m", 20)
    build(tmp_path / "other", 20, plm=FakePLM(name="other"))
    begun = {"manifest": Manifest.read(tmp_path / "m").to_dict(), "waiting": [], "remaining": []}
    for name in ("missing", "other"):
        team = Team(Processes(1, 2))
        team._exchange = Told(team.processes, dict, print)
        team._receive(0, {"said": {"begun": begun | {"folder": str(tmp_path / name)}}})
        with pytest.raises(ConfigError, match=r"process 1 does not see the manifest.json that process 0 has written"):
            team.join()


def test_an_address_is_refused_as_the_folder_of_several_processes():
    with pytest.raises(ConfigError, match=r"s3://bucket/memory with 2 processes: they write into one folder, and what"):
        require_folder("s3://bucket/memory", Processes(1, 2))
    require_folder("s3://bucket/memory", ALONE)
    require_folder("memory", Processes(1, 2))


def test_what_another_process_enters_before_this_one_has_begun_is_kept(tmp_path):
    manifest = Manifest.read(build(tmp_path / "m", 20).path)
    empty = Manifest.from_dict(manifest.to_dict() | {"shards": [], "complete": False})
    team = Team(Processes(1, 2))
    team._exchange = Told(team.processes, dict, print)
    begun = {"manifest": empty.to_dict(), "waiting": [], "remaining": [], "folder": str(tmp_path / "m")}
    team._receive(0, {"said": {"begun": begun}, "shards": [[0, manifest.shards[0].to_dict()]]})
    assert team.join().manifest.shards == manifest.shards[:1]


def receipts(folder):
    """A memory of 3 shards whose first is missing, so that the other two have receipts."""
    manifest = Manifest.read(build(folder, 20).path)
    first = Manifest.from_dict(manifest.to_dict() | {"shards": [], "complete": False})
    groups = {0: range(8), 1: range(8, 16), 2: range(16, 20)}
    register = Register(folder, first, {})
    for index in (2, 1):
        register.enter(index, groups[index], manifest.shards[index])
    return manifest, first, groups, register


def test_shards_enter_the_manifest_in_their_order(tmp_path):
    manifest, first, groups, register = receipts(tmp_path / "m")
    assert register.manifest.shards == ()
    assert read_receipts(tmp_path / "m", first, groups) == {1: manifest.shards[1], 2: manifest.shards[2]}
    register.enter(0, groups[0], manifest.shards[0])
    assert register.manifest == Manifest.read(tmp_path / "m") == manifest
    assert not list((tmp_path / "m").glob("receipt-*"))


def test_receipts_that_a_killed_writer_has_not_entered_are_entered_by_the_next_one(tmp_path):
    manifest, first, groups, _ = receipts(tmp_path / "m")
    Register(tmp_path / "m", first, {}, writes=False).enter(0, groups[0], manifest.shards[0])
    assert len(list((tmp_path / "m").glob("receipt-*"))) == 3
    next_one = Register(tmp_path / "m", first, read_receipts(tmp_path / "m", first, groups))
    assert next_one.manifest == Manifest.read(tmp_path / "m") == manifest
    assert not list((tmp_path / "m").glob("receipt-*"))


def change(**changes):
    def rewrite(path):
        values = {name: value for name, value in read_json(path).items() if name != "digest"}
        write_json(path, seal(values | changes))

    return rewrite


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_text(path.read_text().replace('"count": 8', '"count": 7')),
        change(of="0" * 64),
        change(first=9),
        change(version=2),
        change(more=1),
        change(shard={}),
        lambda path: (path.parent / "shard-00001.safetensors").write_bytes(b"other"),
        lambda path: (path.parent / "shard-00001.safetensors").unlink(),
        lambda path: path.rename(path.with_name("receipt-1.json")),
    ],
)
def test_a_receipt_that_is_damaged_or_of_another_build_is_not_used(spoil, tmp_path):
    manifest, first, groups, _ = receipts(tmp_path / "m")
    spoil(tmp_path / "m" / receipt_name(1))
    assert read_receipts(tmp_path / "m", first, groups) == {2: manifest.shards[2]}
    first.write(tmp_path / "m")
    plm = FakePLM()
    build(tmp_path / "m", 20, plm=plm)
    assert len(plm.calls) == 2
    assert Manifest.read(tmp_path / "m") == manifest


def test_a_full_disk_at_a_receipt_is_an_error_of_storage(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StorageError("the disk is full")

    manifest, first, groups, _ = receipts(tmp_path / "m")
    monkeypatch.setattr(register_module, "write_json", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        Register(tmp_path / "m", first, {}).enter(1, groups[1], manifest.shards[1])


def test_a_process_alone_waits_for_nobody():
    with Exchange(ALONE, dict, print) as exchange:
        exchange.require()
        assert exchange.wait(lambda: 7) == 7
        exchange.finish()


def test_a_process_hears_that_another_has_failed(monkeypatch):
    told = [["working", 1], ["failed", []]]
    monkeypatch.setattr("pema.exchange._gather", lambda data, group: [json.dumps(each).encode() for each in told])
    exchange = Exchange(Processes(0, 2), lambda: 1, lambda rank, told: None)
    assert not exchange._round(SimpleNamespace())
    with pytest.raises(ProcessError, match="process 1 of this command has failed: its message says why"):
        exchange.require()


def test_what_cannot_be_received_is_an_error_here(monkeypatch):
    def receive(rank, told):
        raise StorageError("the disk is full")

    monkeypatch.setattr("pema.exchange._gather", lambda data, group: [b'["working", 1]'] * 2)
    exchange = Exchange(Processes(0, 2), lambda: 1, receive)
    assert exchange._round(SimpleNamespace())
    with pytest.raises(StorageError, match="the disk is full"):
        exchange.wait(lambda: None)
