"""What workers of a training on Ray do in tests: `work` with a fault planted in one, or with its reads counted.

As a program it is the command of a user: arguments address, memory, output. Its writer's steps take a second each.
"""

import json
import os
import sys
import time
from pathlib import Path

from launched import set_plant
from pema.adapter import joint
from pema.adapter import ray as engine
from pema.adapter.joint import JointRun
from pema.adapter.presets import preset
from pema.memory.shard import ShardFile

TRAINING = {"rank": 16, "copy_width": 8, "batch_size": 24, "epochs": 2, "log_every": 1, "precision": "float32"}
CONFIG = preset("best", **TRAINING, checkpoint_every=2)

work = engine.work


def work_planted(flags, rank, name, calls, action, job):
    """In its k-th life worker `rank` fails at call number `calls[k]` of a method of `JointRun`."""
    life = len(list(Path(flags).iterdir()))
    if os.environ["RANK"] == str(rank) and life < len(calls):
        (Path(flags) / str(life)).touch()
        set_plant(name, calls[life], action)
    return work(job)


def work_slowly(job, folder=None):
    """Take a second for each step, and write on which machine of the cluster, if a folder is given."""
    if folder is not None:
        import ray

        (Path(folder) / os.environ["RANK"]).write_text(ray.get_runtime_context().get_node_id())
    step = JointRun.step

    def slow(self, part):
        time.sleep(1.0)
        return step(self, part)

    JointRun.step = slow
    return work(job)


def work_counted(folder, job):
    """Write which rows of representations each worker maps for the closed form: [file, start, stop] for each block."""
    closed_form, window = joint.closed_form, ShardFile.window

    def counted(*arguments):
        read = []

        def reading(file, name, start, stop):
            if name == "representations":
                read.append([file.path.name, start, stop])
            return window(file, name, start, stop)

        ShardFile.window = reading
        result = closed_form(*arguments)
        ShardFile.window = window
        (Path(folder) / os.environ["RANK"]).write_text(json.dumps(read))
        return result

    joint.closed_form = counted
    return work(job)


if __name__ == "__main__":
    engine.work = work_slowly
    address, memory, output = sys.argv[1:]
    engine.train_on_ray(memory, CONFIG, output, workers=2, address=address)
