"""Training on a Ray cluster: the losses, weights and files of one process, whichever of its processes dies."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray_trainings
from made_memories import make_memory
from ray_trainings import CONFIG, TRAINING, work_counted, work_planted, work_slowly
from test_parallel import assert_same

from pema import console
from pema.adapter import ray as engine
from pema.adapter.presets import preset
from pema.adapter.ray import RESTARTS, train_on_ray
from pema.adapter.training import train
from pema.cli import main
from pema.errors import AdapterError, ConfigError, ExternalMemoryError, MismatchError, ProcessError, StorageError
from pema.locks import locked
from pema.relay import Repeater

LIMIT = 240


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("ray") / "memory", examples=30, prompts=True)


@pytest.fixture(scope="module")
def alone(memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "adapter"
    train(memory, CONFIG, folder)
    return folder


@pytest.fixture
def address(cluster):
    """The address of a cluster of two machines with a CPU each."""
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    return cluster.address


def test_it_is_the_training_of_one_process_and_each_worker_reads_its_part(
    address, memory, tmp_path, monkeypatch, capsys
):
    config = preset("paper", **TRAINING | {"rank": 6, "batch_size": 36, "copy_width": 0}, checkpoint_every=2)
    folder = tmp_path / "reads"
    folder.mkdir()
    monkeypatch.setattr(engine, "work", partial(work_counted, str(folder)))
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    adapter, figures = train_on_ray(memory.path, config, tmp_path / "adapter", workers=2, address=address)
    train(memory, config, tmp_path / "expected")
    assert_same(tmp_path / "adapter", tmp_path / "expected")
    assert adapter.config.training["figures"] == figures
    printed = capsys.readouterr().err
    assert "training: 276 of 276 (100%) pairs" in printed
    assert "A worker has ended" not in printed

    # Map: the rows of a worker are not read by another. Reduce: the sums are those of one process (above).
    rows = [
        {
            (file, row)
            for file, start, stop in json.loads((folder / str(rank)).read_text())
            for row in range(start, stop)
        }
        for rank in range(2)
    ]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) <= memory.pairs
    assert min(map(len, rows)) > memory.pairs // 3


@pytest.mark.slow
def test_killed_workers_are_started_again_and_continue_from_the_checkpoint(
    address, memory, alone, tmp_path, monkeypatch, capsys
):
    (tmp_path / "flags").mkdir()
    # 6 steps an epoch and a checkpoint each 2: it is killed in the first epoch, and then in the second one.
    planted = partial(work_planted, str(tmp_path / "flags"), 1, "step", (4, 6), "kill")
    monkeypatch.setattr(engine, "work", planted)
    train_on_ray(memory.path, CONFIG, tmp_path / "adapter", workers=2, address=address)
    assert len(list((tmp_path / "flags").iterdir())) == 2
    assert capsys.readouterr().err.count("A worker has ended, and all continue from the last checkpoint: ") == 2
    assert_same(tmp_path / "adapter", alone)


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_training_which_resumes_without_ray(
    address, memory, alone, tmp_path, monkeypatch, capsys
):
    (tmp_path / "flags").mkdir()
    planted = partial(work_planted, str(tmp_path / "flags"), 1, "step", (4,), "raise")
    monkeypatch.setattr(engine, "work", planted)
    with pytest.raises(AdapterError, match=r"^a planted fault\.$"):
        train_on_ray(memory.path, CONFIG, tmp_path / "adapter", workers=2, address=address)
    assert "A worker has ended" not in capsys.readouterr().err
    train(memory, CONFIG, tmp_path / "adapter", resume=True)
    assert_same(tmp_path / "adapter", alone)


@pytest.mark.slow
def test_the_death_of_the_command_is_survived(address, memory, alone, tmp_path):
    words = [sys.executable, Path(ray_trainings.__file__), address, memory.path, tmp_path / "adapter"]
    checkpoint = tmp_path / "adapter" / "checkpoint" / "state.safetensors"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        try:
            first, deadline = None, time.monotonic() + LIMIT
            while first is None or checkpoint.stat().st_ino == first:  # until the second checkpoint
                assert time.monotonic() < deadline
                assert command.poll() is None
                time.sleep(0.05)
                if first is None and checkpoint.exists():
                    first = checkpoint.stat().st_ino
        finally:
            command.kill()
    with locked(tmp_path / "adapter"):
        pass  # Ray has noticed the death of the command, and has ended its workers
    train(memory, CONFIG, tmp_path / "adapter", resume=True)
    assert_same(tmp_path / "adapter", alone)


class AtStep(Repeater):
    """Calls `act` once, at the first step of the training that is told."""

    act = None

    def __call__(self, events):
        super().__call__(events)
        if self.act and any(event[0] == "advance" and event[2].startswith("epoch") for event in events):
            act, AtStep.act = AtStep.act, None
            act()


@pytest.mark.slow
def test_the_death_of_a_machine_is_survived(cluster, memory, alone, tmp_path, monkeypatch, capsys):
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    (tmp_path / "places").mkdir()

    def remove():
        used = {place.read_text() for place in (tmp_path / "places").iterdir()}
        cluster.remove_node(next(node for node in nodes if node.node_id in used), allow_graceful=False)

    monkeypatch.setattr(AtStep, "act", staticmethod(remove))
    monkeypatch.setattr(engine, "Repeater", AtStep)
    monkeypatch.setattr(engine, "work", partial(work_slowly, folder=str(tmp_path / "places")))
    train_on_ray(memory.path, CONFIG, tmp_path / "adapter", workers=2, address=cluster.address)
    assert AtStep.act is None
    assert capsys.readouterr().err.count("A worker has ended") == 1
    assert_same(tmp_path / "adapter", alone)


@pytest.mark.slow
def test_an_interrupted_program_that_stays_connected_leaves_no_workers(address, memory, alone, tmp_path, monkeypatch):
    import ray

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(AtStep, "act", staticmethod(interrupt))
    monkeypatch.setattr(engine, "Repeater", AtStep)
    monkeypatch.setattr(engine, "work", work_slowly)
    ray.init(address=address, log_to_driver=False)
    with pytest.raises(KeyboardInterrupt):
        train_on_ray(memory.path, CONFIG, tmp_path / "adapter", workers=2)
    deadline = time.monotonic() + LIMIT
    while ray.available_resources().get("CPU", 0) < 2:  # Ray counts what is free a little later
        assert time.monotonic() < deadline
        time.sleep(0.1)
    train(memory, CONFIG, tmp_path / "adapter", resume=True)
    assert_same(tmp_path / "adapter", alone)


@pytest.mark.slow
def test_the_command_resumes_on_a_cluster(address, memory, alone, tmp_path, monkeypatch, capsys):
    train_stopped(memory, tmp_path / "adapter")
    settings = [f"--set={name}={value}" for name, value in TRAINING.items()]
    words = ["train", str(memory.path), "-o", str(tmp_path / "adapter"), *settings, "--set=checkpoint_every=2"]
    words += ["--engine", "ray", "--workers", "2", "--address", address, "--resume"]
    monkeypatch.setattr("sys.argv", ["pema", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    assert "held out loss" in printed.out
    assert_same(tmp_path / "adapter", alone)


def train_stopped(memory, output):
    """Begin a training in this process, and end it in its first epoch."""
    from pema.adapter.joint import JointRun

    step, steps = JointRun.step, iter(range(4))

    def limited(self, *given):
        if next(steps, None) is None:
            raise AdapterError("stopped")
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointRun, "step", limited)
        with pytest.raises(AdapterError, match="stopped"):
            train(memory, CONFIG, output)


# Without a cluster.


@pytest.fixture
def job(memory, tmp_path):
    (tmp_path / "adapter" / engine.MARK).mkdir(parents=True)
    digest = memory.manifest.to_dict()["digest"]
    return {
        "version": engine.__version__,
        "memory": str(memory.path),
        "digest": digest,
        "output": str(tmp_path / "adapter"),
    }


def test_a_worker_sees_what_the_command_sees(job, memory, tmp_path):
    engine._require_seen(job, "worker 1 on far")
    make_memory(tmp_path / "other", examples=8)
    for other in (tmp_path / "none", tmp_path / "other"):
        with pytest.raises(ConfigError, match=rf"worker 1 on far does not see the memory {other}: the machines of a"):
            engine._require_seen(job | {"memory": str(other)}, "worker 1 on far")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"worker 1 on far does not see the folder {tmp_path}/empty of this command"):
        engine._require_seen(job | {"output": str(tmp_path / "empty")}, "worker 1 on far")
    with pytest.raises(MismatchError, match=r"worker 1 on far has pema .*, the command 0\.0\.1: install the same"):
        engine._require_seen(job | {"version": "0.0.1"}, "worker 1 on far")
    with pytest.raises(ExternalMemoryError, match="memory://nowhere/m contains no memory"):
        engine._require_seen(job | {"memory": "memory://nowhere/m"}, "worker 1 on far")


def test_the_mark_is_removed_and_so_is_an_empty_folder(tmp_path):
    with engine._marked(str(tmp_path / "new" / "adapter")):
        assert (tmp_path / "new" / "adapter" / engine.MARK).exists()
        with (
            pytest.raises(StorageError, match=r"another process works in .*adapter"),
            engine._marked(str(tmp_path / "new" / "adapter")),
        ):
            pass
    assert list((tmp_path / "new").iterdir()) == []
    with engine._marked(str(tmp_path / "new")):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_private_training_launchers_and_impossible_settings_are_refused(memory, tmp_path, monkeypatch):
    private = preset("private", dp_epsilon=3.0, dp_delta=1e-3, rank=8, batch_size=10)
    with pytest.raises(ConfigError, match=r"dp_epsilon with engine='ray': private training runs in one process\. Omit"):
        train_on_ray(memory.path, private, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="workers=0 is too small: it must be at least 1"):
        train_on_ray(memory.path, CONFIG, tmp_path / "adapter", workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a training with engine='ray' runs in one process: start it without a lau"):
        train_on_ray(memory.path, CONFIG, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def attempts(monkeypatch):
    """A run whose attempts give the listed results or errors, one after the other; its arguments are recorded."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    import ray
    from ray import train as ray_train

    run = object.__new__(engine._Run)
    run._ray, run._train, results, run.calls = ray, ray_train, [], []

    def attempt(*arguments):
        run.calls.append(arguments)
        result = results[len(run.calls) - 1]
        if isinstance(result, Exception):
            raise result
        return result

    run._attempt, run.results = attempt, results
    return run


def group_error(**failures):
    from ray.train import WorkerGroupError

    return WorkerGroupError("why it ended", {int(rank[1:]): failure for rank, failure in failures.items()})


def test_the_workers_are_started_again_a_few_times(attempts, capsys):
    from ray.exceptions import RayError

    lost = group_error(r0=ProcessError("another process has ended"), r1=RuntimeError("killed"))
    attempts.results += [lost, RayError("why it ended"), {"a": 1}]
    assert attempts.to_the_end(False) == {"a": 1}
    assert attempts.calls == [(False, False), (True, True), (True, True)]
    assert capsys.readouterr().err.count("A worker has ended, and all continue from the last checkpoint: why it e") == 2
    attempts.calls.clear()
    attempts.results[:] = [lost] * (RESTARTS + 1)
    with pytest.raises(ProcessError, match=rf"have ended {RESTARTS + 1} times, at last: why it ended"):
        attempts.to_the_end(True)


def test_an_error_of_pema_is_not_tried_again(attempts):
    attempts.results.append(group_error(r0=ProcessError("another has failed"), r1=StorageError("the disk is full")))
    with pytest.raises(StorageError, match=r"^the disk is full$"):
        attempts.to_the_end(False)
    assert len(attempts.calls) == 1


def test_an_error_of_a_worker_has_a_type_that_ray_can_send(job, monkeypatch):
    class SpecialError(ExternalMemoryError):
        def __init__(self, first, second):
            super().__init__(f"{first} and {second}")

    def refuse(*_):
        raise SpecialError("this", "that")

    monkeypatch.setattr(engine, "_require_seen", refuse)
    monkeypatch.setattr(console, "_listener", None)
    news = type("News", (), {"put": lambda self, events: None})()
    with pytest.raises(ExternalMemoryError, match=r"^this and that$") as refused:
        engine.work(job | {"on_gpu": True, "news": news})
    assert type(refused.value) is ExternalMemoryError


def test_missing_libraries_are_named(monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(ConfigError, match=r"engine='ray' needs libraries that are not installed: .*ray"):
        engine._Run({}, 1, {})
