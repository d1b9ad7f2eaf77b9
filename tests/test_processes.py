"""The processes of a command; several of them are in tests/adapter/test_parallel.py."""

import pytest
import torch

from pema import console, processes
from pema.cli import main
from pema.errors import ConfigError, ProcessError
from pema.processes import ALONE, Processes, join, launched, require_single


@pytest.fixture
def two(monkeypatch):
    """The environment of one of two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize(("n", "count"), [(0, 3), (1, 2), (7, 3), (10, 4), (3, 5)])
def test_the_parts_are_all_items_in_order_and_equal_up_to_one(n, count):
    parts = [list(range(n))[Processes(rank, count).part(n)] for rank in range(count)]
    assert [item for part in parts for item in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_gets_what_it_gave():
    x = torch.arange(3)
    assert ALONE.add(x) is x
    assert ALONE.gather(x) is x
    values, tensors = ALONE.same({"a": 1}, {"x": x})
    assert values == {"a": 1}
    assert tensors["x"] is x
    assert ALONE.is_writer


@pytest.mark.parametrize("name", processes.SIZES)
def test_a_launcher_is_known_by_its_environment(name, monkeypatch):
    assert not launched()
    for size, several in (("1", False), ("", False), ("two", False), ("2", True)):
        monkeypatch.setenv(name, size)
        assert launched() == several


def test_without_a_launcher_there_is_one_process():
    assert join() is ALONE


def test_what_runs_in_one_process_is_refused(two, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="pema generate runs in one process: start it without a launcher"):
        require_single("pema generate")
    monkeypatch.setattr("sys.argv", ["pema", "evaluate", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pema: pema evaluate runs in one process" in capsys.readouterr().err


def test_accelerate_is_named_if_it_is_missing(two, monkeypatch):
    monkeypatch.setattr("pema.extras.find_spec", lambda name: None)
    join.cache_clear()
    with pytest.raises(
        ConfigError, match=r"needs the library accelerate, which is not installed: .*(accelerate|parallel)"
    ):
        join()


def test_processes_that_cannot_be_connected_are_told(two, monkeypatch):
    class Unreachable:
        def __init__(self, **_):
            raise RuntimeError("no route to host")

    monkeypatch.setattr("accelerate.PartialState", Unreachable)
    join.cache_clear()
    with pytest.raises(ProcessError, match="the processes of this command cannot be connected: no route to host"):
        join()


def test_a_silent_process_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console.stderr, "quiet", False)
    monkeypatch.setattr(console.stdout, "quiet", False)
    console.silence()
    console.note("a note")
    with console.progress("work", 3, "steps") as advance:
        advance(1)
    console.stdout.print("a result")
    assert capsys.readouterr() == ("", "")
