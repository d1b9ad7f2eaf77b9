"""The table of one process, and of one and two workers of a launcher and of Ray."""

from __future__ import annotations

from typing import Any

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "scaling.jsonl", "python -m reproduction.experiments.scaling"

PROCESS, LAUNCHED, RAY = "process", "launched", "ray"
ALONE = (PROCESS, 1)
STAGES = {
    "build": (ALONE, (LAUNCHED, 1), (LAUNCHED, 2), (RAY, 1), (RAY, 2)),
    "train": (ALONE, (LAUNCHED, 2)),
    "generate": (ALONE, (RAY, 1), (RAY, 2)),
}
"""By what each stage is measured: an engine and its number of workers, the one process first."""

UNITS = {"build": "tokens/s", "train": "pairs/s", "generate": "texts/s"}
NAMES = {PROCESS: "one process", LAUNCHED: "`accelerate launch`, {}", RAY: "Ray, {}"}


def scaling() -> str:
    """Return a section with the table, one row per stage and engine; nothing if there are no results."""
    runs = read_runs(FILE)
    if not runs:
        return ""
    text = "\n## One and two workers\n\n"
    text += head(["stage", "by", "start", "work", "rate", "speed-up"])
    for stage, ways in STAGES.items():
        alone = min(runs[_run(stage, *ALONE)]["work"])
        for engine, workers in ways:
            one = runs[_run(stage, engine, workers)]
            work = min(one["work"])
            cells = [f"`pema {stage}`", NAMES[engine].format(workers), f"{min(one['start']):.1f} s", f"{work:.1f} s"]
            rate = one["count"] / work
            text += row([*cells, f"{rate:{',.0f' if rate >= 100 else '.3g'}} {UNITS[stage]}", f"{alone / work:.2f}"])
    text += f"\nShortest of {len(one['work'])} times on the clock, one thread a process; *start* lasts until all have "
    text += f"loaded the PLM, or the memory. {_sameness(runs)} Load average of the machine before: "
    return text + f"{one['load_average']:g}. {source(signature_of(one), COMMAND)}"


def _run(stage: str, engine: str, workers: int) -> str:
    return f"{stage} {engine} {workers}"


def _sameness(runs: dict[str, dict[str, Any]]) -> str:
    """Return what the digests say of the memories and of the texts."""
    digests = [{runs[_run(stage, *way)]["digest"] for way in STAGES[stage]} for stage in ("build", "generate")]
    same = [
        f"all {what} are the same" for what, each in zip(("memories", "texts"), digests, strict=True) if len(each) == 1
    ]
    return f"By their digests {' and '.join(same)}." if same else "The memories and the texts differ."
