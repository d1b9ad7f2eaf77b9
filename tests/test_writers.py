"""Every writer of the package, with a fault at every step: either the old or the new content remains."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.faults import failing, killed, leftovers, no_space

import pema

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "memory"), str(HERE / "adapter")]

from fake_plm import build, some_examples  # noqa: E402

from pema.adapter.checkpoint import Checkpoint, State  # noqa: E402
from pema.adapter.config import AdapterConfig, TrainConfig  # noqa: E402
from pema.adapter.log import Log  # noqa: E402
from pema.adapter.module import Adapter  # noqa: E402
from pema.errors import PemaError, StorageError  # noqa: E402
from pema.evaluation.outputs import write_hypotheses  # noqa: E402
from pema.files import read_json, write_json  # noqa: E402
from pema.memory.merge import merge  # noqa: E402
from pema.memory.sample import sample  # noqa: E402
from pema.memory.verify import verify  # noqa: E402
from pema.owner.head import Head  # noqa: E402
from pema.owner.mask import Mask  # noqa: E402


def head(number):
    return Head(torch.full((5, 4), float(number)))


def adapter(number):
    made = Adapter(AdapterConfig(d=4, vocabulary_size=5, rank=2))
    made.A.data.fill_(number)
    return made


def checkpoint(folder):
    return Checkpoint(folder / "a", TrainConfig(), "digest")


def last_line(folder):
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["step"] if lines else None


def write_log(folder, number):
    log = Log(folder, 10**6, False, 0)
    log.write("event", number, {})
    log.sync()


WRITERS = {
    "head": (lambda f, n: head(n).save(f / "h"), lambda f: int(Head.load(f / "h").weight[0, 0])),
    "json": (lambda f, n: write_json(f / "j", {"n": n}), lambda f: read_json(f / "j")["n"]),
    "hypotheses": (lambda f, n: write_hypotheses(f / "o", [str(n)]), lambda f: int((f / "o").read_text())),
    "checkpoint": (
        lambda f, n: checkpoint(f).save(State(step=n), {"A": torch.full((3,), float(n))}),
        lambda f: checkpoint(f).load({"A": (3,)}, {})[0].step,
    ),
    "log": (write_log, last_line),
    "adapter": (
        lambda f, n: adapter(n).save_pretrained(f / "a"),
        lambda f: int(Adapter.from_pretrained(f / "a").A[0, 0]),
    ),
}
"""Each: what writes the number n into a folder, and what reads it."""

KILLED = ("head", "json", "checkpoint", "log", "adapter")
"""Those that are killed: a folder, files of either kind, a file that grows, and several files together."""


def outcome(read, folder):
    """The number that lies there; None where reading is refused by name."""
    try:
        return read(folder)
    except PemaError:
        return None


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_at_any_step(tmp_path, name, behind):
    write, read = WRITERS[name]
    for at in itertools.count():
        write(tmp_path, 1)
        said = ""
        with failing(at, no_space, behind) as taken:
            try:
                write(tmp_path, 2)
            except StorageError as error:
                said = str(error)
        assert not said or "No space left" in said
        found = outcome(read, tmp_path)
        # An adapter is several files: between two of them it is neither, and refused by its checksum.
        assert found in ((1, 2, None) if name == "adapter" else (1, 2))
        if name not in ("adapter", "log") and said:
            assert found == (1 if "Nothing was changed" in said else 2)
        write(tmp_path, 3)
        assert read(tmp_path) == 3
        assert not leftovers(tmp_path)
        if len(taken) <= at:
            break
    assert at >= (1 if name == "log" else 4)


def test_a_secret_is_whole_or_absent(tmp_path):
    for at in itertools.count():
        with failing(at, no_space) as taken:
            try:
                Mask.create(tmp_path / "secret")
            except StorageError as error:
                assert "Nothing was changed there" in str(error)  # noqa: PT017
                assert not (tmp_path / "secret").exists()
        Mask.create(tmp_path / "secret")
        assert len(Mask.read(tmp_path / "secret").secret) == 32
        assert not [p for p in leftovers(tmp_path) if "rmtree" not in taken]
        (tmp_path / "secret").unlink()
        shutil.rmtree(tmp_path / "secret.partial", ignore_errors=True)
        if len(taken) <= at:
            break
    assert at >= 4


@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_at_any_step_of_merging_and_sampling(tmp_path, behind):
    build(tmp_path / "a", 4)
    build(tmp_path / "b", some_examples(4, seed=1))
    for write in (
        lambda out: merge([tmp_path / "a", tmp_path / "b"], out),
        lambda out: sample(tmp_path / "a", out, 20),
    ):
        for at in itertools.count(int(behind), 2):
            said = ""
            with failing(at, no_space, behind) as taken:
                try:
                    write(tmp_path / "c")
                except StorageError as error:
                    said = str(error)
            if (tmp_path / "c").exists():
                assert "Nothing was changed" not in said
                verify(tmp_path / "c")
                shutil.rmtree(tmp_path / "c")
            write(tmp_path / "c")
            assert not leftovers(tmp_path)
            shutil.rmtree(tmp_path / "c")
            if len(taken) <= at:
                break
        assert at > 8


def test_a_full_disk_at_any_step_of_a_build(tmp_path):
    whole = build(tmp_path / "whole", 5, examples_per_shard=4).manifest
    for at in itertools.count(0, 3):
        with failing(at, no_space) as taken:
            try:
                build(tmp_path / "m", 5, examples_per_shard=4)
            except StorageError as error:
                assert "No space left" in str(error)  # noqa: PT017
        assert build(tmp_path / "m", 5, examples_per_shard=4).manifest == whole
        assert not leftovers(tmp_path)
        shutil.rmtree(tmp_path / "m")
        if len(taken) <= at:
            break
    assert at > 20


def main(folder):
    """Kill each writer at each of its steps."""
    torch.set_num_threads(1)
    for name in KILLED:
        write, read = WRITERS[name]
        place = folder / name
        place.mkdir()
        for at in itertools.count():
            write(place, 1)
            if not killed(at, lambda: write(place, 2)):  # noqa: B023
                break
            found = outcome(read, place)
            assert found in ((1, 2, None) if name == "adapter" else (1, 2)), (name, at, found)
            write(place, 3)
            assert read(place) == 3, (name, at)
            assert not leftovers(place), (name, at, leftovers(place))
        assert at >= (1 if name == "log" else 4), (name, at)
        sys.stdout.write(f"{name} {at}\n")


def test_a_kill_at_any_step(tmp_path):
    paths = [Path(pema.__file__).parents[1], HERE.parent]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_writers", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(KILLED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
