"""Answers that are not in a shard yet survive every end of a build."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from fake_plm import FakePLM, build, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import DataError, OwnerError, StorageError
from pema.memory import journal as journal_module
from pema.memory.build import build_memory
from pema.memory.journal import Journal, _record, clear_journals, journal_name
from pema.memory.manifest import Manifest
from pema.owner.contract import ContextRepresentations
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task

KINDS = pytest.mark.parametrize(
    "kind",
    [{}, {"dtype": "int8"}, {"contexts": "predicted", "targets": "aligned"}],
    ids=["teacher", "int8", "predicted"],
)


class Refusing(FakePLM):
    """A PLM with a quota: every call answers for so many sequences, and the request after them is refused."""

    def __init__(self, quota, error=OwnerError):
        super().__init__()
        self.quota, self.error, self.answered = quota, error, 0

    def _answers(self, answers):
        for answered, answer in enumerate(super()._answers(answers)):
            if answered == self.quota:
                raise self.error("429: over the quota of the day")
            self.answered += 1
            yield answer


@KINDS
def test_a_build_under_a_small_quota_ends_and_no_answer_is_asked_for_twice(tmp_path, kind):
    days, plm = 0, Refusing(3)
    while not (tmp_path / "m" / "manifest.json").exists() or not Manifest.read(tmp_path / "m").complete:
        try:
            build(tmp_path / "m", 20, plm=plm, **kind)
        except OwnerError:
            days += 1
    assert days == 5  # groups of 8, 8 and 4, and 3 answers a call
    assert plm.answered == 20
    build(tmp_path / "whole", 20, **kind)
    assert files(tmp_path / "m") == files(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError, RuntimeError])
def test_whatever_ends_a_build_the_answers_stay(tmp_path, error, capsys):
    with pytest.raises(error):
        build(tmp_path / "m", 8, plm=Refusing(5, error))
    assert (tmp_path / "m" / journal_name(0)).stat().st_mode & 0o777 == 0o600
    plm = FakePLM()
    build(tmp_path / "m", 8, plm=plm)
    assert [len(skipped) for skipped in plm.skipped] == [5]
    assert "5 of 8 examples were answered before" in capsys.readouterr().err
    assert not list((tmp_path / "m").glob("*.journal"))


def test_journals_are_known_by_their_number(tmp_path):
    names = [journal_name(index) for index in (7, 99_998, 99_999, 100_000)]
    for name in (*names, "answers-x.journal"):
        (tmp_path / name).touch()
    clear_journals(tmp_path, 99_999)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*names[2:], "answers-x.journal"))


def test_a_group_whose_answers_are_all_there_asks_for_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "SECONDS", 0.0)
        patch.setattr("pema.memory.engines.in_process.write_shard", refuse)
        with pytest.raises(StorageError, match="the disk is full"):
            build(tmp_path / "m", 8)
    plm = FakePLM()
    build(tmp_path / "m", 8, plm=plm)
    assert plm.calls == []
    build(tmp_path / "whole", 8)
    assert files(tmp_path / "m") == files(tmp_path / "whole")


KILLED = """
import os, signal, sys
from fake_plm import FakePLM, build
from pema.memory import journal
journal.SECONDS = 0.0

def change(answer, sequence, answers=iter(range(100))):
    if next(answers) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

build(sys.argv[1], 8, plm=FakePLM(change=change))
"""


def test_answers_that_were_written_survive_a_kill(tmp_path):
    code = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "m"], cwd=__file__.rpartition("/")[0], timeout=120
    ).returncode
    assert code == -9
    plm = FakePLM()
    build(tmp_path / "m", 8, plm=plm)
    assert [len(skipped) for skipped in plm.skipped] == [5]


def test_answers_are_written_when_they_are_old_enough(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    sizes = []

    def change(answer, _sequence):
        now[0] += 2
        file = tmp_path / "m" / journal_name(0)
        sizes.append(file.stat().st_size if file.exists() else 0)
        return answer

    build(tmp_path / "m", 8, plm=FakePLM(change=change))
    assert [size > before for before, size in itertools.pairwise(sizes)] == [0, 0, 1, 0, 0, 1, 0]


def interrupted(folder, quota=5, **kind):
    with pytest.raises(OwnerError):
        build(folder, 8, plm=Refusing(quota), **kind)
    return folder / journal_name(0)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_changed_journal_is_used_as_far_as_it_is_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    journal = interrupted(folder / "m")
    content = bytearray(journal.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    journal.write_bytes(content)
    plm = FakePLM()
    build(folder / "m", 8, plm=plm)
    assert plm.skipped == [set()]  # one record holds all that was answered
    build(folder / "whole", 8)
    assert files(folder / "m") == files(folder / "whole")


def test_records_behind_a_cut_one_are_written_over(tmp_path):
    journal = interrupted(tmp_path / "m", 3)
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:-7])
    interrupted(tmp_path / "m", 2)
    plm = FakePLM()
    build(tmp_path / "m", 8, plm=plm)
    assert [len(skipped) for skipped in plm.skipped] == [5]


def of_record(**changes):
    tensors = {
        "indices": torch.tensor([1, 2]),
        "counts": torch.tensor([2, 1]),
        "representations": torch.ones(3, 8),
    } | changes
    return safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (of_record(), 2),
        (of_record(indices=torch.tensor([1, 8])), 0),
        (of_record(indices=torch.tensor([-1, 2])), 0),
        (of_record(indices=torch.tensor([1.0, 2.0])), 0),
        (of_record(counts=torch.tensor([2, 2])), 0),
        (of_record(counts=torch.tensor([3, 0])), 0),
        (of_record(counts=torch.tensor([[2, 1]])), 0),
        (of_record(counts=torch.tensor([3])), 0),
        (of_record(representations=torch.ones(3, 7)), 0),
        (of_record(representations=torch.ones(3, 8).int()), 0),
        (of_record(generated=torch.tensor([1, 2, 3])), 0),
        (of_record(counts=None), 0),
        (b"no tensors", 0),
    ],
)
def test_a_record_that_holds_something_else_is_not_used(tmp_path, content, kept):
    interrupted(tmp_path / "m", 0)
    manifest = Manifest.read(tmp_path / "m")
    journal = Journal(tmp_path / "m", 0, range(8), manifest)
    journal.path.write_bytes(_record(journal._first) + _record(content))
    assert len(Journal(tmp_path / "m", 0, range(8), manifest).answers) == kept
    # Another group, another number of examples, another task: the same bytes are not theirs.
    assert not Journal(tmp_path / "m", 0, range(1, 9), manifest).answers
    assert not Journal(tmp_path / "m", 0, range(9), manifest).answers
    assert not Journal(tmp_path / "m", 0, range(8), replace(manifest, task="song")).answers


def test_an_answer_that_cannot_be_stored_is_asked_for_again(tmp_path):
    def spoil(answer, _sequence):
        f = answer.representations.clone()
        f[0, 0] = torch.nan
        return replace(answer, representations=f)

    with pytest.raises(DataError, match="NaN"):
        build(tmp_path / "m", 8, plm=FakePLM(change=spoil))
    assert not list((tmp_path / "m").glob("*.journal"))
    assert build(tmp_path / "m", 8).examples == 8


def test_an_answer_of_another_shape_is_refused_and_not_kept(tmp_path):
    journal = interrupted(tmp_path / "m", 0)
    manifest = Manifest.read(tmp_path / "m")
    kept = Journal(tmp_path / "m", 0, range(8), manifest)
    for answer in (
        ContextRepresentations(0, torch.ones(2, 7)),
        ContextRepresentations(1, torch.ones(8)),
        ContextRepresentations(2, torch.ones(2, 8), torch.tensor([1, 2])),
    ):
        kept.add(answer)
    kept.flush()
    assert not journal.exists()


def test_a_full_disk_is_an_error_of_storage(tmp_path):
    interrupted(tmp_path / "m", 0)
    kept = Journal(tmp_path / "m", 0, range(8), Manifest.read(tmp_path / "m"))
    kept.path.mkdir()
    kept.add(ContextRepresentations(0, torch.ones(2, 8)))
    with pytest.raises(StorageError, match=r"cannot write .*answers-00000.journal"):
        kept.flush()


def test_a_journal_that_a_killed_build_had_no_time_to_remove_is_removed(tmp_path):
    build(tmp_path / "m", 20)
    before = files(tmp_path / "m")
    for index in (0, 2):
        (tmp_path / "m" / journal_name(index)).write_bytes(b"")
    build(tmp_path / "m", 20)
    assert files(tmp_path / "m") == before


@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_a_real_plm_gives_the_same_bytes_when_it_goes_on(tiny_plm, tmp_path, contexts):
    words = ["the", "house", "dog", "is", "small", "here", "and", "a"]
    examples = [Example(" ".join(words[i % 7 :]), " ".join(words[: 1 + i % 5]), f"data.tsv:{i + 1}") for i in range(12)]

    class Stopping(LocalPLM):
        left = 7

        def represent(self, *arguments, **options):
            return self.some(super().represent(*arguments, **options))

        def predict(self, *arguments, **options):
            return self.some(super().predict(*arguments, **options))

        def some(self, answers):
            for answer in answers:
                self.left -= 1
                if self.left < 0:
                    raise OwnerError("over the quota")
                yield answer

    plm, options = tiny_plm("llama"), {"contexts": contexts, "batch_tokens": 150, "dtype": "float32"}
    stopping = Stopping(plm.model, plm.tokenizer, name=plm.description.name)
    with pytest.raises(OwnerError, match="over the quota"):
        build_memory(stopping, examples, get_task("translation"), tmp_path / "m", **options)
    build_memory(plm, examples, get_task("translation"), tmp_path / "m", **options)
    build_memory(plm, examples, get_task("translation"), tmp_path / "whole", **options)
    assert files(tmp_path / "m") == files(tmp_path / "whole")
