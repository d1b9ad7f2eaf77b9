"""Several processes of one command, as a launcher starts them, with a fault planted in one of them."""

import json
import multiprocessing
import os
import signal
import sys
import types
from contextlib import suppress

from torch.distributed import TCPStore

LIMIT = 240
"""Seconds that the processes may take on a busy machine; a hang is longer."""


def run(rank, count, port, files, arguments, plant, program):
    """Run the command line as process `rank`; `plant`: (rank, name of a method of JointRun, its call, what to do)."""
    os.dup2(os.open(files / f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(files / f"err-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if count > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        # As with torchrun and accelerate launch, the store of the processes outlives them.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    import torch

    torch.set_num_threads(1)
    from pema import cli

    if plant is not None and plant[0] == rank:
        set_plant(*plant[1:])
    sys.argv = ["pema"]
    if program is None:
        sys.argv += [argument.format(rank=rank) for argument in arguments]
    else:  # with the command line's exit codes and messages
        sys.modules["pema.cli.app"] = types.SimpleNamespace(app=lambda **_: program(rank, *arguments))
    cli.main()


def set_plant(name, call, action):
    from pema.adapter.joint import JointRun
    from pema.errors import AdapterError

    original, calls = getattr(JointRun, name), 0

    def planted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise AdapterError("a planted fault.")
        return original(*arguments)

    setattr(JointRun, name, planted)


def launch(files, count, *arguments, plant=None, program=None):
    """Run a command in `count` processes; returns their exit codes, and what each printed on stdout and stderr.

    In an argument `{rank}` is the number of the process. `program`: a function of a module that is called with the
    number and the arguments instead of the command.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    with suppress(RuntimeError):
        # torch._dynamo is what making an optimizer imports.
        modules = ["pema.adapter.training", "pema.cli.app", "accelerate", "torch._dynamo"]
        context.set_forkserver_preload(modules)
    files.mkdir(exist_ok=True)
    children = [
        context.Process(target=run, args=(rank, count, store.port, files, arguments, plant, program))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(LIMIT)
        codes = [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()
            child.join(10)
    printed = [[(files / f"{name}-{rank}").read_text() for rank in range(count)] for name in ("out", "err")]
    assert None not in codes, f"a process did not end: {codes}, {printed[1]}"
    return codes, *printed


def settings(**values):
    """The options of settings."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value).strip(chr(34))}")]
