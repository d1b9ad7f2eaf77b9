import errno
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_plm import FakePLM, build, files, some_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, ExternalMemoryError, MismatchError, StorageError
from pema.memory.merge import merge
from pema.memory.reader import Memory
from pema.memory.sample import draw, sample
from pema.memory.verify import verify


def rows(memory):
    (batch,) = memory.view().batches(100_000)
    return batch


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_merged_memory_holds_all_in_order(tmp_path, dtype):
    parts = [build(tmp_path / f"{k}", some_examples(10 + k, seed=k), dtype=dtype) for k in range(3)]
    merged = merge([part.path for part in parts], tmp_path / "all")
    verify(tmp_path / "all")
    assert merged.examples == sum(part.examples for part in parts)
    assert merged.pairs == sum(part.pairs for part in parts)
    for name in ("representations", "targets", "steps", "source_lengths"):
        assert getattr(rows(merged), name).equal(torch.cat([getattr(rows(part), name) for part in parts]))
    assert len(merged.manifest.inputs) == 3
    # What is merged can be appended to.
    assert build(tmp_path / "all", some_examples(5, seed=9), dtype=dtype, append=True).examples == merged.examples + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plm": FakePLM(name="other")}, "b belongs to another PLM: it was made with other"),
        ({"plm": FakePLM(tap="norm_input")}, "b belongs to another LM head"),
        ({"dtype": "int8"}, "b was built with dtype 'int8', here it is 'float16'"),
        ({"contexts": "predicted"}, "b was built with contexts 'predicted', here it is 'teacher'"),
    ],
)
def test_memories_that_do_not_belong_together_are_refused_by_name(tmp_path, change, message):
    build(tmp_path / "a", 5)
    build(tmp_path / "b", 6, **change)
    with pytest.raises(MismatchError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_one_memory_or_the_same_twice_is_refused(tmp_path):
    build(tmp_path / "a", 5)
    with pytest.raises(ConfigError, match="merge needs at least two memories, got 1"):
        merge([tmp_path / "a"], tmp_path / "c")
    with pytest.raises(ConfigError, match="is given twice: its pairs would count twice"):
        merge([tmp_path / "a", tmp_path / "x" / ".." / "a"], tmp_path / "c")


def test_an_output_that_exists_is_refused(tmp_path):
    for name in "ab":
        build(tmp_path / name, 5 + ord(name))
    for act in (
        lambda: merge([tmp_path / "a", tmp_path / "b"], tmp_path / "a"),
        lambda: sample(tmp_path / "a", tmp_path / "b", 10),
    ):
        with pytest.raises(ConfigError, match="exists already: choose another folder for the new memory"):
            act()


def test_a_damaged_memory_is_not_merged(tmp_path):
    for name in "ab":
        build(tmp_path / name, 5 + ord(name))
    path = tmp_path / "b" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ExternalMemoryError, match=r"b/shard-00001.safetensors is damaged \(changed since it was"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_full_disk_leaves_no_half_memory(tmp_path, monkeypatch):
    for name in "ab":
        build(tmp_path / name, 5 + ord(name))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(StorageError, match=r"cannot write .*c: No space left on device"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(StorageError, match=r"cannot write .*c: No space left on device"):
        sample(tmp_path / "a", tmp_path / "c", 10)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    pairs=st.integers(0, 300),
    seed=st.integers(0, 20),
)
def test_a_draw_fits_and_leaves_no_room_for_another(lengths, pairs, seed):
    chosen = draw(np.array(lengths), pairs, seed)
    taken = sum(lengths[k] for k in chosen)
    assert sorted(set(chosen)) == list(chosen)
    assert taken <= pairs
    left = [length for k, length in enumerate(lengths) if k not in chosen]
    assert all(taken + length > pairs for length in left)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_sample_holds_whole_examples_as_they_are_stored(tmp_path, dtype):
    # Sources that differ, so that no two contexts share a representation.
    examples = [replace(one, source=f"{one.source}{k:02d}") for k, one in enumerate(some_examples(60))]
    memory = build(tmp_path / "m", examples, dtype=dtype)
    drawn = sample(tmp_path / "m", tmp_path / "s", pairs=100, seed=3)
    verify(tmp_path / "s")
    assert 90 <= drawn.pairs <= 100
    mine, whole = rows(drawn), rows(memory)
    place = {row.numpy().tobytes(): k for k, row in enumerate(whole.representations)}
    where = torch.tensor([place[row.numpy().tobytes()] for row in mine.representations])
    for name in ("targets", "steps", "source_lengths"):
        assert getattr(mine, name).equal(getattr(whole, name)[where])
    assert int((mine.steps == 0).sum()) == drawn.examples
    assert int((mine.targets == 2).sum()) == drawn.examples


def test_a_seed_names_a_sample(tmp_path):
    build(tmp_path / "m", 60)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(tmp_path / "m", tmp_path / name, pairs=100, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_a_sample_as_large_as_the_memory_is_the_memory(tmp_path):
    memory = build(tmp_path / "m", 20)
    assert sample(tmp_path / "m", tmp_path / "s", pairs=10_000).pairs == memory.pairs
    assert rows(Memory.open(tmp_path / "s")).representations.equal(rows(memory).representations)


def test_too_few_pairs_are_refused(tmp_path):
    build(tmp_path / "m", 20)
    with pytest.raises(ConfigError, match=r"pairs=1 is less than the \d pairs of the shortest example"):
        sample(tmp_path / "m", tmp_path / "s", pairs=1)


def test_a_damaged_memory_is_not_drawn_from(tmp_path):
    build(tmp_path / "m", 40)
    data = bytearray((tmp_path / "m" / "shard-00001.safetensors").read_bytes())
    data[-200] ^= 1
    (tmp_path / "m" / "shard-00001.safetensors").write_bytes(bytes(data))
    with pytest.raises(ExternalMemoryError, match=r"shard-00001.safetensors is damaged \(changed since it was written"):
        sample(tmp_path / "m", tmp_path / "s", 10_000)
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_memories_are_for_their_owner_alone(tmp_path):
    before = os.umask(0o022)
    try:
        build(tmp_path / "a", 20)
        build(tmp_path / "b", 5)
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
        sample(tmp_path / "a", tmp_path / "s", 50)
    finally:
        os.umask(before)
    for name in "abcs":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
        shards = (tmp_path / name).glob("*")
        assert {stat.S_IMODE(p.stat().st_mode) for p in shards if p.is_file()} == {0o600}
