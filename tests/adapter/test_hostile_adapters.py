"""Adapters and checkpoints with valid checksums and impossible contents: refused by name, or harmless."""

import json
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memories import describe, make_head, make_memory
from safetensors.torch import load_file, save_file
from tests import hostile
from tests.hostile import BOTTOMLESS, change_header, change_tensors, edit, read, sign_adapter

from pema.adapter import checkpoint as checkpoint_module
from pema.adapter import joint
from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.errors import AdapterError, MismatchError, PemaError

D, V = 6, 11
HUGE = 10**30
ODD = [None, True, -1, 0, 1.5, 10**9, HUGE, "", "x", "\x1b[2J", "\ud800", [], {}, [1], {"a": 1}, float("nan")]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    config = AdapterConfig(
        d=D,
        vocabulary_size=V,
        rank=4,
        vocabulary="seen",
        plm=describe(make_head(D, V)),
        task="translation",
        template="Say {source}:",
        contexts="teacher",
        training={"figures": {"pairs": 3}, "settings": {}, "signature": {"seed": 7}},
    )
    adapter = Adapter(config, torch.tensor([1, 4, 9]), seed=3)
    adapter.B_rct = torch.ones(D, 4)
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "a")
    return tmp_path / "a"


CONFIG = [
    ("pema.rank", 10**7, "rank=10000000 is too large"),
    ("pema.rank", 1 << 20, "rank=1048576 is larger than d = 6"),
    ("pema.rank", "4", "rank='4' must be a whole number"),
    ("pema.d", 10**9, "d=1000000000 is too large"),
    ("pema.d", 7, "d=7, vocabulary_size=11 differ from those of made: 6, 11"),
    ("pema.vocabulary_size", 10**13, "vocabulary_size=10000000000000 is too large"),
    ("pema.residual", "yes", "residual='yes' must be true or false"),
    ("pema.residual", 1, "residual=1 must be true or false"),
    ("pema.activation", "gelu", "activation='gelu' with residual=False"),
    ("pema.activation", ["none"], "unknown activation a list of 1 items"),
    ("pema.vocabulary", "full", "vocabulary='full' takes no tokens"),
    ("pema.task", {"a": 1}, "task=an object of 1 items must be a text"),
    ("pema.task", "\x1b]0;", r"task='\\x1b\]0;' must be one line"),
    ("pema.template", "\x07", "template='.x07' contains control characters"),
    ("pema.contexts", "both", "unknown contexts 'both': use teacher or predicted"),
    ("pema.plm", 3, "plm is 3, not an object"),
    ("pema.plm.name", "\x1b", "plm.name=.* must be one line of printable"),
    ("pema.plm.d_tap", HUGE, "plm.d_tap=1000000000000000000000000000000 is too large"),
    ("pema.training", [], "training=a list of 0 items must be an object"),
    ("pema.training.figures", [1], "training.figures=a list of 1 items must be an object"),
    ("pema.training.figures.pairs", "many", "training.figures.pairs='many' must be a number"),
    ("pema.training.signature", 3, "training.signature=3 must be an object"),
    ("pema.colour", 3, "unknown setting 'colour' of AdapterConfig"),
    ("pema", [], "it is a list of 0 items, not an object"),
    ("format", "1", "has format '1'"),
    ("peft_type", "\x1b", r"adapter of type '\\x1b', not PEMA"),
    ("model_sha256", "0" * 64, None),
]


@pytest.mark.parametrize(("place", "value", "words"), CONFIG)
def test_an_impossible_config_is_refused(folder, original, place, value, words):
    values = read(folder / "adapter_config.json")
    edit(values, place, value)
    sign_adapter(folder, values)
    if words is None:  # signing puts the right one there
        assert torch.equal(Adapter.from_pretrained(folder).A, Adapter.from_pretrained(original).A)
        return
    with pytest.raises(AdapterError, match=words) as caught:
        Adapter.from_pretrained(folder)
    assert str(caught.value).isprintable()


def test_a_deeply_nested_training_is_refused(folder):
    values = read(folder / "adapter_config.json")
    edit(values, "pema.training.settings", json.loads("[" * 100 + "]" * 100))
    sign_adapter(folder, values)
    with pytest.raises(AdapterError, match="training is nested more than 32 levels deep"):
        Adapter.from_pretrained(folder)
    (folder / "adapter_config.json").write_text(f'{{"peft_type": {BOTTOMLESS}}}', encoding="utf-8")
    with pytest.raises(AdapterError, match="nested too deeply"):
        Adapter.from_pretrained(folder)


def put(name, make):
    def change(values):
        values[name] = make(values.get(name))

    return change


def spoilt(name, value):
    def change(values):
        values[name].view(-1)[3 % values[name].numel()] = value

    return change


WEIGHTS = [
    (spoilt("A", float("nan")), "A contains NaN, infinity or a number beyond 1e"),
    (spoilt("B_pd", float("inf")), "B_pd contains NaN, infinity"),
    (spoilt("B_pd", 1e38), "B_pd contains NaN, infinity or a number beyond"),
    (spoilt("B_rct", -1e38), "B_rct contains NaN, infinity or a number beyond"),
    (put("A", lambda A: A.int()), "A contains I32, not floating-point numbers"),
    (put("A", lambda A: A.T), r"A is \(6, 4\), the config says \(4, 6\)"),
    (put("A", lambda A: A[:0]), r"A is \(0, 6\), the config says \(4, 6\)"),
    (put("C", lambda _: torch.zeros(1)), "expected the tensors A, B_pd"),
    (put("\x1b[2J", lambda _: torch.zeros(1)), r"expected the tensors A, B_pd .*\\x1b"),
    (put("tokens", lambda tokens: tokens.float()), "tokens is not a list of 64-bit integers"),
    (put("tokens", lambda tokens: tokens[None]), "tokens is not a list of 64-bit integers"),
    (put("tokens", lambda tokens: tokens.flip(0)), "the seen tokens must be sorted, unique and within 0..10"),
    (put("tokens", lambda tokens: tokens + 5), "the seen tokens must be sorted, unique and within 0..10"),
    (put("tokens", lambda tokens: tokens[:0]), "the seen tokens must be sorted"),
    (lambda values: {name: value for name, value in values.items() if name != "A"}, "expected the tensors A, B_pd"),
    (lambda values: {name: value for name, value in values.items() if name != "tokens"}, "vocabulary='seen' needs tok"),
]


@pytest.mark.parametrize(("change", "words"), WEIGHTS)
def test_impossible_weights_are_refused(folder, change, words):
    change_tensors(folder / "adapter_model.safetensors", change)
    sign_adapter(folder, read(folder / "adapter_config.json"))
    with pytest.raises(AdapterError, match=words) as caught:
        Adapter.from_pretrained(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header["A"].update(shape=[10**7, D]), "the offsets of 'A' in it are wrong"),
        (
            lambda header: header["A"].update(data_offsets=header["B_pd"]["data_offsets"]),
            "the offsets of '.*' in it are wr",
        ),
        (lambda header: header["A"].update(data_offsets=[0.0, 96.0]), "not a list of integers"),
        (lambda header: BOTTOMLESS.encode(), "nested too deeply"),
    ],
)
def test_an_impossible_header_is_refused(folder, change, words):
    change_header(folder / "adapter_model.safetensors", change)
    sign_adapter(folder, read(folder / "adapter_config.json"))
    with pytest.raises(AdapterError, match=rf"adapter_model.safetensors is damaged: .*{words}"):
        Adapter.from_pretrained(folder)


def test_a_config_is_not_obeyed_before_the_weights_are_looked_at(folder, monkeypatch):
    values = read(folder / "adapter_config.json")
    for place, value in (("pema.rank", 1 << 20), ("pema.residual", True), ("pema.activation", "gelu")):
        edit(values, place, value)
    sign_adapter(folder, values)
    monkeypatch.setattr("pema.adapter.module.Adapter.__init__", None)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    tracemalloc.start()
    with pytest.raises(AdapterError, match=r"A is \(4, 6\), the config says \(1048576, 6\)"):
        Adapter.from_pretrained(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", [hostile.device, hostile.pipe, hostile.sparse])
def test_files_without_end_are_not_waited_for(folder, file, kind):
    kind(folder / file)
    with pytest.raises(AdapterError, match=r"not a regular file|more than|is missing|end at byte"):
        Adapter.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_signed_change_of_the_config_is_refused_or_harmless(original, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any") / "a"
    shutil.copytree(original, folder)
    values = read(folder / "adapter_config.json")
    edit(values, data.draw(st.sampled_from(sorted(hostile.places(values)))), data.draw(st.sampled_from(ODD)))
    sign_adapter(folder, values)
    message = ""
    try:
        loaded = Adapter.from_pretrained(folder)
        f = torch.ones(2, D)
        assert torch.isfinite(loaded(f)).all()
        loaded.save_pretrained(folder / "again")
        assert torch.equal(Adapter.from_pretrained(folder / "again")(f), loaded(f))
    except PemaError as error:
        message = str(error)
    assert message.isprintable() or "\x1b" not in message
    shutil.rmtree(folder)


SCHEDULES = [
    ('{"schedule": ["constant"]}', "unknown schedule"),
    ('{"schedule": {"a": 1}}', "unknown schedule"),
    ('{"schedule": "constant", "value": NaN}', "NaN is not a JSON number"),
    ('{"schedule": "constant", "value": "0.5"}', "value='0.5' must be a number"),
    ('{"schedule": "constant", "value": true}', "value=True must be a number"),
    ('{"schedule": "constant", "value": 1.5}', "value=1.5 is too large"),
    ('{"schedule": "constant", "colour": 1}', "unknown setting 'colour'"),
    ('{"schedule": "fitted"}', "'values' is missing"),
    ('{"schedule": "fitted", "values": []}', "values is empty"),
    ('{"schedule": "fitted", "values": [0.5, -1]}', r"values\[1\]=-1.0 is too small"),
    ('{"schedule": "fitted", "values": "0.5"}', "values='0.5' must be a list"),
    ('{"schedule": "fitted", "values": [0.5], "span": 0}', "span=0.0 is too small"),
    ('{"schedule": "unrolling", "lambda_max": -0.1}', "lambda_max=-0.1 is too small"),
    ('{"schedule": "linear", "lambda_max": null}', "lambda_max=None must be a number"),
]


@pytest.mark.parametrize(("text", "words"), SCHEDULES)
def test_an_impossible_schedule_is_refused(original, tmp_path, text, words):
    """Beside an adapter of format 1, where the fitted schedule lay in a file of its own."""
    shutil.copytree(original, tmp_path / "a")
    values = read(tmp_path / "a" / "adapter_config.json") | {"format": 1}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "a" / "schedule.json").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=words):
        Adapter.from_pretrained(tmp_path / "a")


SETTINGS = {"epochs": 2, "batch_size": 32, "log_every": 2, "rank": 4}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("memory") / "memory", examples=20)


@pytest.fixture(scope="module")
def begun(memory, tmp_path_factory):
    """The folder of a run that stopped behind its first epoch."""
    output = tmp_path_factory.mktemp("begun") / "a"
    end_epoch = joint.JointRun.end_epoch

    def stop(run, *arguments):
        end_epoch(run, *arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint.JointRun, "end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(memory, preset("paper", **SETTINGS), output)
    return output


def sign_checkpoint(folder, change=None, tensors=None):
    path = folder / "checkpoint" / "state.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    text = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["checkpoint"]
    values, held = json.loads(text), load_file(path)
    if change is not None:
        values = change(values) or values
    if tensors is not None:
        held = tensors(held) or held
    text = json.dumps(values)
    held = {name: tensor.contiguous() for name, tensor in held.items()}
    save_file(held, path, {"checkpoint": text, "digest": checkpoint_module._digest(held, text)})


STATES = [
    ("state.epoch", -1, "state.epoch=-1 is too small"),
    ("state.epoch", "1", "state.epoch='1' must be a whole number"),
    ("state.lowest", float("nan"), "NaN is not a JSON number"),
    ("state.sums", [0.0, 1.0], "sums has 2 items, not 4"),
    ("state.sums", [0.0] * 5, "sums has 5 items"),
    ("state.sums", "none", "state.sums='none' must be a list"),
    ("state.log_bytes", -5, "state.log_bytes=-5 is too small"),
    ("state.figures", [1], "state.figures=a list of 1 items must be an object"),
    ("state.stopped", 0, "state.stopped=0 must be true or false"),
    ("state.colour", 0, "unknown setting 'state.colour'"),
    ("state", None, "state is None, not an object"),
    ("config", [1], "config=a list of 1 items must be an object"),
    ("memory", {"a": 1}, "memory=an object of 1 items must be a text"),
    ("format", "\x1b", r"has format '\\x1b', not 1"),
    ("config.\x1b", 1, r"was made with \\x1b=1, this run has"),
    ("extra", 1, "unknown setting 'extra'"),
]


@pytest.mark.parametrize(("place", "value", "words"), STATES)
def test_an_impossible_state_is_refused(memory, begun, tmp_path, place, value, words):
    shutil.copytree(begun, tmp_path / "a")
    sign_checkpoint(tmp_path / "a", lambda values: edit(values, place, value))
    with pytest.raises((AdapterError, MismatchError), match=words) as caught:
        train(memory, preset("paper", **SETTINGS), tmp_path / "a", resume=True)
    assert str(caught.value).isprintable()


TENSORS = [
    (put("A", lambda A: A[:2]), r"A has the shape \(2, 12\), not \(4, 12\)"),
    (put("B_rct", lambda B: B.T), r"B_rct has the shape \(4, 12\), not \(12, 4\)"),
    (put("C", lambda _: torch.zeros(1)), r"it has the tensors 'A', .*'C'"),
    (lambda values: {n: v for n, v in values.items() if n != "best.A"}, r"it has the tensors 'A', 'B_pd', 'B_rct'"),
    (lambda values: {n: v for n, v in values.items() if n != "optimizer.A.exp_avg"}, "it has the tensors"),
    (spoilt("optimizer.A.exp_avg", float("nan")), "optimizer.A.exp_avg contains NaN or infinity"),
    (spoilt("A", float("inf")), "A contains NaN or infinity"),
]


@pytest.mark.parametrize(("change", "words"), TENSORS)
def test_impossible_tensors_of_a_checkpoint_are_refused(memory, begun, tmp_path, change, words):
    shutil.copytree(begun, tmp_path / "a")
    sign_checkpoint(tmp_path / "a", tensors=change)
    with pytest.raises(AdapterError, match=words):
        train(memory, preset("paper", **SETTINGS), tmp_path / "a", resume=True)


def test_a_checkpoint_that_is_only_signed_again_goes_on(memory, begun, tmp_path):
    shutil.copytree(begun, tmp_path / "a")
    sign_checkpoint(tmp_path / "a")
    train(memory, preset("paper", **SETTINGS), tmp_path / "a", resume=True)


@pytest.mark.parametrize("spoil", ["short", "zeros", "half"])
def test_a_log_that_a_power_cut_spoilt_is_cut_to_whole_lines(memory, begun, tmp_path, spoil):
    shutil.copytree(begun, tmp_path / "a")
    log = tmp_path / "a" / "training.jsonl"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 3
    first = b"".join(lines[:2])
    log.write_bytes(
        {"short": first, "zeros": first + bytes(len(whole) - len(first)), "half": first + lines[2][:9]}[spoil]
    )
    train(memory, preset("paper", **SETTINGS), tmp_path / "a", resume=True)
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert b"\0" not in log.read_bytes()
    assert [e["event"] for e in events[:2]] == [json.loads(line)["event"] for line in lines[:2]]
    assert events[-1]["event"] == "epoch"
    assert events[-1]["epoch"] == 2


def test_the_log_is_on_the_disk_before_a_checkpoint_counts_on_it(memory, tmp_path, monkeypatch):
    order = []
    from pema.adapter import log as log_module

    sync, save = log_module.sync, checkpoint_module.Checkpoint.save

    def synced(path):
        order.append((path.name, path.stat().st_size))
        sync(path)

    def saved(self, state, tensors):
        assert order[-1] == ("training.jsonl", state.log_bytes)
        save(self, state, tensors)

    monkeypatch.setattr(log_module, "sync", synced)
    monkeypatch.setattr(checkpoint_module.Checkpoint, "save", saved)
    train(memory, preset("paper", **SETTINGS), tmp_path / "a")
    assert len(order) >= 3


def test_a_full_disk_leaves_whole_lines_in_the_log(tmp_path, monkeypatch):
    from pathlib import Path

    from pema.adapter.log import Log
    from pema.errors import StorageError

    log = Log(tmp_path, 0, False, 0)
    log.write("one", 0, {"a": 1.0})
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
        with pytest.raises(StorageError, match=r"cannot write .*training.jsonl: No space left"):
            log.write("two", 1, {"a": 2.0})
    log.write("three", 2, {})
    assert [json.loads(line)["event"] for line in log.path.read_text().splitlines()] == ["one", "three"]
