import numpy as np
import pytest
import torch
from fake_plm import FakePLM, FakeTask, build, g, some_examples
from tests.hostile import change_tensors, read, sign_manifest, sign_memory

from pema.errors import ExternalMemoryError
from pema.memory import encoder
from pema.memory.merge import merge
from pema.memory.prompts import BLANK
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.tasks.spelling import Speller

WHOLE = (0, 0)
SHARD = "shard-00001.safetensors"


def encoded(examples):
    return FakeTask().template.encode(None, examples)


def known(row):
    return row[row != BLANK].tolist()


def require_tokens(memory, examples, text):
    """Every pair's tokens are those of its example: `text(example, t)` is what follows the prompt at step t."""
    speller, at = Speller(FakePLM().tokenizer), 0
    batch = next(memory.view().batches(10_000))
    found = memory.prompts.at(batch.rows, WHOLE)
    spelled = 0
    for example in examples:
        t = 0
        while at < len(batch.rows) and batch.steps[at] == t:
            spellings = speller(example.prompt)
            assert known(found.prompt[at]) == list(example.prompt)
            n = len(example.prompt)
            assert found.spellings[at, :n].tolist() == [s.token for s in spellings]
            assert found.spans[at, :n].tolist() == [s.span for s in spellings]
            assert not found.spans[at, n:].any()
            assert (found.spellings[at, n:] == BLANK).all()
            written = text(example, t)
            assert known(found.written[at]) == written
            assert (found.written[at, found.written.shape[1] - t :]).tolist() == written
            spelled += sum(s.span for s in spellings)
            at, t = at + 1, t + 1
        assert t
    assert at == memory.pairs
    assert spelled


def generated(example, t):
    """What the PLM has generated after t steps."""
    text = []
    while len(text) < t:
        text.append(g([*example.prompt, *text]))
    return text


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_teacher_contexts_consist_of_prompts_and_targets(tmp_path, dtype):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, dtype=dtype)
    require_tokens(memory, encoded(examples), lambda example, t: list(example.target[:t]))
    assert memory.prompts.frame == (1, 1)
    verify(tmp_path / "m")


@pytest.mark.parametrize("targets", ["position", "aligned"])
def test_predicted_contexts_consist_of_prompts_and_the_plms_text(tmp_path, targets):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, contexts="predicted", targets=targets)
    require_tokens(memory, encoded(examples), generated)
    sampled = sample(tmp_path / "m", tmp_path / "s", memory.pairs // 2)
    verify(tmp_path / "s")
    rows = next(sampled.view().batches(10_000)).rows
    assert sampled.prompts.at(rows, WHOLE).written.shape[1]


def test_shuffled_rows_name_the_same_pairs(tmp_path):
    memory = build(tmp_path / "m", 30)
    plain = next(memory.view().batches(10_000))
    assert plain.rows.tolist() == list(range(memory.pairs))
    train, held_out = memory.split(0.3, 0)
    rows = []
    for view in (train, held_out):
        for batch in view.batches(7, shuffle_seed=3, buffer_bytes=300):
            assert torch.equal(plain.representations[batch.rows], batch.representations)
            assert torch.equal(plain.targets[batch.rows], batch.targets)
            assert torch.equal(plain.steps[batch.rows], batch.steps)
            rows += batch.rows.tolist()
    assert sorted(rows) == list(range(memory.pairs))


def test_append_merge_and_sample_keep_the_prompts(tmp_path):
    first, second = some_examples(12), some_examples(10, seed=1)
    build(tmp_path / "a", first)
    build(tmp_path / "b", second)
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    require_tokens(merged, encoded(first + second), lambda example, t: list(example.target[:t]))
    appended = build(tmp_path / "a", second, append=True)
    require_tokens(appended, encoded(first + second), lambda example, t: list(example.target[:t]))
    sampled = sample(tmp_path / "merged", tmp_path / "s", merged.pairs // 2)
    batch = next(sampled.view().batches(10_000))
    tokens = sampled.prompts.at(batch.rows, WHOLE)
    whole = {tuple(example.prompt): example.target for example in encoded(first + second)}
    for i, step in enumerate(batch.steps.tolist()):
        target = whole[tuple(known(tokens.prompt[i]))]
        assert batch.targets[i] == target[step]
        assert known(tokens.written[i]) == list(target[:step])


def test_memories_of_earlier_versions_have_no_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder.Encoder, "_prompts", lambda *_: None)
    old = build(tmp_path / "old", 12)
    monkeypatch.undo()
    assert "prompts" not in (tmp_path / "old" / "manifest.json").read_text()
    verify(tmp_path / "old")
    assert sum(len(batch.rows) for batch in old.view().batches(5)) == old.pairs
    words = "does not contain its prompts, because an earlier version of pema built"
    with pytest.raises(ExternalMemoryError, match=words):
        _ = old.prompts
    # What is appended has them; the whole has not.
    mixed = build(tmp_path / "old", some_examples(10, seed=1), append=True)
    verify(tmp_path / "old")
    with pytest.raises(ExternalMemoryError, match=words):
        _ = mixed.prompts
    assert sample(tmp_path / "old", tmp_path / "s", 60).pairs


def test_prompts_of_another_version_are_refused(tmp_path):
    build(tmp_path / "m", 12)
    values = read(tmp_path / "m" / "manifest.json")
    values["shards"][1]["prompts"]["version"] = 2
    sign_manifest(tmp_path / "m", values)
    with pytest.raises(
        ExternalMemoryError, match="prompts of version 2, this pema reads version 1: use the pema version"
    ):
        Memory.open(tmp_path / "m")


def test_an_impossible_number_of_tokens_is_refused(tmp_path):
    build(tmp_path / "m", 12)
    values = read(tmp_path / "m" / "manifest.json")
    values["shards"][0]["prompts"]["tokens"] = 3
    sign_manifest(tmp_path / "m", values)
    with pytest.raises(ExternalMemoryError, match=r"shards\[0\] cannot have 3 tokens in 8 prompts"):
        Memory.open(tmp_path / "m")


DAMAGES = [
    ("prompt_offsets", 1, 0, "prompt offsets do not increase"),
    ("prompt_tokens", 2, 10**6, "a token of a prompt is outside the vocabulary of 101"),
    ("prompt_tokens", 2, -1, "a token of a prompt is outside the vocabulary"),
    ("prompt_spellings", 2, -2, "a token of a prompt is outside the vocabulary"),
    ("prompt_spellings", 0, 5, "a spelling ends outside its prompt"),
    ("prompt_spans", -1, 9, "a spelling ends outside its prompt"),
    ("written", 0, 101, "a token of a prompt is outside the vocabulary"),
]


@pytest.mark.parametrize(("name", "place", "value", "words"), DAMAGES)
def test_impossible_prompts_are_refused(tmp_path, name, place, value, words):
    build(tmp_path / "m", 16, contexts="predicted")

    def change(tensors):
        tensors[name][place] = value

    change_tensors(tmp_path / "m" / SHARD, change)
    sign_memory(tmp_path / "m")
    memory = Memory.open(tmp_path / "m")
    with pytest.raises(ExternalMemoryError, match=words):
        _ = memory.prompts
    with pytest.raises(ExternalMemoryError, match=words):
        verify(tmp_path / "m")


def test_the_cost_is_nine_bytes_a_token(tmp_path):
    examples = some_examples(8)
    memory = build(tmp_path / "m", examples)
    tokens = sum(len(example.prompt) for example in encoded(examples))
    (entry,) = memory.manifest.shards
    assert entry.prompts.tokens == tokens
    assert memory.manifest.prompt_bytes(entry) == 9 * tokens + 8 * 9
    prompts = memory.shards[0].contents().prompts.tensors()
    assert sum(tensor.numpy().nbytes for tensor in prompts.values()) == memory.manifest.prompt_bytes(entry)
    assert np.array_equal(prompts["prompt_offsets"][-1], tokens)
