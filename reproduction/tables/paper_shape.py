"""The tables of `paper_shape` in Markdown, next to the paper's figures."""

from __future__ import annotations

from typing import Any

from reproduction.lines import read_runs
from reproduction.paper_shape.options import METHODS, SHAPES, Setting, least_bytes
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row

FILE, COMMAND = RESULTS / "paper_shape.jsonl", "python -m reproduction.paper_shape"
TITLES = {
    "full": "full fine-tuning, float32",
    "lora": "LoRA, float32 base",
    "lora-bfloat16": "LoRA, bfloat16 base",
    "offsite": "Offsite-Tuning, data owner",
    "knn": "kNN-LM, exact index",
    "pema-paper": "PEMA, preset `paper`",
    "pema-paper-float32": "PEMA, preset `paper`, products in float32",
    "pema-best": "PEMA, preset `residual`",
}

PAPER_MIB = {"full": 20_082, "pema-paper": 478}
"""Training memory at OPT-IML-MAX-1.3B as the paper reports it, on a GPU in float32; its MB are taken as MiB."""

PAPER_SHAPE = "opt-1.3b"
AIMS = (("full", 40), ("lora", 10))
"""Methods and the factor by which PEMA's peak should be smaller."""


def paper_shape() -> str:
    """Return all tables of the committed results."""
    return page(list(read_runs(FILE).values()))


def page(results: list[dict[str, Any]]) -> str:
    """Return all tables of results measured with one setting."""
    setting = Setting.of(results[0])
    runs = {(result["shape"], result["method"]): result for result in results}
    shapes = [name for name in SHAPES if any(shape == name for shape, _ in runs)]
    text = ""
    for name in shapes:
        text += f"### {name}\n\n{sizes(name)}\n\n" + methods_table(name, runs, setting) + "\n"
    text += "### The aims\n\n" + aims_table(shapes, runs, setting) + "\n"
    text += "### The paper\n\n" + paper_table(runs, setting) + "\n"
    text += "### The PLM owner's side\n\n" + owner_table(shapes, runs) + "\n"
    return text + signed(results)


def sizes(name: str) -> str:
    """Return width, depth, vocabulary and parameters of a shape."""
    shape = SHAPES[name]
    parameters = (shape.layers * shape.layer_parameters + shape.other_parameters) / 1e6
    return f"d {shape.d}, {shape.layers} layers, V {shape.V:,}: {parameters:,.0f} M parameters."


def peak_of(result: dict[str, Any] | None) -> int | None:
    """Return the peak memory in bytes, of the accelerator if one was used; None if it was not measured."""
    if result is None or not result["fits"]:
        return None
    peak = result["peak_bytes"]
    return int(peak["resident"] if peak["allocated"] is None else peak["allocated"])


def methods_table(shape: str, runs: dict[Any, dict[str, Any]], setting: Setting) -> str:
    """Return a table with one line per method."""
    text = head(
        ["method", "peak (MB)", "without files (MB)", "s a step", "a step", "ms a token or pair", "trained (M)"]
    )
    for method, title in TITLES.items():
        result = runs.get((shape, method))
        if result is None or not result["fits"]:
            least = f"{least_bytes(SHAPES[shape], method, setting) / 1e6:,.0f}"
            why = "not run here" if result is None else "does not fit here"
            text += row([title, f"{why}; by arithmetic at least {least}", "-", "-", "-", "-", "-"])
            continue
        peak, anonymous = peak_of(result), result["peak_bytes"]["anonymous"]
        cells = [title, f"{(peak or 0) / 1e6:,.0f}", f"{anonymous / 1e6:,.0f}"]
        if method == "knn":
            cells += [f"{result['build_seconds']:,.3g}", f"index of {result['pairs']:,} pairs"]
        else:
            unit = "pairs" if method.startswith("pema") else "tokens"
            cells += [f"{result['seconds_per_step']:,.3g}", f"{result['tokens_per_step']:,} {unit}"]
        trained = result.get("trainable_parameters")
        cells += [f"{1e3 * result['seconds_per_token']:,.3g}", "-" if trained is None else f"{trained / 1e6:,.1f}"]
        text += row(cells)
    return text


def aims_table(shapes: list[str], runs: dict[Any, dict[str, Any]], setting: Setting) -> str:
    """Return a table of PEMA's peak as a fraction of other methods', and whether the aim was met."""
    text = head(["shape", "method", "against", "ratio", "aim", "met"])
    for shape in shapes:
        for method in ("pema-paper", "pema-paper-float32", "pema-best"):
            peak = peak_of(runs.get((shape, method)))
            if peak is None:
                continue
            for other, parts in AIMS:
                measured = peak_of(runs.get((shape, other)))
                # The arithmetic is a lower bound of the other's peak, so the ratio is an upper bound.
                against = measured or least_bytes(SHAPES[shape], other, setting)
                how = TITLES[other] + ("" if measured else " (arithmetic)")
                ratio = against / peak
                text += row(
                    [shape, TITLES[method], how, f"1/{ratio:.1f}", f"< 1/{parts}", "yes" if ratio > parts else "no"]
                )
    return text


def paper_table(runs: dict[Any, dict[str, Any]], setting: Setting) -> str:
    """Return a table of the paper's figures next to these, at its shape."""
    text = head(["training memory at OPT-1.3B's shape", "paper, GPU (MiB)", "here (MiB)"])
    for method, mebibytes in PAPER_MIB.items():
        peak = peak_of(runs.get((PAPER_SHAPE, method)))
        least = least_bytes(SHAPES[PAPER_SHAPE], method, setting) / 2**20
        here = f"not run here; by arithmetic at least {least:,.0f}" if peak is None else f"{peak / 2**20:,.0f}"
        text += row([TITLES[method], f"{mebibytes:,}", here])
    return text


OF_GENERATION = {"paper": 1.05, "residual": 1.05, "best": 1.15}
"""Aims of a generated token's time with the adapter of a preset, as a multiple of the PLM's own."""


def owner_table(shapes: list[str], runs: dict[Any, dict[str, Any]]) -> str:
    """Return a table of the pass that builds a memory, and of a generated token with and without the adapter."""
    aims = [f"`{name}`, aim <= {aim}" for name, aim in OF_GENERATION.items()]
    text = head(["shape", "PLM in", "building, ms a token", "PLM alone, ms a token", *aims])
    for shape in shapes:
        result = runs.get((shape, "owner"))
        if result is None or not result["fits"]:
            text += row([shape, "not run here" if result is None else "does not fit here", *["-"] * 5])
            continue
        alone = result["generate_seconds_per_token"]["alone"]
        cells = [shape, result["dtype"], f"{1e3 * result['represent_seconds_per_token']:,.3g}", f"{1e3 * alone:,.3g}"]
        text += row([*cells, *(f"x {result['ratio'][name]:.3f}" for name in OF_GENERATION)])
    return text


def signed(results: list[dict[str, Any]]) -> str:
    """Return a line with the machine of the figures."""
    machines: dict[str, None] = {}
    for result in results:
        machine, versions = result["signature"]["machine"], result["signature"]["versions"]
        where = machine.get("accelerator") if result["device"] == "cuda" else machine["processor"]
        threads = result["signature"]["config"]["threads"]
        machines[f"{where}, {machine['cpu_capability']}, {threads} thread(s), torch {versions['torch']}"] = None
    busiest = max((result["load_average"][0] for result in results if result["fits"]), default=0.0)
    beside = f", with a load average of up to {busiest:.1f}" if busiest else ""
    return f"Made by `{COMMAND}` on " + "; ".join(machines) + beside + ".\n"


assert set(TITLES) | {"owner"} == set(METHODS)
