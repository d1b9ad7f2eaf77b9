"""The signature identifies the origin of a number."""

import json
import subprocess
from importlib.metadata import version

import torch

from pema import __version__
from pema.signature import commit, machine, signature


def test_it_is_json_and_whole():
    found = signature({"rank": 4}, 3)
    assert json.loads(json.dumps(found)) == found
    assert (found["config"], found["seed"]) == ({"rank": 4}, 3)
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["pema"] == __version__
    assert found["machine"]["threads"] == torch.get_num_threads()


def test_it_names_no_host():
    known = {"platform", "processor", "cores", "threads", "cpu_capability", "memory_bytes", "accelerator"}
    assert set(machine()) <= known


def test_the_commit_is_none_outside_a_checkout(monkeypatch):
    def fail(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert commit() is None
