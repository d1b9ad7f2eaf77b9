import json

import pytest
import torch
from killed_training import SETTINGS, start
from made_memories import make_memory
from safetensors.torch import load_file, save_file

from pema.adapter import joint
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.errors import AdapterError, MismatchError, StorageError
from pema.files import read_json

CLOCK = {"seconds", "pairs_per_second", "reconstruction_seconds"}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("resume") / "memory", examples=60)


@pytest.fixture(scope="module")
def unbroken(memory, tmp_path_factory):
    """Folders of runs that nothing interrupted, by preset."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("paper", "residual"):
        assert start(memory.path, folder / name, name)
    return folder


def result(folder):
    """What a run leaves: weights, figures and log without clock times."""
    figures = read_json(folder / "adapter_config.json")["pema"]["training"]["figures"]
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return (
        (folder / "adapter_model.safetensors").read_bytes(),
        {k: v for k, v in figures.items() if k not in CLOCK | {"train_seconds"}},
        [{k: v for k, v in line.items() if k not in CLOCK} for line in lines],
        sorted(path.name for path in folder.iterdir()),
    )


@pytest.mark.parametrize(("name", "stride"), [("paper", 1), ("residual", 2)])
def test_killed_before_any_call_it_ends_the_same(name, stride, memory, unbroken, tmp_path):
    # Each life is longer than the last, so every kind of call is the fatal one at some time, and it comes to an end.
    calls = 0
    while not start(memory.path, tmp_path / "adapter", name, after_calls=calls):
        calls += stride
    assert calls >= 5 * stride
    assert result(tmp_path / "adapter") == result(unbroken / name)


def test_killed_at_random_moments_it_ends_the_same(memory, unbroken, tmp_path):
    random = torch.Generator().manual_seed(0)
    seconds = 0.05
    while not start(memory.path, tmp_path / "adapter", "residual", after_seconds=seconds):
        seconds *= 1.1 + 0.3 * float(torch.rand(1, generator=random))
    assert result(tmp_path / "adapter") == result(unbroken / "residual")


def test_a_finished_run_is_returned_as_it_is(memory, unbroken):
    before = result(unbroken / "paper")
    adapter, figures = train(memory, preset("paper", **SETTINGS), unbroken / "paper", resume=True)
    assert torch.equal(adapter.A, load_file(unbroken / "paper" / "adapter_model.safetensors")["A"])
    assert figures["epochs"] == SETTINGS["epochs"]
    assert result(unbroken / "paper") == before
    with pytest.raises(MismatchError, match=r"the adapter .*paper was made with kappa=0.2, this run has kappa=0.5"):
        train(memory, preset("paper", **SETTINGS, kappa=0.5), unbroken / "paper", resume=True)


def test_it_does_not_train_over_an_adapter(memory, unbroken):
    with pytest.raises(AdapterError, match="paper already contains an adapter: train into another folder"):
        train(memory, preset("paper", **SETTINGS), unbroken / "paper")


@pytest.fixture
def stopped(memory, tmp_path, monkeypatch):
    """The folder of a run that failed in its third epoch."""
    end_epoch = joint.JointRun.end_epoch

    def failing(run, *arguments):
        end_epoch(run, *arguments)
        if run.state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joint.JointRun, "end_epoch", failing)
        with pytest.raises(KeyboardInterrupt):
            train(memory, preset("paper", **SETTINGS), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_checkpoint_is_not_trained_over(memory, stopped):
    with pytest.raises(
        AdapterError, match="contains the checkpoint of a training that has not ended: continue with --resume"
    ):
        train(memory, preset("paper", **SETTINGS), stopped)


def test_other_settings_are_refused_by_name(memory, stopped):
    with pytest.raises(MismatchError, match=r"was made with learning_rate=0.001, this run has learning_rate=0.1"):
        train(memory, preset("paper", **SETTINGS, learning_rate=0.1), stopped, resume=True)
    other = preset("paper", **SETTINGS | {"checkpoint_every": 1, "log_every": 1})
    assert train(memory, other, stopped, resume=True)[1]["epochs"] == SETTINGS["epochs"]


def test_another_memory_is_refused(stopped, tmp_path):
    other = make_memory(tmp_path / "other", examples=60, seed=1)
    with pytest.raises(MismatchError, match="was made with another memory"):
        train(other, preset("paper", **SETTINGS), stopped, resume=True)


def test_a_damaged_checkpoint_is_refused(memory, stopped):
    file = stopped / "checkpoint" / "state.safetensors"
    whole = file.read_bytes()
    for at in (3, len(whole) // 3, len(whole) - 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(AdapterError, match=r"state.safetensors is damaged .*: remove .* train without --resume"):
            train(memory, preset("paper", **SETTINGS), stopped, resume=True)
    file.write_bytes(whole[:-9])
    with pytest.raises(AdapterError, match=r"state.safetensors is damaged"):
        train(memory, preset("paper", **SETTINGS), stopped, resume=True)


def test_a_checkpoint_of_another_format_is_refused(memory, stopped, monkeypatch):
    monkeypatch.setattr("pema.adapter.checkpoint.FORMAT", 2)
    with pytest.raises(AdapterError, match="has format 1, not 2"):
        train(memory, preset("paper", **SETTINGS), stopped, resume=True)


def test_a_file_without_our_header_is_refused(memory, stopped):
    save_file({"A": torch.zeros(1)}, stopped / "checkpoint" / "state.safetensors")
    with pytest.raises(AdapterError, match=r"state.safetensors is damaged"):
        train(memory, preset("paper", **SETTINGS), stopped, resume=True)


def test_a_full_disk_loses_nothing(memory, tmp_path, unbroken, monkeypatch):
    import pema.files

    sync, calls = pema.files.sync, 0

    def full(path):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(pema.files, "sync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            train(memory, preset("residual", **SETTINGS), tmp_path / "adapter")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(memory, preset("residual", **SETTINGS), tmp_path / "adapter", resume=True)
    finally:
        torch.set_num_threads(threads)
    assert result(tmp_path / "adapter")[1]["steps"] == result(unbroken / "residual")[1]["steps"]
