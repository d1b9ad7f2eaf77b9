"""Replicas on a Ray cluster: their settings, their share of a cluster, and how their errors arrive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pema import errors
from pema.cluster.config import EngineConfig
from pema.cluster.connection import resources, wanted
from pema.cluster.opening import replicas
from pema.cluster.replicas import Replicas
from pema.cluster.worker import told, value
from pema.errors import ConfigError, OwnerError, ProcessError


def test_a_cluster_that_cannot_be_reached_is_told(monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    import ray

    def refuse(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    message = r"the Ray cluster at 10\.0\.0\.9:6379 cannot be used: no route to host"
    with pytest.raises(ProcessError, match=message), replicas("embedded", address="10.0.0.9:6379"):
        pass


@pytest.mark.parametrize("name", ["workers", "address"])
def test_settings_of_ray_need_it(name):
    with pytest.raises(ConfigError, match=rf"{name}=3 is a setting of engine='ray': give that, or omit it"):
        EngineConfig(**{name: 3 if name == "workers" else "3"})


@pytest.mark.parametrize(
    ("nodes", "workers", "on_gpu", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 8.0}], None, False, (2, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 4, False, (4, 4, 0)),
        ([{"CPU": 2.0}], 5, False, (5, 1, 0)),
        ([{"CPU": 2.0}, {"CPU": 30.0}], 2, False, (2, 2, 0)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}], None, True, (8, 2, 1)),
        ([{"CPU": 16.0}, {"CPU": 16.0}], 3, False, (3, 8, 0)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}], None, True, (4, 2, 1)),
        ([{"memory": 1e9}, {"CPU": 4.0}, {"CPU": 4.0}], None, False, (2, 4, 0)),
        ([{}], None, False, (1, 1, 0)),
    ],
)
def test_replicas_divide_a_cluster(nodes, workers, on_gpu, expected):
    count, options = resources(nodes, workers, on_gpu, "device_map")
    assert (count, options["num_cpus"], options["num_gpus"]) == expected


@given(
    machines=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5),
    workers=st.none() | st.integers(1, 12),
    on_gpu=st.booleans(),
)
def test_all_replicas_have_a_place_wherever_one_cpu_each_gives_them_one(machines, workers, on_gpu):
    assume(not on_gpu or any(gpus for _, gpus in machines))
    count, options = resources([{"CPU": c, "GPU": g} for c, g in machines], workers, on_gpu, "device_map")

    def have_places(cpus):
        return sum(min(c // cpus, g) if on_gpu else c // cpus for c, g in machines) >= count

    assert have_places(options["num_cpus"]) or (options["num_cpus"] == 1 and not have_places(1))


def test_a_cluster_without_gpus_is_refused_for_a_plm_on_gpus():
    with pytest.raises(ConfigError, match="device_map is set, but the machines of the Ray cluster have no GPU"):
        resources([{"CPU": 8.0}], None, True, "device_map")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers=0 is too small"),
        ({"address": "a\nb"}, "address"),
        ({"dtyp": "float16"}, "dtyp.*dtype"),
        ({"dtype": "float12"}, "dtype"),
        ({"device_map": "cuda", "tap": "norm_input"}, "tap=norm_input has no effect with a function, which opens"),
    ],
)
def test_replicas_refuse_what_would_have_no_effect(given, message):
    with pytest.raises(ConfigError, match=message), replicas(dict, **given):
        pass


def test_the_head_of_a_replica_is_sent_as_bytes(tiny_plm):
    for tap in ("head_input", "norm_input"):
        plm = tiny_plm(tap=tap)
        answers, pool = [], object.__new__(Replicas)
        pool.ask = lambda function, plm=plm, answers=answers: answers.append(function(plm)) or answers[-1]
        head = pool.head()
        assert [type(value) for answer in answers for value in answer.values()] == [bytes]  # a tensor has a device
        assert head.fingerprint == plm.head().fingerprint
        assert head.settings == plm.head().settings
        for name, tensor in plm.head().state_dict().items():
            assert torch.equal(head.state_dict()[name], tensor)


def test_an_error_keeps_its_kind_and_its_text():
    def fail():
        raise error

    for kind in (OwnerError, errors.DataError, errors.StorageError):
        error = type("Special", (kind,), {"__module__": "elsewhere"})("why")
        with pytest.raises(kind, match=r"^why$"):
            value(told(fail))
    assert value(told(lambda: {"a": 1})) == {"a": 1}


TERMINATED = """
import os, signal, time
from pema.cluster.connection import connected

class Terminated(BaseException):
    pass

def terminate(number, frame):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
try:
    with connected(None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except Terminated:
    print("put away")
"""


@pytest.mark.slow
def test_signals_are_those_of_the_program(monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each))
    done = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, "put away\n"), done.stderr


def test_workers_that_wait_are_told_what_they_take_and_what_is_free(monkeypatch):
    library = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setattr(library, "available_resources", lambda: {"CPU": 1.5})
    told_of = wanted({"num_cpus": 2, "num_gpus": 1})
    assert told_of == "each takes 2 CPUs and 1 GPUs, of which 1.5 and 0 are free."
