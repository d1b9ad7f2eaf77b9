"""The tables of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from reproduction.benchmarks.options import RESTAURANTS, Options
from reproduction.benchmarks.timing import SHORTEST
from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE = RESULTS / "benchmarks.jsonl"
SMOLLM2, ACCELERATOR = "SmolLM2", "accelerator"


def commands() -> dict[str, str]:
    """Return the commands that produced the results, by what they measure."""
    measured = {"benchmarks": _runs(), "benchmarks on SmolLM2": _runs(SMOLLM2), "on an accelerator": _runs(ACCELERATOR)}
    return {name: _command(runs[-1]) for name, runs in measured.items() if runs}


def benchmarks() -> str:
    """Return a table of each benchmark against its lower bound, and whether the aim was met; then that of SmolLM2."""
    usual, larger, there = _runs(), _runs(SMOLLM2), _runs(ACCELERATOR)
    shortest = [run["benchmark"] for run in usual if run.get("ratios_of") == SHORTEST]
    text = _table(usual) + "\nMedians" + (f" ({', '.join(shortest)}: shortest times)" if shortest else "")
    text += "; where the rest goes and the peak memory of each are in `reproduction/results/benchmarks.jsonl`. "
    text += _source(usual[-1])
    if larger:
        config = _config(larger[-1])
        text += f"\nSmolLM2-135M-Instruct, {config['examples']} texts of the demo:\n\n" + _table(larger)
        text += f"\nShortest times ({config['clock']} clock). " + _source(larger[-1])
    if there:
        text += f"\nPLM and training on one {there[-1]['device']}, random weights:\n\n" + _table(there)
        text += "\nMedians (building: shortest times). " + _source(there[-1])
    return text + "\n"


def _runs(kind: str = "") -> list[dict[str, Any]]:
    return [run for run in read_runs(FILE).values() if _kind(run) == kind]


def _kind(run: Mapping[str, Any]) -> str:
    config = _config(run)
    if config.get("device", "cpu") != "cpu":
        return ACCELERATOR
    return SMOLLM2 if config["corpus"] == RESTAURANTS else ""


def _table(runs: Iterable[Mapping[str, Any]]) -> str:
    text = head(["benchmark", "measured", "value", "against", "ratio", "aim", "met"])
    for run in runs:
        name = run["benchmark"]
        if name == "reconstruction":
            name += f", {run['memory']['pairs']:,} pairs of d {run['memory']['d']}"
        for line in run["summary"]:
            met = {True: "yes", False: "no", None: ""}[line["met"]]
            value = f"{line['value']:,g} {line['unit']}"
            text += row([name, line["what"], value, line["against"], f"{line['ratio']:,g}", line["aim"], met])
    return text


def _source(run: Mapping[str, Any]) -> str:
    return source(signature_of(run), _command(run))


def _command(run: Mapping[str, Any]) -> str:
    settings, usual = _config(run), Options()
    if _kind(run) == ACCELERATOR:
        return f"python -m reproduction.benchmarks --device {settings['device']} --threads {settings['threads']}"
    text = f"python -m reproduction.benchmarks --repeats {settings['repeats']}"
    if settings["corpus"] != RESTAURANTS:
        return f"{text} --sgd-seconds {settings['sgd_seconds']:g}"
    text += "".join(f" --{name} {settings[name]}" for name in ("plm", "corpus", "examples", "threads"))
    if settings["clock"] != usual.clock:
        text += f" --options '{json.dumps({'clock': settings['clock']})}'"
    return text + " --only building prefix"


def _config(run: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = run["signature"]["config"]
    return config
