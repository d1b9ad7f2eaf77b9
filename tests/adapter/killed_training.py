"""A training run in a child process that is killed at a chosen call or after a chosen time."""

import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path

SETTINGS = {"epochs": 3, "batch_size": 32, "checkpoint_every": 3, "log_every": 2, "patience": 9}
PRIVATE_SETTINGS = {
    "rank": 8,
    "batch_size": 10,
    "epochs": 2,
    "checkpoint_every": 3,
    "dp_epsilon": 3.0,
    "dp_delta": 1e-3,
}


def run(memory, output, preset, after_calls, after_seconds):
    """Train with resume; die before call number `after_calls` of anything that touches the disk or the weights."""
    import torch

    torch.set_num_threads(1)
    import pema.files
    from pema.adapter import joint, private, secret, training
    from pema.adapter.log import Log
    from pema.adapter.presets import preset as preset_of
    from pema.memory.reader import Memory

    left = after_calls

    def dying(function):
        def call(*arguments, **values):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **values)

        return call

    for owner, name in (
        (pema.files, "sync"),
        (pema.files, "remove"),
        (Path, "replace"),
        (Log, "write"),
        (joint.JointRun, "step"),
        (joint.JointRun, "measure"),
        (private.PrivateRun, "step"),
    ):
        setattr(owner, name, dying(getattr(owner, name)))
    if after_seconds is not None:
        # Without a handler the alarm ends the process at once, wherever it is.
        signal.setitimer(signal.ITIMER_REAL, after_seconds)
    config = preset_of("paper" if preset == "paper" else "residual", **SETTINGS)
    if preset == "private":
        config = preset_of("private", **PRIVATE_SETTINGS)
        # A run that dies before its first checkpoint draws a new key: here it draws the same.
        secret.secrets.token_bytes = lambda n: b"k" * n
    training.train(Memory.open(memory), config, output, resume=True)


def start(memory, output, preset, *, after_calls=None, after_seconds=None):
    """Run in a fresh process; returns whether it lived to the end."""
    context = multiprocessing.get_context("forkserver")
    with suppress(RuntimeError):
        # torch._dynamo is what making an optimizer imports.
        context.set_forkserver_preload(["pema.adapter.training", "pema.memory.reader", "torch._dynamo"])
    child = context.Process(target=run, args=(memory, output, preset, after_calls, after_seconds))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL, -signal.SIGALRM), f"the child failed: {child.exitcode}"
    return child.exitcode == 0
