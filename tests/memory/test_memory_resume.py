import ast
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plm import FakePLM, FakeTask, FakeTemplate, build, files, some_examples

from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError, StorageError
from pema.memory import shard as shard_module
from pema.memory.manifest import Manifest
from pema.memory.reader import Memory

HERE = Path(__file__).parent


def test_a_build_killed_at_any_moment_ends_with_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "killed_builds.py", tmp_path, "30"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    *rounds, last = done.stdout.splitlines()
    assert int(last.split()[0]) >= 30
    moments = [moment for line in rounds for moment in ast.literal_eval(line)]
    # Kills fell before, between and behind shards, and into writes.
    assert len({shards for shards, _ in moments}) >= 3
    assert any(partial for _, partial in moments)


class StopError(Exception):
    """What the tests interrupt a build with."""


def stopping(after):
    """A PLM that fails behind its answer number `after`."""
    answered = iter(range(after))

    def change(answer, sequence):
        if next(answered, None) is None:
            raise StopError
        return answer

    return FakePLM(change=change)


@pytest.fixture
def interrupted(tmp_path):
    with pytest.raises(StopError):
        build(tmp_path / "m", 40, plm=stopping(20))
    return tmp_path / "m"


def test_two_builds_do_not_work_in_one_folder(tmp_path):
    def meanwhile(answer, _sequence):
        with pytest.raises(StorageError, match="another process works in"):
            build(tmp_path / "m", 40)
        return answer

    build(tmp_path / "m", 40, plm=FakePLM(change=meanwhile))
    build(tmp_path / "whole", 40)
    assert files(tmp_path / "m") == files(tmp_path / "whole")


def test_an_error_of_the_plm_leaves_whole_shards_and_the_next_run_goes_on(interrupted, tmp_path):
    assert [entry.examples for entry in Manifest.read(interrupted).shards] == [8, 8]
    plm = FakePLM()
    build(interrupted, 40, plm=plm)
    assert len(plm.calls) == 3
    build(tmp_path / "whole", 40)
    assert files(interrupted) == files(tmp_path / "whole")


def test_another_batch_size_may_finish_a_build(interrupted):
    assert build(interrupted, 40, batch_tokens=64).examples == 40


def test_an_incomplete_memory_is_refused_by_name(interrupted):
    with pytest.raises(ExternalMemoryError, match=r"m is incomplete \(16 of 40 examples\): run the same build again"):
        Memory.open(interrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 41}, r"was built from another input \(40 examples, digest .*; here 41"),
        ({"plm": FakePLM(name="other")}, "belongs to another PLM: it was made with fake"),
        ({"plm": FakePLM(tap="norm_input")}, "belongs to another LM head"),
        ({"dtype": "int8"}, "was built with dtype 'float16', here it is 'int8'"),
        ({"contexts": "predicted"}, "was built with contexts 'teacher', here it is 'predicted'"),
        ({"examples_per_shard": 9}, "was built with examples_per_shard=8, here it is 9"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_resume_with_something_else_is_refused_by_name(interrupted, complete, change, message):
    if complete:
        build(interrupted, 40)
    before = files(interrupted)
    with pytest.raises(MismatchError, match=message):
        build(interrupted, **{"examples": 40} | change)
    assert files(interrupted) == before


def test_another_template_or_task_is_refused_by_name(interrupted):
    from pema.memory.build import build_memory

    class Other(FakeTemplate):
        text = "Tell {source}:"

    for task, message in ((FakeTask(template=Other()), "template 'Say {source}:'"), (FakeTask("song"), "task 'echo'")):
        with pytest.raises(MismatchError, match=f"was built with {message}"):
            build_memory(FakePLM(), some_examples(40), task, interrupted, examples_per_shard=8)


def test_targets_of_another_kind_are_refused(tmp_path):
    build(tmp_path / "m", contexts="predicted")
    with pytest.raises(MismatchError, match="was built with targets 'position', here it is 'aligned'"):
        build(tmp_path / "m", contexts="predicted", targets="aligned")


def test_a_finished_build_does_nothing_again(tmp_path):
    build(tmp_path / "m")
    before, plm = files(tmp_path / "m"), FakePLM()
    build(tmp_path / "m", plm=plm)
    assert plm.calls == []
    assert files(tmp_path / "m") == before


def test_append_adds_examples_behind_those_that_are_there(tmp_path):
    first, more = some_examples(20), some_examples(13, seed=5)
    build(tmp_path / "m", first)
    before = files(tmp_path / "m")
    memory = build(tmp_path / "m", more, append=True)
    assert memory.examples == 33
    assert {name: files(tmp_path / "m")[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    (both,) = memory.view().batches(10_000)
    (alone,) = build(tmp_path / "alone", more).view().batches(10_000)
    assert both.representations[-len(alone.targets) :].equal(alone.representations)
    assert both.targets[-len(alone.targets) :].equal(alone.targets)
    # Appended once: a second run finds nothing to do.
    assert build(tmp_path / "m", more, append=True).examples == 33


def test_append_needs_a_complete_memory(interrupted, tmp_path):
    with pytest.raises(ExternalMemoryError, match="m is incomplete, so nothing can be appended"):
        build(interrupted, 7, append=True)
    with pytest.raises(ConfigError, match="nowhere is not a memory, so nothing can be appended to it"):
        build(tmp_path / "nowhere", append=True)
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        build(interrupted, 7, append=True, plm=FakePLM(name="other"))


def test_an_unusable_example_leaves_the_memory_that_it_was_to_be_appended_to_complete(tmp_path):
    build(tmp_path / "m", 20)
    broken = [*some_examples(3, seed=5), replace(some_examples(1)[0], target="", where="more.tsv:4")]
    with pytest.raises(DataError, match=r"more.tsv:4: the target tokenises to nothing"):
        build(tmp_path / "m", broken, append=True)
    assert Memory.open(tmp_path / "m").examples == 20


def test_writing_overlaps_computing(tmp_path, monkeypatch):
    asked = threading.Semaphore(0)
    write = shard_module.write_shard

    def waiting(folder, index, contents):
        # The first shard is not written before the PLM has answered for the second group.
        assert index > 0 or asked.acquire(timeout=20)
        return write(folder, index, contents)

    answers = iter(range(100))

    def change(answer, sequence):
        if next(answers) == 8:
            asked.release()
        return answer

    monkeypatch.setattr("pema.memory.engines.in_process.write_shard", waiting)
    assert build(tmp_path / "m", 24, plm=FakePLM(change=change)).examples == 24


def test_a_damaged_head_of_an_interrupted_build_is_written_again(interrupted, tmp_path):
    (interrupted / "head" / "head.safetensors").write_bytes(b"")
    build(interrupted, 40)
    build(tmp_path / "whole", 40)
    assert files(interrupted) == files(tmp_path / "whole")


def damage(folder, name="shard-00001.safetensors"):
    """Change one bit of a stored representation; what the header promises still holds."""
    data = bytearray((folder / name).read_bytes())
    data[-200] ^= 1
    (folder / name).write_bytes(bytes(data))


def test_a_damaged_memory_is_not_built_upon(tmp_path):
    build(tmp_path / "m", some_examples(40))
    damage(tmp_path / "m")
    before = files(tmp_path / "m")
    with pytest.raises(ExternalMemoryError, match=r"shard-00001.safetensors is damaged \(changed since it was written"):
        build(tmp_path / "m", some_examples(5, seed=3), append=True)
    assert files(tmp_path / "m") == before


def test_an_interrupted_build_does_not_go_on_from_a_damaged_shard(interrupted):
    damage(interrupted, "shard-00000.safetensors")
    with pytest.raises(ExternalMemoryError, match=r"shard-00000.safetensors is damaged \(changed since it was written"):
        build(interrupted, 40)


def test_what_killed_writers_left_is_cleared_by_the_next_run(tmp_path):
    build(tmp_path / "m", some_examples(20))
    before = files(tmp_path / "m")
    for name in ("manifest.json.partial", "shard-00007.safetensors.partial", "head.partial"):
        (tmp_path / "m" / name).mkdir()
        (tmp_path / "m" / name / ".tmpAbc").write_bytes(b"half")
    build(tmp_path / "m", some_examples(20))
    assert files(tmp_path / "m") == before
    assert not list((tmp_path / "m").glob("*.partial"))
