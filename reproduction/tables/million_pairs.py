"""The tables of `million_pairs`: each stage against its floor, and kinds of storage and vocabulary by their loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reproduction.lines import read_runs
from reproduction.million_pairs.options import Setting
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "million_pairs.jsonl", "python -m reproduction.million_pairs FOLDER"
MILLION = 1_000_000
MIB = 1 << 20

Run = Mapping[str, Any]


def million_pairs() -> str:
    """Return all tables of the committed results."""
    runs = list(read_runs(FILE).values())
    timed = [run for run in runs if not Setting.of(run).learning_rate]
    trained = [run for run in runs if Setting.of(run).learning_rate and run["stage"].startswith("train")]
    text = ""
    for d in dict.fromkeys(Setting.of(run).d for run in timed):
        text += f"d {d}, V {Setting.V:,}:\n\n" + stages(run for run in timed if Setting.of(run).d == d) + "\n"
    for setting in dict.fromkeys(map(Setting.of, trained)):
        text += losses([run for run in trained if Setting.of(run) == setting]) + "\n"
    return text + source(signature_of(runs[0]), COMMAND)


def stages(runs: Iterable[Run]) -> str:
    """Return a table with one line per stage: measured, floor, share, and what a million pairs take."""
    columns = ["stage", "pairs", "measured", "floor", "share", "a million pairs", "peak memory", "on disk"]
    text = head(columns)
    for run in runs:
        seconds, pairs = spent(run), run["pairs"]
        share = f"{run['floor_seconds'] / seconds:.2f}"
        size = f"{run['bytes'] / MIB:,.0f} MiB" if "bytes" in run else ""
        whole = "measured" if pairs >= 0.9 * MILLION else f"{seconds * MILLION / pairs / 60:.1f} min"
        peak = f"{run['peak_anonymous_bytes'] / MIB:,.0f} MiB"
        measured, floor = f"{seconds:,.1f} s", f"{run['floor_seconds']:,.1f} s"
        text += row([title(run), f"{pairs:,}", measured, floor, share, whole, peak, size])
    return text


def losses(runs: list[Run]) -> str:
    """Return a table with one line per kind of storage and vocabulary, of runs with one setting."""
    setting, first = Setting.of(runs[0]), runs[0]
    pairs, facts = first["pairs"] // setting.epochs, (first["loss_of_the_language"], first["loss_of_the_frequencies"])
    text = f"d {setting.d}, V {setting.V:,}, {pairs:,} training pairs, {setting.epochs} epoch(s), learning rate "
    text += f"{setting.learning_rate:g}, {first['seen']:,} tokens that occur. The lowest possible loss of a word is "
    text += f"{facts[0]:.3f} nats, that of the frequencies {facts[1]:.3f}:\n\n"
    text += head(["storage", "vocabulary", "rows of W_hd a step", "bytes a pair", "training, a pair", "held-out loss"])
    for run in runs:
        loss = run.get("cross_entropy_of_float16", run["held_out_cross_entropy"])
        seconds = 1e6 * spent(run) / run["pairs"]
        cells = [storage(run), f"`{run['vocabulary']}`", f"{run['rows']:,}", f"{width(run):,}", f"{seconds:,.0f} µs"]
        text += row([*cells, f"{loss:.3f}"])
    return text


def spent(run: Run) -> float:
    """Return the processor's seconds of a stage; of training, those of the epochs."""
    return float(run.get("epoch_processor_seconds", run["processor_seconds"]))


def title(run: Run) -> str:
    """Return the name of a stage, with the number of tokens that occur in training."""
    if "vocabulary" not in run:
        return str(run["stage"])
    what = "an epoch" if run["stage"].startswith("train") else "its steps alone"
    return (
        f"{what}, preset `{run['stage'].split(', ')[2]}`, `{run['vocabulary']}` ({run['rows']:,} rows of W_hd a step)"
    )


def storage(run: Run) -> str:
    """Return how the representations are stored."""
    memory = str(run["stage"].split(", ")[1])
    return f"{memory} principal coordinates in float16" if memory.isdigit() else memory


def width(run: Run) -> int:
    """Return the bytes of a stored representation."""
    memory, d = run["stage"].split(", ")[1], Setting.of(run).d
    return 2 * int(memory) if memory.isdigit() else d + 4 if memory == "int8" else 2 * d
