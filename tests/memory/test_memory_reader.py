import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_plm import FakePLM, build, rewrite, some_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, ExternalMemoryError
from pema.memory.merge import merge
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.tasks.example import Example


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    examples = list({example.source: example for example in some_examples(90)}.values())[:60]
    return build(tmp_path_factory.mktemp("reader") / "m", examples)


@pytest.fixture(scope="module")
def everything(memory):
    (batch,) = memory.view().batches(100_000)
    return batch


def rows(batches):
    """Each pair as a tuple of bytes and numbers, in the order of the batches."""
    return [
        (f.numpy().tobytes(), int(y), int(t), int(n))
        for batch in batches
        for f, y, t, n in zip(batch.representations, batch.targets, batch.steps, batch.source_lengths, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(1, 70),
    seed=st.none() | st.integers(0, 5),
    buffer_bytes=st.sampled_from([1, 300, 1000, 3000, 1 << 20]),
    part=st.sampled_from(["all", "train", "dev"]),
)
def test_every_pair_comes_once_in_batches_of_the_size(memory, everything, batch_size, seed, buffer_bytes, part):
    view = memory.view() if part == "all" else memory.split(0.3, 1)[part == "dev"]
    batches = list(view.batches(batch_size, shuffle_seed=seed, buffer_bytes=buffer_bytes))
    sizes = [len(batch.targets) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size
    found = rows(batches)
    assert len(found) == view.pairs
    if part == "all":
        expected = rows([everything])
        assert (found == expected) if seed is None else (sorted(found) == sorted(expected))
    else:
        assert set(found) <= set(rows([everything]))
        assert len(set(found)) == len(found)


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
def test_a_split_is_by_example_and_loses_nothing(memory, everything, fraction, seed):
    train, dev = memory.split(fraction, seed)
    assert dev.examples == min(max(round(60 * fraction), 1), 59)
    assert train.examples + dev.examples == 60
    assert train.pairs + dev.pairs == memory.pairs
    assert sorted([*train.selected, *dev.selected]) == list(range(60))
    mine, held_out = rows(train.batches(1000)), rows(dev.batches(1000))
    assert sorted(mine + held_out) == sorted(rows([everything]))
    for view, found in ((train, mine), (dev, held_out)):
        # Whole examples: every example that begins goes on to its end.
        assert sum(t == 0 for _, _, t, _ in found) == view.examples
        following = [t for _, _, t, _ in found]
        assert all(b in (a + 1, 0) for a, b in itertools.pairwise(following))
    again, _ = memory.split(fraction, seed)
    assert (again.selected == train.selected).all()


def test_seeds_give_orders(memory):
    def order(seed, **more):
        return rows(memory.view().batches(16, shuffle_seed=seed, **more))

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(None)
    assert order(1, buffer_bytes=1000) != order(None)


def test_a_small_buffer_still_mixes_distant_places(memory, everything):
    place = {row: k for k, row in enumerate(rows([everything]))}
    order = [place[row] for row in rows(memory.view().batches(8, shuffle_seed=0, buffer_bytes=64 * 16))]
    spread = [max(order[k : k + 64]) - min(order[k : k + 64]) for k in range(0, len(order) - 64, 64)]
    # 64 rows in a buffer come from all over the memory.
    assert np.mean(spread) > 0.7 * memory.pairs
    inside = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert np.mean(inside) > 0.1 * memory.pairs


def test_targets_seen(memory, everything):
    assert memory.view().targets_seen().equal(everything.targets.unique())
    train, dev = memory.split(0.5, 0)
    for view in (train, dev):
        (batch,) = view.batches(10_000)
        assert view.targets_seen().equal(batch.targets.unique())
        assert view.targets_seen().dtype == torch.int64


def test_target_counts(memory, everything):
    counts = memory.view().target_counts()
    assert counts.equal(everything.targets.bincount(minlength=memory.manifest.plm.vocabulary_size))
    (batch,) = memory.split(0.5, 0)[1].batches(10_000)
    assert int(memory.split(0.5, 0)[1].target_counts().sum()) == len(batch.targets)


def test_a_spread_view_has_whole_examples_from_all_over(memory):
    _, held_out = memory.split(0.7, 0)
    for view in (memory.view(), held_out):
        assert view.spread(view.pairs) is view
        for pairs in (1, view.pairs // 3, view.pairs - 1):
            part = view.spread(pairs)
            examples = np.arange(60) if view.selected is None else view.selected
            assert np.isin(part.selected, examples).all()
            assert 1 <= part.examples < view.examples or pairs == view.pairs - 1
            assert part.pairs <= max(1.5 * pairs, 20)
        gaps = np.diff(np.searchsorted(examples, view.spread(view.pairs // 3).selected))
        assert gaps.max() - gaps.min() <= 1


def test_counts_and_head(memory):
    assert memory.pairs == memory.view().pairs == len(rows(memory.view().batches(100)))
    assert memory.examples == memory.view().examples == 60
    assert memory.d == 8
    assert memory.head().fingerprint == FakePLM().head().fingerprint
    assert Memory.open(str(memory.path)).manifest == memory.manifest


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5])
def test_a_fraction_that_is_none_is_refused(memory, fraction):
    with pytest.raises(ConfigError, match=r"dev_fraction=.* is too (small|large)"):
        memory.split(fraction, 0)


def test_one_example_cannot_be_split(tmp_path):
    with pytest.raises(ConfigError, match="m contains 1 example: a split needs at least two"):
        build(tmp_path / "m", 1).split(0.5, 0)


def test_an_empty_batch_is_refused_at_once(memory):
    with pytest.raises(ConfigError, match="batch_size=0 is too small: it must be at least 1"):
        memory.view().batches(0)


def test_what_is_no_memory_is_refused(tmp_path):
    with pytest.raises(
        ExternalMemoryError, match=r"nowhere is not a memory \(it has no manifest.json\): check the path"
    ):
        Memory.open(tmp_path / "nowhere")
    for text in ("{", "[]", '"format"'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ExternalMemoryError, match=r"manifest.json is damaged \(not the manifest of a memory: it"):
            Memory.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 1}')
    with pytest.raises(ExternalMemoryError, match="has format 'other', expected 'pema-memory'"):
        Memory.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "pema-memory", "version": 2}')
    with pytest.raises(ExternalMemoryError, match="has format version 2, this pema reads version 1"):
        Memory.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "pema-memory", "version": 1, "plm": {}}')
    with pytest.raises(ExternalMemoryError, match=r"is damaged: 'plm.name' is missing. To fix it, restore"):
        Memory.open(tmp_path)


def test_a_missing_or_cut_file_is_refused_when_opened(tmp_path):
    build(tmp_path / "m")
    path = tmp_path / "m" / "shard-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ExternalMemoryError, match=r"shard-00001.safetensors is damaged \([\d,]+ bytes, expected"):
        Memory.open(tmp_path / "m")
    path.unlink()
    with pytest.raises(ExternalMemoryError, match=r"shard-00001.safetensors is missing"):
        Memory.open(tmp_path / "m")


def spoil(folder, name, position, value):
    """Overwrite bytes of a shard's tensor (or, with name None, of its file)."""
    memory = Memory.open(folder)
    start = 0 if name is None else memory.shards[1].starts[name]
    with memory.shards[1].path.open("r+b") as file:
        file.seek(start + position)
        file.write(value)


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        (None, 0, b"\xff\xff\xff\xff", "its header is longer than the file"),
        (None, 8, b"[", "its header cannot be read"),
        (None, 12, b"xxx", "its tensors do not match the manifest"),
        ("example_offsets", 8, b"\xff\xff", "its example offsets do not increase from 0 to the number of pairs"),
        ("targets", 0, b"\x00\x00\x00\x80", "a target is outside the vocabulary of 101 tokens"),
        ("targets", 0, b"\x65\x00\x00\x00", "a target is outside the vocabulary of 101 tokens"),
    ],
)
def test_a_damaged_shard_is_named_while_reading(tmp_path, name, position, value, message):
    build(tmp_path / "m")
    spoil(tmp_path / "m", name, position, value)
    with pytest.raises(ExternalMemoryError, match=rf"shard-00001.safetensors is damaged \({message}"):
        list(Memory.open(tmp_path / "m").view().batches(10))


def test_tensors_that_overlap_are_refused(tmp_path):
    build(tmp_path / "m")
    path = tmp_path / "m" / "shard-00001.safetensors"
    data = path.read_bytes()
    place = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
    path.write_bytes(data[:place] + b"1" + data[place + 1 :])
    with pytest.raises(ExternalMemoryError, match=r"the offsets of .* in it are wrong"):
        list(Memory.open(tmp_path / "m").view().batches(10))


def test_a_shard_that_goes_while_it_is_read_is_named(tmp_path):
    memory = build(tmp_path / "m")
    batches = memory.view().batches(1, buffer_bytes=1)
    next(batches)
    (tmp_path / "m" / "shard-00003.safetensors").unlink()
    with pytest.raises(ExternalMemoryError, match=r"shard-00003.safetensors is damaged \(No such file"):
        list(batches)
    other = Memory(tmp_path / "m", memory.manifest)
    _ = other.shards[1].starts
    os.truncate(other.shards[1].path, 0)
    with pytest.raises(ExternalMemoryError, match=r"shard-00001.safetensors is damaged \(mmap length"):
        other.shards[1].targets(0, 1)


def test_a_head_of_another_plm_is_refused(tmp_path):
    memory = build(tmp_path / "m")
    rewrite(tmp_path / "m", plm=replace(memory.manifest.plm, head_fingerprint="0" * 64))
    with pytest.raises(ExternalMemoryError, match="head is not the head of fake"):
        Memory.open(tmp_path / "m").head()


@pytest.fixture
def large(tmp_path):
    """A memory of 450 MB that takes 8 MB of disk: its shards are links to one file."""
    folder = tmp_path / "m"
    memory = build(folder, 300, plm=FakePLM(d=1024), examples_per_shard=300)
    (shard,) = memory.manifest.shards
    copies = -(-450_000_000 // shard.bytes)
    names = [f"shard-{k:05d}.safetensors" for k in range(copies)]
    for name in names[1:]:
        os.link(folder / shard.file, folder / name)
    rewrite(folder, shards=tuple(replace(shard, file=name) for name in names), inputs=memory.manifest.inputs * copies)
    return folder


LIMITED = r"""
import pathlib, re, resource, sys
import torch
torch.set_num_threads(1)
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.memory.merge import merge
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.tasks.example import Example

memory = Memory.open(sys.argv[1])
A = torch.zeros(16, 1024, requires_grad=True)
(torch.zeros(512, 1024) @ A.T).square().mean().backward()
torch.optim.Adam([A], fused=True)  # imports much code on first use
for limit, account in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
    status = pathlib.Path("/proc/self/status").read_text()
    allowed = int(re.search(account + r":\s+(\d+) kB", status)[1]) * 1024 + 400_000_000
    resource.setrlimit(limit, (allowed, allowed))
try:
    bytearray(memory.bytes)
except MemoryError:
    config = preset("paper", rank=16, epochs=1, batch_size=2048, dev_fraction=0.05)
    _, figures = train(memory, config, pathlib.Path(sys.argv[2]))
    sys.stdout.write(f"{figures['pairs'] + figures['held_out_pairs'] == memory.pairs} {memory.bytes}")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_a_memory_larger_than_the_limit_on_ram_trains(large, tmp_path):
    """The limits bind data and address space, so that neither copies nor maps of the whole memory fit."""
    done = subprocess.run([sys.executable, "-c", LIMITED, large, tmp_path / "adapter"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, size = done.stdout.split()
    assert whole == "True"
    assert int(size) >= 450_000_000


def test_the_targets_of_a_source_are_never_split(tmp_path):
    """Not in a build, whose shards end inside a source, nor after sampling, appending and merging."""
    several = [Example("abcdefg"[i % 7] * (i // 7 + 1), "gh", alternatives=("h", "fg")) for i in range(20)]
    apart = [Example("abcdefg"[i % 7] * (i // 7 + 1), "f") for i in range(60)]  # the first 20 sources are the same
    memory = build(tmp_path / "m", several)
    assert [shard.entry.sources for shard in memory.shards] == [True] * 8
    build(tmp_path / "m", several[:3], append=True)
    plain = build(tmp_path / "plain", apart)
    assert not any(shard.entry.sources for shard in plain.shards)
    merged = merge([tmp_path / "m", tmp_path / "plain"], tmp_path / "merged")
    sampled = sample(tmp_path / "merged", tmp_path / "sampled", merged.pairs * 2 // 3)
    sources = [example.source for example in [*several, *several[:3]] for _ in range(3)]
    for one, all_sources in ((memory, sources[:60]), (Memory.open(tmp_path / "m"), sources)):
        for seed in range(5):
            train, held_out = one.split(0.3, seed)
            assert train.examples + held_out.examples == one.examples
            assert not {all_sources[i] for i in train.selected} & {all_sources[i] for i in held_out.selected}
    for path in ("m", "plain", "merged", "sampled"):
        verify(tmp_path / path)
    train, held_out = merged.split(0.5, 0)
    of = {i: sources[i] if i < len(sources) else i for i in range(merged.examples)}
    assert not {of[i] for i in train.selected} & {of[i] for i in held_out.selected}
    train, held_out = sampled.split(0.5, 0)
    assert train.examples + held_out.examples == sampled.examples
    text = (tmp_path / "merged" / "manifest.json").read_text(encoding="utf-8")
    assert text.count('"sources": true') == 10
    (tmp_path / "merged" / "manifest.json").write_text(text.replace('"sources": true', '"sources": false', 1))
    with pytest.raises(ExternalMemoryError, match="is damaged"):
        Memory.open(tmp_path / "merged")
