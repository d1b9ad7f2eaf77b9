"""Fixtures of the tests of object storage: a cache of their own, no pauses, and storage that fails on request."""

import sys
from pathlib import Path

import pytest

from pema.storage import remote

sys.path[:0] = [str(Path(__file__).parent.parent / "memory")]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture
def faulty():
    """The storage behind `faulty://`, empty and without faults."""
    from faulty_files import FaultyFiles

    FaultyFiles.store.clear()
    FaultyFiles.pseudo_dirs[:] = [""]
    FaultyFiles.calls.clear()
    FaultyFiles.faults.clear()
    return FaultyFiles
