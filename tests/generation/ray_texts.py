"""PLMs of replicas on a Ray cluster that generate: tiny ones, and some whose process or owner ends them."""

import os
import signal
from pathlib import Path

from pema.errors import OwnerError
from pema.owner.local import LocalPLM
from tiny import build_model, build_tokenizer


def open_tiny(family="llama"):
    return LocalPLM(build_model(family), build_tokenizer())


def open_mortal(flag, call):
    """A PLM whose process is killed at a call of `generate`, unless one has been before."""

    def end(number):
        if number == call and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _before_generate(end)


def open_fatal():
    """A PLM whose process is killed at its first batch, always."""
    return _before_generate(lambda number: os.kill(os.getpid(), signal.SIGKILL))


def open_refusing():
    """A PLM that its owner refuses at the second batch, and never afterwards."""

    def refuse(number):
        if number == 2:
            raise OwnerError("429: over the quota of the day")

    return _before_generate(refuse)


def _before_generate(act):
    plm = open_tiny()
    assert plm.generator is plm.model  # runs the trials, which generate too
    generate, number = plm.model.generate, 0

    def counted(*args, **kwargs):
        nonlocal number
        number += 1
        act(number)
        return generate(*args, **kwargs)

    plm.model.generate = counted
    return plm
