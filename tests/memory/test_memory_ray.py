"""Builds on a Ray cluster: the bytes of one process, whichever of its processes dies."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from fake_plm import FakePLM, build, files
from ray_builds import (
    EXAMPLES,
    open_failing,
    open_fatal,
    open_mortal,
    open_nothing,
    open_numbered,
    open_refusing,
    open_slow,
    pid_of,
)

from pema.cli import main
from pema.cluster.opening import replicas
from pema.cluster.replicas import Replicas
from pema.errors import ConfigError, MismatchError, OwnerError, ProcessError
from pema.memory.manifest import Manifest
from pema.processes import Processes

LIMIT = 240
KINDS = {"teacher": {}, "int8": {"dtype": "int8"}, "predicted": {"contexts": "predicted", "targets": "aligned"}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {name: files(build(folder / name, EXAMPLES, **kind).path) for name, kind in KINDS.items()}


def test_the_files_are_those_of_one_process(ray, alone, tmp_path):
    with replicas(FakePLM, workers=2) as plm:
        for name, kind in KINDS.items():
            build(tmp_path / name, EXAMPLES, plm=plm, **kind)
            assert files(tmp_path / name) == alone[name]


def test_what_one_process_has_been_answered_is_forecast_as_asked_again_and_removed(ray, alone, tmp_path):
    answers = iter(range(5))

    def change(given, sequence):
        if next(answers, None) is None:
            raise OwnerError("429: over the quota of the day")
        return given

    with pytest.raises(OwnerError, match="429"):
        build(tmp_path / "m", EXAMPLES, plm=FakePLM(change=change))
    assert list((tmp_path / "m").glob("*.journal"))
    asked = []
    with replicas(FakePLM, workers=1) as plm:
        plm.forecast = lambda contexts, lengths: asked.append(len(lengths)) or []
        build(tmp_path / "m", EXAMPLES, plm=plm)
    assert asked == [EXAMPLES]
    assert files(tmp_path / "m") == alone["teacher"]


def test_replicas_outlive_an_error_of_each_and_a_death_between_two_calls(ray, alone, tmp_path, capsys):
    with replicas(open_failing, workers=2) as plm:
        plm.wait_for_all()
        with pytest.raises(RuntimeError, match="the device has no memory left"):
            build(tmp_path / "m", EXAMPLES, plm=plm)
        plm.ask(pid_of)
        while plm._left:  # the other one has failed too, which is dropped
            plm._step({})
        build(tmp_path / "m", EXAMPLES, plm=plm)
        assert files(tmp_path / "m") == alone["teacher"]
        first = plm.ask(pid_of)["pid"]
        os.kill(first, signal.SIGKILL)
        assert plm.ask(pid_of)["pid"] != first
        assert "A worker has ended, its work is given to another" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(ray, alone, tmp_path, capsys):
    with replicas(partial(open_mortal, str(tmp_path / "flag"), 12), workers=2) as plm:
        build(tmp_path / "m", EXAMPLES, plm=plm)
    assert (tmp_path / "flag").exists()
    assert "A worker has ended, its work is given to another" in capsys.readouterr().err
    assert files(tmp_path / "m") == alone["teacher"]


@pytest.mark.slow
def test_examples_that_end_every_worker_are_named(ray, tmp_path):
    with replicas(open_fatal, workers=1) as plm, pytest.raises(ProcessError, match="3 workers ended at the examples d"):
        build(tmp_path / "m", 8, plm=plm)


@pytest.mark.slow
def test_an_error_of_the_plm_ends_the_build_and_it_resumes_without_ray(ray, alone, tmp_path):
    with (
        replicas(open_refusing, workers=1) as plm,
        pytest.raises(OwnerError, match=r"^429: over the quota of the day$"),
    ):
        build(tmp_path / "m", EXAMPLES, plm=plm)
    assert len(Manifest.read(tmp_path / "m").shards) == 2
    plm = FakePLM()
    build(tmp_path / "m", EXAMPLES, plm=plm)
    assert len(plm.calls) == 6
    assert files(tmp_path / "m") == alone["teacher"]


@pytest.mark.slow
def test_a_plm_that_cannot_be_opened_is_told(ray):
    message = "the PLM is not on this machine"
    with pytest.raises(OwnerError, match=message) as error, replicas(open_nothing, workers=2):
        pass
    deadline = time.monotonic() + LIMIT
    while ray.available_resources().get("CPU") != 2:  # the workers have ended, though the error refers to them
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert error.traceback


@pytest.mark.slow
def test_workers_with_different_plms_are_refused(ray, tmp_path):
    def admit():
        with replicas(partial(open_numbered, str(tmp_path)), workers=2) as plm:
            plm.wait_for_all()

    with pytest.raises(MismatchError, match="the PLM of another worker belongs to another PLM"):
        admit()


@pytest.mark.slow
def test_the_death_of_a_machine_is_survived(cluster, alone, tmp_path):
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    with replicas(open_slow, workers=2, address=cluster.address) as plm:
        removed = []

        class Removing(Replicas):
            def _step(self, running):
                ended = super()._step(running)
                if ended and not removed:
                    removed.append(node)
                    cluster.remove_node(node, allow_graceful=False)
                return ended

        plm.wait_for_all()
        plm.__class__ = Removing
        build(tmp_path / "m", EXAMPLES, plm=plm)
    assert removed
    assert files(tmp_path / "m") == alone["teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("with_ray", [True, False])
def test_the_death_of_the_driver_is_survived(cluster, alone, tmp_path, with_ray):
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    command = [sys.executable, Path(__file__).with_name("ray_builds.py"), cluster.address, tmp_path / "m"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            deadline = time.monotonic() + LIMIT
            while len(list((tmp_path / "m").glob("shard-*.safetensors"))) < 3:
                assert time.monotonic() < deadline
                assert driver.poll() is None
                time.sleep(0.02)
        finally:
            driver.kill()
    assert not Manifest.read(tmp_path / "m").complete
    if with_ray:
        with replicas(FakePLM, workers=2, address=cluster.address) as plm:
            build(tmp_path / "m", EXAMPLES, plm=plm)
    else:
        plm = FakePLM()
        build(tmp_path / "m", EXAMPLES, plm=plm)
        assert len(plm.calls) <= 6  # the third shard may have been written without its receipt
    assert files(tmp_path / "m") == alone["teacher"]


def test_a_launcher_and_ray_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("pema.memory.build.join", lambda: Processes(0, 2))
    with pytest.raises(ConfigError, match="replicas on a Ray cluster with 2 processes: start one"):
        build(tmp_path / "m", 8, plm=object.__new__(Replicas))


def test_ray_with_an_adapter_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("pema.cli.build.require_library", lambda *_: None)
    words = ["build", "--plm", "embedded", "--task", "style", "--data", "x", "--engine", "ray", "--adapter", "a"]
    monkeypatch.setattr("sys.argv", ["pema", *words, "-o", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pema: --engine ray is for one process without an adapter" in capsys.readouterr().err
