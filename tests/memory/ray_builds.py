"""PLMs of replicas on a Ray cluster, and a build on one that runs as a program: arguments address, folder."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from fake_plm import FakePLM, build

from pema.cluster.opening import replicas
from pema.errors import OwnerError

EXAMPLES = 64


def open_mortal(flag, answer):
    """A PLM whose process is killed at an answer, unless one has been before."""
    answers = iter(range(1, 10_000))

    def change(given, sequence):
        if next(answers) == answer and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return given

    return FakePLM(seconds=0.002, change=change)


def open_fatal():
    """A PLM whose process is killed at its first answer, always."""
    return FakePLM(change=lambda given, sequence: os.kill(os.getpid(), signal.SIGKILL))


def open_refusing():
    """A PLM that its owner refuses in the middle."""
    answers = iter(range(20))

    def change(given, sequence):
        if next(answers, None) is None:
            raise OwnerError("429: over the quota of the day")
        return given

    return FakePLM(change=change)


def open_failing():
    """A PLM that fails at its first answer, by an error of its own, and never afterwards."""
    answers = iter(range(10_000))

    def change(given, sequence):
        if next(answers) == 0:
            raise RuntimeError("the device has no memory left")
        return given

    return FakePLM(change=change)


def pid_of(plm):
    """A question to a replica: the number of its process."""
    return {"pid": os.getpid()}


def open_nothing():
    raise OwnerError("the PLM is not on this machine.")


def open_slow(seconds=0.02):
    return FakePLM(seconds=seconds)


def open_numbered(folder):
    """Another PLM in each process."""
    number = len(list(Path(folder).iterdir()))
    (Path(folder) / str(os.getpid())).touch()
    return FakePLM(name=f"fake{number}")


if __name__ == "__main__":
    with replicas(partial(open_slow, 0.05), workers=2, address=sys.argv[1]) as plm:
        build(sys.argv[2], EXAMPLES, plm=plm)
