"""A build of one of several processes, with a fault planted in it."""

import os
import signal
import time
from dataclasses import replace

import torch
from fake_plm import FakePLM, build, some_examples

from pema import exchange
from pema.memory import journal
from pema.memory.engines.launched import Team
from pema.memory.reader import Memory


def build_as(rank, folder, settings, fault=None):
    """Build as process `rank`; each answer is a line in `folder`.answers. `fault`: (rank, answer, what happens)."""
    exchange.SECONDS, journal.SECONDS = 0.02, 0.0
    settings = dict(settings)
    examples, seed = settings.pop("examples", 40), settings.pop("seed", 0)
    answered = 0

    def change(answer, sequence):
        nonlocal answered
        answered += 1
        if fault is not None and (rank, answered) == tuple(fault[:2]):
            if fault[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault[2] == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            return replace(answer, representations=answer.representations * torch.nan)
        with folder.with_name(f"{folder.name}.answers").open("a") as file:
            file.write(f"{rank} {' '.join(map(str, sequence))}\n")
        return answer

    if fault is not None and fault[2] == "late" and rank == fault[0]:
        join = Team.join

        def late(team):
            time.sleep(1.0)
            return join(team)

        Team.join = late
    # The pace of the processes differs, so that shards are written out of order.
    plm = FakePLM(seconds=0.003 * (1 + rank), change=change)
    if fault is not None and fault[2] == "other input" and rank == fault[0]:
        seed += 1
    memory = build(folder, some_examples(examples, seed), plm=plm, **settings)
    assert isinstance(memory, Memory)
