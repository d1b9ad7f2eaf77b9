"""Child processes that end with their parent, for whatever reason it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pema.lifeline import child

CHILD = "import os, sys, time; from pema import lifeline; {setup}; lifeline.end_with_parent(); {work}"
PARENT = """
import sys
from pema.lifeline import child
with child([sys.executable, "-c", {source!r}]) as process:
    print(process.stderr.readline(), flush=True)
    process.wait()
"""
READY = "print(os.getpid(), file=sys.stderr, flush=True)"
NO_KERNEL = "sys.platform = 'another'"  # what lifeline does where there is no prctl


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("setup", ["0", NO_KERNEL], ids=["kernel", "pipe"])
def test_a_child_ends_with_its_parent(number, setup):
    source = CHILD.format(setup=setup, work=f"{READY}; time.sleep(60)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(source=source)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        started = int(parent.stdout.readline())
        assert is_running(started)
        parent.send_signal(number)
        parent.wait(30)
        assert wait_until(lambda: not is_running(started))
    finally:
        parent.kill()
        parent.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_with_an_exception_of_the_block():
    source = CHILD.format(setup="0", work=f"{READY}; time.sleep(60)")
    started = []

    def fail():
        with child([sys.executable, "-c", source]) as process:
            started.append(int(process.stderr.readline()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not is_running(*started)


def test_a_child_that_ends_by_itself_keeps_its_exit_code_and_output():
    source = CHILD.format(setup="0", work="sys.exit('no memory')")
    with child([sys.executable, "-c", source]) as process:
        assert process.stderr.read() == "no memory\n"
        assert process.wait() == 1
    assert process.returncode == 1
    assert process.stdin.closed
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
