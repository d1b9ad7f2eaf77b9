"""Time, memory and loss of every stage of a large memory: `python -m reproduction.million_pairs`.

A PLM of OPT-1.3B's width and vocabulary with random weights represents texts of a bigram language. Each stage is a
separate process; its result replaces its previous one in the results file. What lies in the folder is used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from pema.files import read_json
from reproduction.child import run_module
from reproduction.lines import put_run
from reproduction.million_pairs.options import Setting, Stage
from reproduction.million_pairs.process import OUT
from reproduction.tables.million_pairs import FILE

STAGES = ("build", "verify", "reconstruct", "train,float16,residual")


def main() -> None:
    """Run the requested stages."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduction.million_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of the PLM, the texts and the memories")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="kind,memory,preset,vocabulary,limit")
    parser.add_argument("--pairs", type=int, default=Setting.pairs, help="pairs of the memory")
    parser.add_argument("--seen", type=int, default=Setting.seen, help="different words of the targets")
    parser.add_argument("--d", type=int, default=Setting.d, help="width of the PLM")
    parser.add_argument("--epochs", type=int, default=Setting.epochs, help="epochs of training")
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate, help="0: that of the preset")
    parser.add_argument("--threads", type=int, default=Setting.threads, help="threads of torch")
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="the results file")
    given = parser.parse_args()
    setting = Setting(given.pairs, given.seen, given.d, epochs=given.epochs, learning_rate=given.learning_rate)
    setting = dataclasses.replace(setting, threads=given.threads)
    arguments = ["--setting", json.dumps(dataclasses.asdict(setting)), "--folder", str(given.folder.resolve())]
    run_module("reproduction.million_pairs.process", ["prepare", *arguments], setting.threads)
    facts = read_json(given.folder / "facts.json")
    for name in given.stages:
        stage = Stage.named(name)
        run_module("reproduction.million_pairs.process", [name, *arguments], setting.threads)
        result = read_json(given.folder / OUT) | facts
        put_run(given.output, f"d {setting.d}, {setting.pairs:,} pairs, {setting.seen:,} seen: {stage.name}", result)
        print(
            f"{stage.name}: {result['processor_seconds']} s of the processor, floor {result['floor_seconds']} s, "
            f"{result['peak_anonymous_bytes'] / 2**20:,.0f} MiB",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
