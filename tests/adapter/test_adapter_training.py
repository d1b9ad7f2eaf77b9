import json
import sys

import pytest
import torch
from made_memories import make_memory, rows

from pema.adapter import joint, training
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.reconstruction import closed_form
from pema.adapter.training import train
from pema.errors import AdapterError, ConfigError, StorageError
from pema.memory.reader import Memory, View


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("training") / "memory", examples=120)


def loss_of(adapter, head, view):
    f, y = rows(view)
    return -float(adapter.log_probs(f, head)[torch.arange(len(y)), y].mean())


def log(folder, event):
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("name", ["paper", "residual"])
@pytest.mark.parametrize("vocabulary", ["full", "seen"])
def test_training_teaches(name, vocabulary, tmp_path):
    memory = make_memory(tmp_path / "memory", examples=120, used=9)
    config = preset(name, epochs=25, batch_size=64, learning_rate=1e-2, vocabulary=vocabulary, precision="float32")
    adapter, figures = train(memory, config, tmp_path / "adapter")
    _, held_out = memory.split(config.dev_fraction, config.seed)
    head = memory.head()
    assert loss_of(adapter, head, held_out) < 0.5 * -float(
        head.logits(rows(held_out)[0]).log_softmax(-1)[torch.arange(held_out.pairs), rows(held_out)[1]].mean()
    )
    assert figures["held_out_cross_entropy"] == pytest.approx(loss_of(adapter, head, held_out), rel=1e-4)
    assert figures["held_out_cross_entropy"] < figures["start_cross_entropy"]
    loaded = Adapter.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(rows(held_out)[0]), adapter(rows(held_out)[0]))
    assert not (tmp_path / "adapter" / "checkpoint").exists()
    assert adapter.config.plm == memory.manifest.plm
    if vocabulary == "seen":
        assert torch.equal(adapter.tokens, memory.view().targets_seen())


def test_few_pairs_are_trained_in_small_batches(memory, tmp_path):
    settings = {"epochs": 2, "precision": "float32", "rank": 8, "copy_width": 0}
    config = preset("best", **settings)
    fitted, figures = train(memory, config, tmp_path / "fitted")
    batch_size = config.with_steps(round(0.9 * memory.pairs)).batch_size
    assert batch_size < config.batch_size
    given, _ = train(memory, preset("best", batch_size=batch_size, **settings), tmp_path / "given")
    assert torch.equal(fitted.B_pd, given.B_pd)
    assert figures["steps"] == 2 * -(-figures["pairs"] // batch_size)
    assert fitted.config.training["settings"]["batch_size"] == batch_size


def test_early_stopping_keeps_the_best_weights(memory, tmp_path):
    settings = {"dropout": 0.0, "patience": 2, "kappa": 0.0, "precision": "float32"}
    config = preset("paper", epochs=60, batch_size=32, learning_rate=0.2, **settings)
    adapter, figures = train(memory, config, tmp_path / "adapter")
    _, held_out = memory.split(config.dev_fraction, config.seed)
    losses = [
        line["held_out"]["loss"] for line in log(tmp_path / "adapter", "start") + log(tmp_path / "adapter", "epoch")
    ]
    assert figures["epochs"] == figures["best_epoch"] + 2 < 60
    assert losses.index(min(losses)) == figures["best_epoch"]
    assert loss_of(adapter, memory.head(), held_out) == pytest.approx(min(losses), rel=1e-4)


def test_training_that_only_harms_leaves_the_plm(memory, tmp_path):
    config = preset("residual", epochs=2, learning_rate=50.0, clip=0.0, warmup=0.0)
    adapter, figures = train(memory, config, tmp_path / "adapter")
    f, _ = rows(memory.view())
    assert figures["best_epoch"] == 0
    assert figures["held_out_loss"] == figures["start_loss"]
    assert torch.equal(adapter(f), f)


def test_without_held_out_pairs_the_last_weights_stay(memory, tmp_path):
    adapter, figures = train(memory, preset("paper", dev_fraction=0.0, epochs=3), tmp_path / "adapter")
    assert (figures["best_epoch"], figures["epochs"], figures["held_out_pairs"]) == (3, 3, 0)
    assert figures["pairs"] == memory.pairs
    assert "held_out" not in log(tmp_path / "adapter", "epoch")[-1]
    assert adapter.B_rct is not None


def test_pca_starts_as_the_plm_seen_through_the_subspace(memory, tmp_path, monkeypatch):
    def step(run, *given):
        run.state.step += 1
        return torch.ones(3), 0.0

    monkeypatch.setattr(joint.JointRun, "step", step)
    adapter, _ = train(memory, preset("paper", init="pca", rank=5, epochs=1), tmp_path / "adapter")
    config = preset("paper")
    A, B_rct, _ = closed_form(memory.split(config.dev_fraction, config.seed)[0], 5, 12)
    assert torch.equal(adapter.A, A)
    assert torch.equal(adapter.B_pd, B_rct)
    assert torch.equal(adapter.B_rct, B_rct)


def test_sgd_reconstruction_is_the_papers_procedure(memory, tmp_path):
    config = preset("paper", rank=5, epochs=1, reconstruction="sgd", reconstruction_epochs=3)
    adapter, figures = train(memory, config, tmp_path / "sgd")
    _, closed = train(memory, preset("paper", rank=5, epochs=1), tmp_path / "closed")
    assert closed["reconstruction_error"] <= figures["reconstruction_error"]
    assert log(tmp_path / "sgd", "reconstruction")[0]["procedure"] == "sgd"
    assert adapter.B_rct.shape == (12, 5)


def test_no_reconstruction_where_nothing_needs_it(memory, tmp_path):
    adapter, figures = train(memory, preset("paper", kappa=0.0, epochs=1), tmp_path / "adapter")
    assert adapter.B_rct is None
    assert "reconstruction_error" not in figures


def test_b_rct_is_frozen(memory, tmp_path):
    adapter, _ = train(memory, preset("paper", rank=5, epochs=2), tmp_path / "adapter")
    config = preset("paper")
    _, B_rct, _ = closed_form(memory.split(config.dev_fraction, config.seed)[0], 5, 12)
    assert torch.equal(adapter.B_rct, B_rct)


def test_the_log_tells_the_losses_the_rate_and_the_speed(memory, tmp_path):
    train(memory, preset("paper", epochs=2, batch_size=50, log_every=3), tmp_path / "adapter")
    steps, epochs = log(tmp_path / "adapter", "step"), log(tmp_path / "adapter", "epoch")
    assert [line["step"] for line in steps] == list(range(3, epochs[-1]["step"] + 1, 3))
    for line in steps:
        assert line["loss"] == pytest.approx(0.2 * line["reconstruction"] + 0.8 * line["cross_entropy"], rel=1e-4)
        assert line["pairs_per_second"] > 0
    for line in epochs:
        assert {"seconds", "pairs_per_second", "learning_rate", "train", "held_out"} <= set(line)


def test_tensorboard_gets_the_same(memory, tmp_path):
    train(memory, preset("paper", epochs=1), tmp_path / "adapter", tensorboard=True)
    assert list((tmp_path / "adapter" / "tensorboard").glob("events*"))


def test_tensorboard_that_is_not_installed(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ConfigError,
        match=r"--tensorboard needs the library tensorboard, which is not installed: pip install 'tensorboard>=",
    ):
        train(memory, preset("paper", epochs=1), tmp_path / "adapter", tensorboard=True)


def test_a_log_that_cannot_be_written(memory, tmp_path):
    (tmp_path / "adapter" / "training.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*training.jsonl: Is a directory"):
        train(memory, preset("paper", epochs=1), tmp_path / "adapter")


def test_a_log_that_fails_on_the_way(memory, tmp_path, monkeypatch):
    def start(run):
        (run.output / "training.jsonl").unlink()
        (run.output / "training.jsonl").mkdir()

    monkeypatch.setattr(joint.JointRun, "start", start)
    with pytest.raises(StorageError, match=r"cannot write .*training.jsonl"):
        train(memory, preset("paper", epochs=1), tmp_path / "adapter")


def test_a_loss_that_is_not_finite_names_the_step_and_a_remedy(memory, tmp_path):
    config = preset("paper", learning_rate=1e30, dev_fraction=0.0, kappa=0.0)
    with pytest.raises(
        AdapterError, match=r"the loss is (nan|inf) at step \d+ \(epoch 1\): .* Lower the learning rate"
    ):
        train(memory, config, tmp_path / "adapter")


@pytest.fixture
def accelerator(monkeypatch):
    """Treat the CPU as a device that the program does not wait for; returns the numbers of steps at readings."""
    read, steps = joint.JointRun.read, []

    def watching(run, *given):
        steps.append(run.state.step)
        read(run, *given)

    for module in ("adapter.joint", "adapter.loss", "adapter.sampled", "memory.reader", "memory.prompts"):
        monkeypatch.setattr(f"pema.{module}.is_asynchronous", lambda device: True)
    monkeypatch.setattr(joint.JointRun, "read", watching)
    return steps


def files_of(folder):
    """The weights, and the log without what clocks say."""
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in log]
    return (folder / "adapter_model.safetensors").read_bytes(), timeless


@pytest.mark.parametrize("name", ["paper", "residual"])
def test_an_accelerator_trains_the_same_adapter_and_is_rarely_waited_for(name, memory, tmp_path, request):
    config = preset(name, epochs=3, batch_size=8, log_every=50, precision="float32")
    train(memory, config, tmp_path / "here")
    steps = request.getfixturevalue("accelerator")
    train(memory, config, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    per_epoch = -(-memory.split(config.dev_fraction, config.seed)[0].pairs // 8)
    assert per_epoch > 2 * joint.READ_EVERY
    ends = [per_epoch * epoch for epoch in (1, 2, 3)]
    due = [step for step in range(1, ends[-1] + 1) if step % joint.READ_EVERY == 0 or step % 50 == 0]
    assert sorted(steps) == sorted(due + ends)


@pytest.mark.parametrize("core", [6, 100])  # with rare targets, and without
@pytest.mark.parametrize(("name", "vocabulary"), [("residual", "sampled"), ("best", "full"), ("best", "sampled")])
def test_what_an_accelerator_computes_for_all_rows_is_the_same(name, vocabulary, core, tmp_path, monkeypatch, request):
    for module in ("config", "sampled", "training"):
        monkeypatch.setattr(f"pema.adapter.{module}.SAMPLE", 5)
    for module in ("config", "sampled"):
        monkeypatch.setattr(f"pema.adapter.{module}.CORE", core)
    memory = make_memory(tmp_path / "memory", examples=120, prompts=name == "best")
    settings = {"epochs": 2, "batch_size": 16, "rank": 8, "precision": "float32", "log_every": 1, "copy_least": 0.0}
    config = preset(name, vocabulary=vocabulary, **settings)
    train(memory, config, tmp_path / "here")
    request.getfixturevalue("accelerator")
    train(memory, config, tmp_path / "there")
    here, there = ([line["loss"] for line in log(tmp_path / folder, "step")] for folder in ("here", "there"))
    assert len(here) > 50
    assert there == pytest.approx(here, rel=1e-4)


def test_batches_go_to_the_device_of_the_weights_whatever_the_current_one_of_a_thread(memory, tmp_path, monkeypatch):
    # "cuda" is the current GPU of the thread that uses it; "cpu:0" is to "cpu" what it is to "cuda:1".
    parts, devices = View.parts, []

    def watching(view, *given, device, **further):
        devices.append(device)
        return parts(view, *given, device=device, **further)

    monkeypatch.setattr(View, "parts", watching)
    adapter, _ = train(memory, preset("paper", epochs=1, device="cpu:0"), tmp_path / "adapter")
    assert devices == [adapter.A.device]


def test_a_loss_on_an_accelerator_that_is_not_finite(memory, tmp_path, accelerator):
    config = preset("paper", learning_rate=1e30, dev_fraction=0.0, kappa=0.0, batch_size=64, checkpoint_every=2)
    with pytest.raises(AdapterError, match=r"the loss is (nan|inf) by step 2 \(epoch 1\): .* Lower the learning rate"):
        train(memory, config, tmp_path / "adapter")
    assert accelerator == [2]


def test_a_held_out_loss_that_is_not_finite(memory, tmp_path):
    config = preset("paper", learning_rate=1e30, kappa=0.0, batch_size=100_000)
    with pytest.raises(AdapterError, match=r"the held-out loss is (nan|inf) after step 1: training diverged"):
        train(memory, config, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["paper", "residual"])
def test_a_nan_in_the_memory_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "verify", lambda *_: None, raising=False)
    memory = make_memory(tmp_path / "memory", nan_at=4)
    with pytest.raises(AdapterError, match=r"the representation of pair \d+ \(of \d+; step \d+ of its example\)"):
        train(memory, preset(name, epochs=1), tmp_path / "adapter")


def test_a_rank_larger_than_d(memory, tmp_path):
    with pytest.raises(ConfigError, match="rank=13 is larger than d = 12"):
        train(memory, preset("paper", rank=13), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_device_that_is_not_there(memory, tmp_path):
    with pytest.raises(AdapterError, match="device='nonsense' cannot be used on this machine"):
        train(memory, preset("paper", device="nonsense"), tmp_path / "adapter")


def test_a_memory_without_pairs(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "verify", lambda *_: None, raising=False)

    class Empty(Memory):
        d, pairs, path, manifest = memory.d, 0, "empty", memory.manifest

        def __init__(self):
            pass

    with pytest.raises(AdapterError, match="empty contains no pairs to train on"):
        train(Empty(), preset("paper"), tmp_path / "adapter")


def test_bfloat16_when_asked_for(memory, tmp_path):
    config = preset("residual", epochs=3, precision="bfloat16", learning_rate=1e-2)
    _, figures = train(memory, config, tmp_path / "adapter")
    assert figures["held_out_loss"] < figures["start_loss"]


def test_the_head_bundle_is_not_read_for_every_pass(tmp_path, monkeypatch):
    """With the tap before the final norm each batch is normalised, by a norm that is read once."""
    from pema.owner import head as module

    reads = []
    load = module.Head.load
    monkeypatch.setattr(module.Head, "load", classmethod(lambda cls, *given: reads.append(given) or load(*given)))
    memory = make_memory(tmp_path / "m", tap="norm_input")
    (batch,) = memory.view().batches(10_000)
    assert batch.representations.square().mean(1).sub(1).abs().max() < 1e-3
    before = len(reads)
    assert before == 1
    train(memory, preset("paper", epochs=4, kappa=0.2, dev_fraction=0.2, patience=9), tmp_path / "a")
    # One to check every byte, one for W_hd, one for the fitted schedule, whose arithmetic is float32.
    assert len(reads) - before == 3


def test_weights_follow_the_umask_and_only_their_owner_may_read_checkpoints(tmp_path, monkeypatch):
    import os
    import stat

    from pema.adapter.checkpoint import Checkpoint

    modes = []
    save = Checkpoint.save

    def saved(self, state, tensors):
        save(self, state, tensors)
        modes.append(stat.S_IMODE(self.file.stat().st_mode))

    monkeypatch.setattr(Checkpoint, "save", saved)
    before = os.umask(0o022)
    try:
        train(make_memory(tmp_path / "m"), preset("paper", epochs=1), tmp_path / "a")
    finally:
        os.umask(before)
    assert set(modes) == {0o600}
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training.jsonl")
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()}
    assert found == dict.fromkeys(names, 0o644)
