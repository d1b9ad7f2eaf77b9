import errno
import pathlib
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_plm import EOS, FakePLM, FakeTask, FakeTemplate, build, files, some_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pema.errors import ConfigError, DataError, OwnerError, StorageError
from pema.memory import planning
from pema.memory.manifest import Input, Manifest
from pema.memory.reader import Memory
from pema.memory.shard import DTYPES, channel_scales_of, restore, store
from pema.memory.verify import verify
from pema.tasks.example import Example, Turn

finite = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-60000, 60000, width=32))


@settings(deadline=None)
@given(finite)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_come_back_as_rounded_once(dtype, values):
    f = torch.from_numpy(values)
    stored, scales = store(f, dtype, str)
    assert scales is None
    assert stored.dtype == DTYPES[dtype]
    assert restore(stored, scales).equal(f.to(DTYPES[dtype]).float())


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_int8_is_off_by_half_a_scale_at_most(values):
    f = torch.from_numpy(values)
    channels = channel_scales_of(f)
    squares = f.double().square().mean(0).sqrt()
    torch.testing.assert_close(channels.double(), torch.where(squares > 0, squares, 1.0), rtol=1e-6, atol=2e-38)
    stored, scales = store(f, "int8", str, channels)
    assert stored.dtype == torch.int8
    assert scales.equal((f / channels).abs().amax(1) / 127)
    off = (restore(stored, scales, channels).double() - f.double()).abs()
    # A scale below the smallest normal float32 has fewer bits.
    assert (off <= (scales.double()[:, None] * 0.5001 + 2e-38) * channels.double() + 1e-36).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_memory_gives_back_what_was_stored(tmp_path, dtype):
    memory = build(tmp_path / "m", dtype=dtype)
    (exact,) = build(tmp_path / "exact", dtype="float32").view().batches(10_000)
    (batch,) = memory.view().batches(10_000)
    assert batch.representations.dtype == torch.float32
    assert batch.targets.dtype == batch.steps.dtype == batch.source_lengths.dtype == torch.int64
    first = exact.representations[: memory.manifest.shards[0].pairs]
    channels = channel_scales_of(first) if dtype == "int8" else None
    assert all(shard.channel_scales is None or shard.channel_scales.equal(channels) for shard in memory.shards)
    assert batch.representations.equal(restore(*store(exact.representations, dtype, str, channels), channels))
    assert batch.targets.equal(exact.targets)
    assert memory.bytes == sum(len(data) for name, data in files(tmp_path / "m").items() if name.startswith("shard"))


def test_batches_are_what_the_head_reads(tmp_path):
    plm = FakePLM(tap="norm_input")
    memory = build(tmp_path / "m", plm=plm, dtype="float32")
    (raw,) = build(tmp_path / "raw", dtype="float32").view().batches(10_000)
    for seed in (None, 3):
        for batch in memory.view().batches(10_000, shuffle_seed=seed):
            assert batch.representations.sum().item() == pytest.approx(
                plm.head().normalise(raw.representations).sum().item(), rel=1e-4
            )
    assert batch.representations.shape[1] == memory.d


def test_limit_uses_the_first_examples(tmp_path):
    build(tmp_path / "limited", some_examples(40), limit=11)
    build(tmp_path / "short", some_examples(40)[:11])
    assert files(tmp_path / "limited") == files(tmp_path / "short")


def test_groups_end_before_their_representations_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_BYTES", 20 * 8 * 2)
    memory = build(tmp_path / "m", 40)
    assert all(entry.pairs <= 20 or entry.examples == 1 for entry in memory.manifest.shards)
    assert max(entry.examples for entry in memory.manifest.shards) > 1
    (batch,) = memory.view().batches(10_000)
    (same,) = build(tmp_path / "one", 40, examples_per_shard=100).view().batches(10_000)
    assert batch.representations.equal(same.representations)


def test_batch_tokens_reach_the_plm(tmp_path):
    plm = FakePLM()
    build(tmp_path / "m", 3, plm=plm, batch_tokens=77)
    assert plm.calls[0][2] == 77


def broken_at(source, f=None, **changes):
    """A PLM that spoils the answer for the example with this source."""
    ids = (1, *FakeTemplate.ids(source), 3)

    def change(answer, sequence):
        if tuple(sequence[: len(ids)]) != ids:
            return answer
        return replace(answer, representations=f(answer.representations), **changes) if f else None

    return FakePLM(change=change)


def put(value):
    def change(f):
        f = f.clone()
        f[-1, 2] = value
        return f

    return change


EXAMPLES = [Example("abc" + "defg"[k % 4] * (k // 4 + 1), "hgf", f"data.tsv:{k + 1}") for k in range(20)]
SPOILED = EXAMPLES[13]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_nan_or_infinity_names_the_example(tmp_path, value, dtype):
    with pytest.raises(DataError, match=r"^data.tsv:14: the PLM's representation contains NaN or infinity"):
        build(tmp_path / "m", EXAMPLES, plm=broken_at(SPOILED.source, put(value)), dtype=dtype)
    assert [entry.examples for entry in Manifest.read(tmp_path / "m").shards] == [8]


def test_overflow_names_the_example_and_the_remedy(tmp_path):
    plm = broken_at(SPOILED.source, put(-70000.0))
    with pytest.raises(
        ConfigError, match=r"data.tsv:14: .* reaches 7e\+04, more than the maximum of float16 .*use dtype bfloat16"
    ):
        build(tmp_path / "m", EXAMPLES, plm=plm)
    for dtype in ("bfloat16", "int8", "float32"):
        (batch,) = build(tmp_path / dtype, EXAMPLES, plm=plm, dtype=dtype).view().batches(1000)
        assert batch.representations.min().item() == pytest.approx(-70000, rel=0.01)


@pytest.mark.parametrize(
    ("plm", "message"),
    [
        (broken_at(SPOILED.source), "fake did not answer for data.tsv:14"),
        (
            broken_at(SPOILED.source, lambda f: f[:-1]),
            r"data.tsv:14 with representations of shape \(3, 8\), expected \(4, 8",
        ),
        (broken_at(SPOILED.source, lambda f: f[:, :5]), r"data.tsv:14 with representations of shape \(4, 5\)"),
        (broken_at(SPOILED.source, lambda f: f, index=0), "fake answered for sequence 0 of 8, which was not requested"),
        (broken_at(SPOILED.source, lambda f: f, index=8), "fake answered for sequence 8 of 8, which was not requested"),
    ],
)
def test_a_plm_that_breaks_the_contract_is_named(tmp_path, plm, message):
    with pytest.raises(OwnerError, match=message):
        build(tmp_path / "m", EXAMPLES, plm=plm)


@pytest.mark.parametrize("generated", [None, torch.tensor([5])])
def test_a_plm_without_its_generated_tokens_is_named(tmp_path, generated):
    plm = broken_at(SPOILED.source, lambda f: f.repeat(2, 1), generated=generated)
    with pytest.raises(OwnerError, match="did not return one generated token per predicted context"):
        build(tmp_path / "m", EXAMPLES, plm=plm, contexts="predicted")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("a", "", "x.tsv:3"), "^x.tsv:3: the target tokenises to nothing: fill it in"),
        (Example("a", ""), "^example 3: the target tokenises to nothing"),
        (
            Example("a" * 60, "bcd", "x.tsv:3"),
            r"^x.tsv:3: prompt \(62 tokens\) and target \(4\) are longer than the 64 tok",
        ),
    ],
)
@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_an_unusable_example_is_named_before_anything_is_written(tmp_path, example, message, contexts):
    plm = FakePLM()
    with pytest.raises(DataError, match=message):
        build(tmp_path / "m", [*some_examples(2), example], plm=plm, contexts=contexts)
    assert plm.calls == []
    assert not (tmp_path / "m").exists()


def test_a_token_outside_the_vocabulary_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeTemplate, "ids", staticmethod(lambda text: (101,)))
    with pytest.raises(DataError, match=r"data.tsv:1: token 101 is outside the vocabulary of fake \(101 tokens\)"):
        build(tmp_path / "m", 2)


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(DataError, match="there are no examples to build a memory from"):
        build(tmp_path / "m", [])


@pytest.mark.parametrize("name", ["limit", "batch_tokens", "examples_per_shard"])
def test_settings_below_one_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}=0 is too small: it must be at least 1"):
        build(tmp_path / "m", **{name: 0})


@pytest.mark.parametrize("name", ["contexts", "targets", "dtype"])
def test_unknown_settings_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"unknown {name} 'other': use "):
        build(tmp_path / "m", **{name: "other"})


def test_a_setting_that_does_not_exist_is_refused_with_the_one_it_resembles(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown setting 'limt' of BuildConfig: .*did you mean 'limit'"):
        build(tmp_path / "m", limt=3)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("Dear")
    with pytest.raises(ConfigError, match="file is a file: choose a folder"):
        build(tmp_path / "file")
    with pytest.raises(ConfigError, match="folder contains files but no memory: choose another folder"):
        build(tmp_path / "folder")
    assert files(tmp_path / "folder") == {"letter.txt": b"Dear"}
    (tmp_path / "empty").mkdir()
    assert build(tmp_path / "empty").examples == 40


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    write, left = pathlib.Path.write_bytes, iter([True] * 3)

    def full(path, data):
        if next(left, None) is None:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(StorageError, match=r"cannot write .*shard-00003.safetensors: No space left on device"):
            build(tmp_path / "m")
    assert len(Manifest.read(tmp_path / "m").shards) == 3
    assert not list((tmp_path / "m").rglob("*.partial"))
    build(tmp_path / "m")
    build(tmp_path / "whole")
    assert files(tmp_path / "m") == files(tmp_path / "whole")


def test_the_systems_own_limit_is_a_storage_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*shard-00000.safetensors: File too large"):
            build(tmp_path / "m", 40, dtype="float32", examples_per_shard=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Manifest.read(tmp_path / "m").shards == ()


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.text("abcé", min_size=1, max_size=5), st.text("abü", min_size=1, max_size=9)), min_size=1
    ),
    per_shard=st.integers(1, 7),
    contexts=st.sampled_from(["teacher", "predicted"]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_input_makes_a_memory_that_verifies(tmp_path_factory, words, per_shard, contexts, dtype):
    folder = tmp_path_factory.mktemp("any") / "m"
    examples = [Example(source, target) for source, target in words]
    memory = build(folder, examples, examples_per_shard=per_shard, contexts=contexts, dtype=dtype)
    report = verify(folder)
    assert (report.examples, report.pairs) == (len(words), memory.pairs)
    (batch,) = memory.view().batches(10_000)
    assert int((batch.steps == 0).sum()) == len(words)
    encoded = FakeTask().template.encode(None, examples)
    starts = torch.nonzero(batch.steps == 0)[:, 0].tolist()
    for one, start in zip(encoded, starts, strict=True):
        assert batch.targets[start] == one.target[0]
        assert batch.source_lengths[start] == one.source_length
    if contexts == "teacher":
        assert int((batch.targets == EOS).sum()) == len(words)


def test_a_real_plm_gives_the_memory_its_own_logits(tmp_path, tiny_plm):
    from pema.memory.build import build_memory
    from pema.tasks.registry import get_task

    for tap in ("head_input", "norm_input"):
        plm = tiny_plm("opt-projected" if tap == "norm_input" else "llama", tap=tap)
        examples = [Example("the house is small", "das Haus ist klein"), Example("the dog", "der Hund")]
        memory = build_memory(plm, examples, get_task("translation"), tmp_path / tap, dtype="float32")
        head = memory.head()
        (batch,) = memory.view().batches(1000)
        encoded = get_task("translation").template.encode(plm.tokenizer, examples)
        start = 0
        for one in encoded:
            ids = torch.tensor([one.prompt + one.target])
            logits = plm.model(ids).logits[0, len(one.prompt) - 1 : -1]
            mine = head.logits(batch.representations[start : start + len(one.target)])
            assert (mine - logits).abs().max() < 1e-4
            assert batch.targets[start : start + len(one.target)].tolist() == list(one.target)
            start += len(one.target)
        assert start == memory.pairs
        assert Memory.open(tmp_path / tap).d == head.d


def test_every_target_of_a_source_is_stored(tmp_path):
    several = [Example("abc", "h", "x:1", alternatives=("gf", "hgf")), Example("de", "f", "x:2")]
    apart = [Example("abc", "h"), Example("abc", "gf"), Example("abc", "hgf"), Example("de", "f")]
    assert files(build(tmp_path / "a", several).path) == files(build(tmp_path / "b", apart).path)
    (tmp_path / "c").mkdir()
    assert build(tmp_path / "c", several, limit=1).examples == 3


def test_a_history_makes_another_input():
    turns = Turn("system", "Be brief."), Turn("user", "Hello!")
    examples = [[Example("a", "b", history=turns[:n])] for n in range(3)]
    examples += [[Example("a", "b", history=(turns[1], turns[0]))], [Example("system", "Be brief."), Example("a", "b")]]
    assert len({Input.of(each, 8).sha256 for each in examples}) == len(examples)
