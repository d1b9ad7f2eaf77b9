"""The parts of several processes: each pair in one of them, and together the batches of one process."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from fake_plm import FakePLM, build, some_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.memory.buffer import Batch, Buffer
from pema.memory.reader import View
from pema.memory.verify import verify
from pema.processes import ALONE, Processes

KINDS = {
    "float32": {},
    "int8": {"dtype": "int8"},
    "norm": {"plm": FakePLM(tap="norm_input")},
    "matched": {"contexts": "predicted", "targets": "matched"},
}


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    examples = list({example.source: example for example in some_examples(60)}.values())[:40]
    folder = tmp_path_factory.mktemp("parts")
    return {name: build(folder / name, examples, **kind) for name, kind in KINDS.items()}


def joined(batches):
    return Batch(*(torch.cat([getattr(batch, each.name) for batch in batches]) for each in fields(Batch)))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(KINDS)),
    count=st.integers(2, 5),
    batch_size=st.integers(1, 70),
    seed=st.none() | st.integers(0, 5),
    buffer_bytes=st.sampled_from([1, 300, 3000, 1 << 20]),
    held_out=st.booleans(),
)
def test_the_parts_of_a_batch_are_the_batch(memories, name, count, batch_size, seed, buffer_bytes, held_out):
    memory = memories[name]
    view = memory.split(0.3, 1)[1] if held_out else memory.view()
    how = {"shuffle_seed": seed, "buffer_bytes": buffer_bytes}
    whole = list(view.batches(batch_size, **how))
    parts = [list(view.parts(batch_size, Processes(rank, count), **how)) for rank in range(count)]
    assert {len(each) for each in parts} == {len(whole)}
    for batch, *of_all in zip(whole, *parts, strict=True):
        together = joined([part.batch for part in of_all])
        for each in fields(Batch):
            torch.testing.assert_close(getattr(together, each.name), getattr(batch, each.name), rtol=1e-6, atol=1e-6)
        first = 0
        for part in of_all:
            assert torch.equal(part.rows, batch.rows)
            assert part.first == first or not len(part.batch.rows)
            assert part.weight == len(part.batch.rows) / len(batch.rows)
            first += len(part.batch.rows)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_shares_are_consecutive_examples_of_which_each_is_in_one(memories, count):
    for view in (memories["float32"].view(), *memories["float32"].split(0.3, 1)):
        shares = [view.share(Processes(rank, count)) for rank in range(count)]
        rows = [batch.rows for share in shares for batch in share.batches(7)]
        assert torch.equal(torch.cat(rows), torch.cat([batch.rows for batch in view.batches(7)]))
        sizes = [share.examples for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_process_does_not_read_the_representations_of_the_others(memories, monkeypatch):
    view, read = memories["float32"].view(), []
    fill = View._fill

    def watching(self, buffer, blocks, rest, own):
        buffer.representations.fill_(torch.nan)
        fill(self, buffer, blocks, rest, own)
        read.append(int(buffer.representations.isfinite().all(1).sum()))

    monkeypatch.setattr(View, "_fill", watching)
    for rank in range(2):
        read.clear()
        parts = list(view.parts(8, Processes(rank, 2), shuffle_seed=3))
        own = sum(len(part.batch.rows) for part in parts)
        assert own == sum(read)
        assert abs(2 * own - view.pairs) <= 2 * len(parts)
        assert all(bool(part.batch.representations.isfinite().all()) for part in parts)


def test_several_processes_verify_each_file_once(memories, monkeypatch):
    path, seen = memories["float32"].path, []
    monkeypatch.setattr("pema.memory.verify.sha256", lambda file: seen.append(file.name) or sha256(file))
    from pema.files import sha256

    reports = [verify(path, Processes(rank, 3)) for rank in range(3)]
    together = sorted(seen)
    seen.clear()
    assert reports == [verify(path)] * 3
    assert together == sorted(seen)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_batch_is_restored_on_the_device(memories, name):
    meta, view = torch.device("meta"), memories[name].view()
    for how in ({}, {"shuffle_seed": 1}):
        there = [*view.batches(7, **how, device=meta)]
        parts = [part for rank in (0, 1) for part in view.parts(7, Processes(rank, 2), **how, device=meta)]
        for batch in [*there, *(part.batch for part in parts)]:
            assert batch.representations.device == batch.targets.device == meta
            assert batch.representations.dtype == torch.float32
            assert {each.device.type for each in (batch.steps, batch.source_lengths, batch.rows)} == {"cpu"}
        assert [len(batch.rows) for batch in there] == [len(batch.rows) for batch in view.batches(7, **how)]
    here = next(view.batches(7))
    assert {getattr(here, each.name).device.type for each in fields(Batch)} == {"cpu"}


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_of_pairs_on_the_device_are_those_from_the_disk(memories, name, seed):
    memory = memories[name]
    whole = memory.view()
    fills = whole._fills(7, None, 1 << 20, torch.device("cpu"), ALONE)
    resident = Buffer.joined([filled.buffer.take(which) for filled in fills for which in filled.places()])
    for view in (whole, memory.split(0.3, 1)[0]):
        for read, taken in zip(
            view.batches(7, shuffle_seed=seed, buffer_bytes=300),
            view.batches(7, shuffle_seed=seed, buffer_bytes=300, resident=resident),
            strict=True,
        ):
            for each in fields(Batch):
                assert torch.equal(getattr(read, each.name), getattr(taken, each.name)), each.name


def test_an_empty_view_has_no_batches(memories):
    assert list(View(memories["float32"], np.empty(0, np.int64)).batches(4, shuffle_seed=1)) == []
