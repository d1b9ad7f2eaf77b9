"""Behaviour without extras: the main functions work, and errors name the command that installs an extra.

`make test-package` runs these in an environment without any extra, with PEMA_EXTRAS=none: there none may be skipped.
"""

import os
import re
import shlex
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pema
from pema.adapter.accounting import noise_multiplier
from pema.adapter.log import Log
from pema.cli import main
from pema.cluster.opening import replicas
from pema.errors import PemaError
from pema.experiments.data import support_data
from pema.extras import installs
from pema.memory.reader import Memory
from pema.methods.knn_index import faiss_library
from pema.methods.peft_methods import LoRA
from pema.owner.llamacpp.process import Settings, start
from pema.owner.local import LocalPLM
from pema.owner.openai_api.client import Client
from pema.owner.openai_api.config import APIConfig
from pema.processes import join
from pema.tasks.readers import read_examples

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def gguf_file(folder):
    """The beginning of a GGUF file."""
    path = folder / "plm.gguf"
    path.write_bytes(b"GGUF")
    return path


def join_as_one_of_two(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        join.cache_clear()
        join()


CALLS = {
    "datasets": ("datasets", lambda folder: read_examples(data=folder)),
    "device-map": ("accelerate", lambda folder: LocalPLM.load("embedded", device_map="auto")),
    "gguf": ("gguf", lambda folder: LocalPLM.load(gguf_file(folder))),
    "knn": ("faiss", lambda folder: faiss_library()),
    "llamacpp": ("xllamacpp", lambda folder: start(Settings(str(gguf_file(folder)), 64, 64, 1))),
    "openai": ("openai", lambda folder: Client(APIConfig(base_url="https://a/v1", model="m", tokenizer="t"))),
    "parallel": ("accelerate", join_as_one_of_two),
    "ray": ("ray", lambda folder: replicas("embedded").__enter__()),
    "peft": ("peft", lambda folder: LoRA().config()),
    "private": ("opacus", lambda folder: noise_multiplier(8.0, 1e-3, 0.1, 10)),
    "s3": ("s3fs", lambda folder: Memory.open("s3://bucket/memory")),
    "tensorboard": ("tensorboard", lambda folder: Log(folder, 0, True, 0)),
}
"""A call that needs an extra, by its name, and the module that it brings."""


@pytest.mark.parametrize("extra", CALLS)
def test_a_missing_extra_says_how_to_install_it(tmp_path, extra):
    module, call = CALLS[extra]
    if find_spec(module) and os.environ.get("PEMA_EXTRAS") != "none":
        pytest.skip(f"{module} is installed")
    with pytest.raises(PemaError, match=re.escape(installs(extra))):
        call(tmp_path)


def test_a_server_without_its_extra_says_how_to_install_it(monkeypatch, capsys):
    if find_spec("fastapi") and os.environ.get("PEMA_EXTRAS") != "none":
        pytest.skip("fastapi is installed")
    monkeypatch.setattr("sys.argv", ["pema", "serve", "embedded"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code
    assert installs("serve") in " ".join(capsys.readouterr().err.split())


def test_every_extra_is_tried():
    assert set(EXTRAS) == {*CALLS, "serve"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_command_names_the_packages_and_not_pema(extra):
    if extra not in (metadata.metadata("pema").get_all("Provides-Extra") or ()):
        pytest.skip(f"the installed pema is older than the extra {extra}: make setup")
    pip, install, *packages = shlex.split(installs(extra))
    assert (pip, install) == ("pip", "install")
    assert {Requirement(package) for package in packages} == {Requirement(package) for package in EXTRAS[extra]}


def test_without_an_installation_the_command_names_the_extra(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert installs("peft") == "install the packages of the extra 'peft', which pyproject.toml lists"


def test_the_main_job_needs_no_extra(tmp_path):
    plm, task = LocalPLM.load("embedded"), pema.get_task("translation")
    memory = pema.build_memory(plm, support_data().train[:24], task, tmp_path / "memory")
    adapter, _ = pema.train(memory, pema.preset("residual", epochs=1), tmp_path / "adapter")
    (text,) = pema.generate(plm, adapter, ["Where is your order?"], task, pema.Constant(0.7))
    assert text
