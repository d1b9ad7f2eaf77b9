"""On-policy rounds: equal to a slow obvious loop, resumed after a kill, and without a target at the PLM's owner."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_copying_generation import slow
from test_on_policy import Recorded, ended

import pema
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.adapter.training import train
from pema.errors import ConfigError, MismatchError
from pema.generation import rounds as rounds_module
from pema.generation.on_policy import OnPolicy
from pema.generation.rounds import adapt, build_in_rounds
from pema.memory.build import build_memory
from pema.memory.config import BuildConfig, require_rounds
from pema.memory.encoding import Tokens
from pema.memory.manifest import Manifest
from pema.memory.merge import merge
from pema.memory.pairing import pair
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TASK = get_task("translation")
EXAMPLES = [Example(f"the house {i}", f"das Haus {i} ist klein") for i in range(8)]
BUILD = BuildConfig(contexts="predicted", targets="matched", dtype="float32", examples_per_shard=3)
TAUGHT = replace(BUILD, contexts="teacher", targets="position")
TRAIN = replace(
    pema.preset("best"),
    **{"rank": 8, "fit_rank": False, "copy_width": 8, "epochs": 2, "learning_rate": 0.01, "device": "cpu"},
    copy_least=0.0,
    dev_fraction=0.25,
)


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


class NoTargets(Recorded):
    """A PLM that refuses `teacher` contexts, whose requests have the targets."""

    def represent(self, *_args, **_settings):
        raise AssertionError("a target would be sent")


@pytest.fixture(scope="module")
def whole(plm, tmp_path_factory):
    """What two rounds leave, and every sequence that the PLM represented in a session."""
    folder, recorded = tmp_path_factory.mktemp("rounds"), NoTargets(plm)
    adapter, _ = adapt(recorded, EXAMPLES, TASK, folder, TRAIN, BUILD, 2)
    return folder, recorded, adapter


def bytes_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or path.name == "manifest.json"
    }


def test_a_round_is_the_slow_loop(plm, whole):
    folder, _, _ = whole
    memory = Memory.open(folder / "memory")
    assert [entry.policy is None for entry in memory.manifest.inputs] == [True, False, False]
    tokens = Tokens.encode(plm, TASK.template.settled(plm.tokenizer), EXAMPLES, apart=True)
    for k in (1, 2):
        adapter = Adapter.from_pretrained(folder / f"adapter-{k}")
        assert memory.manifest.inputs[k].policy == OnPolicy(plm, adapter).policy
        parts = memory.shards[3 * k : 3 * k + 3]
        golds = np.concatenate([part.targets(0, part.entry.pairs) for part in parts])
        written = np.concatenate([part.prompts().written for part in parts])
        f = torch.cat([part.contents().representations for part in parts])
        at = 0
        for i in range(len(EXAMPLES)):
            prompt, target = tokens.prompt(i), tokens.target(i)
            steps = -(-(len(target) + len(target) // 4) // 8) * 8
            frame = adapter.config.frame
            text = ended(
                slow(plm, adapter, Constant(1.0), prompt, steps, frame=frame)[0], plm.description.eos_token_ids
            )
            here = slice(at, at + len(text))
            assert written[here].tolist() == text
            assert golds[here].tolist() == pair(target, text, "matched").tolist()
            expected = next(iter(plm.represent([[*prompt, *text]], [len(prompt)]))).representations
            torch.testing.assert_close(f[here], expected, atol=1e-4, rtol=1e-3)
            at += len(text)
        assert at == len(golds)


def test_no_target_is_sent(plm, whole):
    folder, recorded, _ = whole
    shards = Memory.open(folder / "memory").shards[3:]
    texts = set()
    for shard in shards:
        stored, rows = shard.prompts(), shard.example_offsets
        for i, (start, stop) in enumerate(itertools.pairwise(stored.offsets)):
            prompt = stored.tokens[start:stop].tolist()
            written = stored.written[rows[i] : rows[i + 1]].tolist()
            texts |= {(*prompt, *written[:n]) for n in range(len(written))}
    # What the owner reads are the prompts and what the adapters wrote, by the test above; nothing else.
    assert set(recorded.sequences) == texts


def test_held_out_examples_are_so_in_every_round(whole):
    folder = whole[0]
    training, held_out = Memory.open(folder / "memory").split(0.25, 0)
    n = len(EXAMPLES)
    assert len(held_out.selected) == 6
    assert {i % n for i in training.selected}.isdisjoint(i % n for i in held_out.selected)


class StopError(Exception):
    """Interrupts a run."""


@pytest.mark.parametrize("calls", [1, 3, 5, 7, 9])
def test_an_interrupted_run_ends_with_the_same_bytes(plm, whole, tmp_path, monkeypatch, calls):
    """Interrupted before each of three trainings, and between the sessions of two rounds."""
    left = itertools.count(1)

    class Interrupted(Recorded):
        def open_session(self, prompts):
            if next(left) == calls:
                raise StopError
            return super().open_session(prompts)

    def interrupted(*args, **settings):
        if next(left) == calls:
            raise StopError
        return train(*args, **settings)

    monkeypatch.setattr(rounds_module, "train", interrupted)
    with pytest.raises(StopError):
        adapt(Interrupted(plm), EXAMPLES, TASK, tmp_path, TRAIN, BUILD, 2)
    monkeypatch.undo()
    adapt(plm, EXAMPLES, TASK, tmp_path, TRAIN, BUILD, 2)
    assert bytes_of(tmp_path) == bytes_of(whole[0])


def test_the_same_call_again_does_nothing(plm, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "again")
    recorded = Recorded(plm)
    adapter, _ = adapt(recorded, EXAMPLES, TASK, tmp_path / "again", TRAIN, BUILD, 2)
    assert not recorded.sequences
    assert torch.equal(adapter.A, whole[2].A)


def test_more_rounds_continue_after_the_last(plm, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "more")
    memory = build_in_rounds(plm, EXAMPLES, TASK, tmp_path / "more", TRAIN, BUILD, 3)
    assert len(memory.manifest.inputs) == 4
    with pytest.raises(MismatchError, match="has 3 rounds, more than rounds=2"):
        build_in_rounds(plm, EXAMPLES, TASK, tmp_path / "more", TRAIN, BUILD, 2)
    with pytest.raises(MismatchError, match="was built from another input"):
        build_in_rounds(plm, EXAMPLES[1:], TASK, tmp_path / "more", TRAIN, BUILD, 3)


def test_no_round_is_build_and_train(plm, tmp_path):
    adapter, _ = adapt(plm, EXAMPLES, TASK, tmp_path / "short", TRAIN, BUILD)
    memory = build_memory(plm, EXAMPLES, TASK, tmp_path / "memory", BUILD)
    step_by_step, _ = train(memory, TRAIN, tmp_path / "adapter")
    assert bytes_of(tmp_path / "short" / "memory") == bytes_of(tmp_path / "memory")
    assert torch.equal(adapter.B_pd, step_by_step.B_pd)


def test_rounds_that_cannot_be_are_refused():
    for building, epsilon, message in (
        (replace(BUILD, targets="position"), None, "targets='position' with rounds=2"),
        (BUILD, 3.0, "dp_epsilon=3.0 with rounds=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_rounds(2, building, epsilon)
        require_rounds(0, building, epsilon)
    require_rounds(2, replace(BUILD, targets="aligned"), None)
    require_rounds(2, replace(BUILD, contexts="teacher", targets="position"), None)
    with pytest.raises(ConfigError, match="rounds"):
        require_rounds(101, BUILD, None)


def test_another_adapter_cannot_continue_a_build(plm, whole, tmp_path):
    adapters = [Adapter.from_pretrained(whole[0] / f"adapter-{k}") for k in (1, 2)]
    folder = tmp_path / "memory"
    build_memory(OnPolicy(plm, adapters[0]), EXAMPLES, TASK, folder, BUILD)
    build_memory(OnPolicy(plm, adapters[0]), EXAMPLES, TASK, folder, BUILD)
    for other, name in ((plm, "the PLM's own text"), (OnPolicy(plm, adapters[1]), "the text of the adapter")):
        with pytest.raises(MismatchError, match=f"with the text of the adapter .*, here it is {name}"):
            build_memory(other, EXAMPLES, TASK, folder, BUILD)
    with pytest.raises(ConfigError, match="contexts='teacher' of an adapter's text: it is appended to a memory"):
        build_memory(OnPolicy(plm, adapters[0]), EXAMPLES, TASK, tmp_path / "teacher")


@pytest.fixture(scope="module")
def taught(plm, tmp_path_factory):
    """What one round after `teacher` contexts leaves."""
    folder = tmp_path_factory.mktemp("taught")
    adapt(plm, EXAMPLES, TASK, folder, TRAIN, TAUGHT, 1)
    return folder


def test_a_round_after_teacher_contexts_adds_those_of_the_adapters_text(plm, taught, tmp_path):
    memory = Memory.open(taught / "memory")
    alone = build_memory(plm, EXAMPLES, TASK, tmp_path / "teacher", TAUGHT)
    assert (memory.manifest.contexts, memory.manifest.targets) == ("teacher", "position")
    assert [shard.entry.on_policy for shard in memory.shards] == [False] * 3 + [True] * 3
    for shard, other in zip(memory.shards[:3], alone.shards, strict=True):
        assert shard.path.read_bytes() == other.path.read_bytes()
    adapter = Adapter.from_pretrained(taught / "adapter-1")
    predicted = replace(TAUGHT, contexts="predicted", targets="aligned")
    reached = build_memory(OnPolicy(plm, adapter), EXAMPLES, TASK, tmp_path / "reached", predicted)
    for shard, other in zip(memory.shards[3:], reached.shards, strict=True):
        assert shard.path.read_bytes() == other.path.read_bytes()
        assert shard.entry.agreeing == other.entry.agreeing
    trained = Adapter.from_pretrained(taught / "adapter")
    assert trained.config.contexts == "teacher"
    assert isinstance(trained.config.choose_schedule(None, None), Constant)
    training, held_out = memory.split(0.25, 0)
    n = len(EXAMPLES)
    assert {i % n for i in training.selected}.isdisjoint(i % n for i in held_out.selected)


def test_a_memory_of_both_is_resumed_verified_merged_and_sampled(plm, taught, tmp_path):
    class Stopping(Recorded):
        def open_session(self, prompts):
            raise StopError

    with pytest.raises(StopError):
        adapt(Stopping(plm), EXAMPLES, TASK, tmp_path / "again", TRAIN, TAUGHT, 1)
    adapt(plm, EXAMPLES, TASK, tmp_path / "again", TRAIN, TAUGHT, 1)
    assert bytes_of(tmp_path / "again") == bytes_of(taught)
    verify(taught / "memory")
    merged = merge([taught / "memory", _copy(taught / "memory", tmp_path / "copy")], tmp_path / "merged")
    assert [entry.on_policy for entry in merged.manifest.shards] == [*[False] * 3, *[True] * 3] * 2
    verify(tmp_path / "merged")
    drawn = sample(tmp_path / "merged", tmp_path / "drawn", pairs=merged.pairs // 2, seed=0)
    assert {entry.on_policy for entry in drawn.manifest.shards} == {False, True}
    verify(tmp_path / "drawn")
    assert sum(len(batch.targets) for batch in drawn.view().batches(7)) == drawn.pairs


def test_merged_and_sampled_memories_stay_on_policy(whole, tmp_path):
    n = len(EXAMPLES)
    merged = merge([whole[0] / "memory", _copy(whole[0] / "memory", tmp_path / "copy")], tmp_path / "merged")
    assert len(merged.manifest.inputs) == 6
    assert merged.prompts.numbers().tolist() == [*range(n)] * 6
    drawn = sample(tmp_path / "merged", tmp_path / "drawn", pairs=merged.pairs // 2, seed=0)
    training, held_out = drawn.split(0.3, 1)
    numbers = drawn.prompts.numbers()
    assert set(numbers[training.selected]).isdisjoint(numbers[held_out.selected])


def _copy(source, target):
    shutil.copytree(source, target)
    return target


def test_a_memory_of_a_wrong_policy_is_damaged(whole, tmp_path):
    folder = _copy(whole[0] / "memory", tmp_path / "m")
    values = json.loads((folder / "manifest.json").read_text())
    values["contexts"], values["targets"] = "teacher", "position"
    with pytest.raises(ConfigError, match=r"shards\[0\].agreeing=\d+ is impossible with \d+ pairs of teacher contexts"):
        Manifest.from_dict(values)
    del values["shards"][0]["agreeing"]
    values["shards"][0]["on_policy"] = True
    for entry in values["inputs"]:
        entry.pop("policy", None)
    with pytest.raises(ConfigError, match=r"shards\[0\].on_policy is impossible: no input has the text of an adapter"):
        Manifest.from_dict(values)
