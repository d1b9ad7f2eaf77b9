"""Fixtures shared by all tests.

`tiny_model(family)` is a transformers causal LM with random weights, `tiny_tokenizer()` a byte-level tokenizer, and
`tiny_plm(family, tap=...)` the two behind the owner's contract.
"""

import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from tiny import build_model, build_tokenizer

# A busy machine is slow, not wrong. `make test` tries the same examples every time; `make nightly` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("new", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


class Deprecations(logging.Handler):
    """Fails the call of a name that transformers' log says is deprecated, as a DeprecationWarning does."""

    def emit(self, record):
        assert "deprecated" not in record.getMessage(), record.getMessage()


@pytest.fixture(scope="session", autouse=True)
def _deprecations():
    logger, handler = logging.getLogger("transformers"), Deprecations()
    if os.environ.get("PEMA_DEPRECATIONS") != "ignored":
        logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _signals():
    """Let signals have their default effect: a job in the background ignores some, and so would children of tests."""
    ignored = [each for each in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_IGN]
    for each in ignored:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)


@pytest.fixture(scope="session")
def tiny_model():
    return build_model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_plm():
    from pema.owner.local import LocalPLM

    def build(family="llama", *, tap="head_input", seed=0, dtype=torch.float32, bos=True):
        return LocalPLM(build_model(family, seed=seed, dtype=dtype), build_tokenizer(bos=bos), tap=tap)

    return build


@pytest.fixture(scope="module")
def ray():
    """Ray, with a cluster of one machine."""
    library = pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default workers get little of a busy processor
        path = os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each)
        patch.setenv("PYTHONPATH", path)
        library.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield library
        library.shutdown()


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two machines with a CPU each."""
    library = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    library.shutdown()  # a process stays connected to a cluster that it has: to that of `ray`
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        yield made
    finally:
        library.shutdown()
        made.shutdown()
