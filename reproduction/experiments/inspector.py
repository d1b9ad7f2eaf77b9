"""The example of the inspector: the embedded PLM with an adapter of the demo's training sentences, on a test sentence.

    python -m reproduction.experiments.inspector -o runs/inspector

Writes `docs/examples/inspector.html`; its adapter is preset `best` on teacher contexts, seed 0, and is stored below the
folder of `-o`. The schedule is Gradual Unrolling, so that both the adapter and the PLM decide tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pema.adapter.presets import preset
from pema.adapter.schedule import GradualUnrolling
from pema.adapter.training import train
from pema.experiments.data import support_data
from pema.memory.build import build_memory
from pema.owner.local import LocalPLM
from pema.pages.inspector.page import write_inspection
from pema.tasks.registry import get_task
from reproduction.paths import DOCS

EXAMPLE = DOCS / "examples" / "inspector.html"
SOURCE = "As your invoice was lost in the mail, we print another."


def make(folder: Path, page: Path) -> None:
    """Train the adapter below `folder` and write the page."""
    plm, data = LocalPLM.load("embedded"), support_data()
    task = get_task(data.task)
    memory = build_memory(plm, list(data.train), task, folder / "memory")
    adapter, _ = train(memory, preset("best"), folder / "adapter", resume=(folder / "adapter").exists())
    (reference,) = [example.target for example in data.test if example.source == SOURCE]
    write_inspection(page, plm, adapter, SOURCE, task, GradualUnrolling(), reference=reference)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/inspector"))
    make(parser.parse_args().output, EXAMPLE)


if __name__ == "__main__":
    main()
