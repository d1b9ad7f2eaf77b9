"""Builds killed at random moments and resumed, compared by bytes. It runs as a program, because it forks.

Arguments: a folder, how many kills. Prints a line per folder that was killed: what lay there at each kill.
"""

import os
import pathlib
import random
import signal
import sys
import time

import torch
from fake_plm import FakePLM, build, files, some_examples

from pema.memory import journal
from pema.memory.reader import Memory

EXAMPLES = 24


def slow_write(path, data):
    """Write in three pieces with pauses, so that kills fall into them."""
    with path.open("wb") as file:
        for k in range(3):
            file.write(data[k * len(data) // 3 : (k + 1) * len(data) // 3])
            file.flush()
            time.sleep(0.004)


def run(folder, **settings):
    """One build, in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            pathlib.Path.write_bytes = slow_write
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            journal.SECONDS = 0.003
            build(folder, some_examples(EXAMPLES, settings.pop("seed")), plm=FakePLM(seconds=0.001), **settings)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return child


def ended(child, within):
    """The exit status of a child, or None when it runs on."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def builds(folder, settings, kills, dice, longest=0.0):
    """Run the build to its end, killed up to `kills` times within `longest` seconds; what lay there at each kill."""
    seen = []
    while True:
        child = run(folder, **settings)
        status = ended(child, dice.uniform(0, longest) if len(seen) < kills else 60)
        if status == 0:
            return seen
        assert status is None, f"a build ended with {status}"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = {path.name for path in folder.rglob("*")} if folder.exists() else set()
        seen.append((sum(name.endswith(".safetensors") for name in names), any("partial" in name for name in names)))


def main(folder, kills):
    dice = random.Random(7)
    count = round_ = 0
    expected = {}
    while count < kills:
        settings = {
            "seed": 0,
            "dtype": dice.choice(["float16", "int8"]),
            "contexts": dice.choice(["teacher", "predicted"]),
        }
        appended = settings | {"seed": 1, "append": True}
        key = (settings["dtype"], settings["contexts"])
        if key not in expected:
            place = folder / "-".join(key)
            started = time.monotonic()
            assert builds(place, settings, 0, dice) == []
            assert builds(place, appended, 0, dice) == []
            # The machine may be busy: kills fall where a build of its speed is at work.
            expected[key] = files(place), (time.monotonic() - started) / 2
        broken = folder / f"killed-{round_}"
        whole, seconds = expected[key]
        seen = builds(broken, settings, 4, dice, seconds) + builds(broken, appended, 4, dice, seconds)
        assert files(broken) == whole, f"{broken} differs"
        assert Memory.open(broken).examples == 2 * EXAMPLES
        count += len(seen)
        round_ += 1
        sys.stdout.write(f"{seen}\n")
    sys.stdout.write(f"{count} kills\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
