"""Step 2: the closed form against the paper's gradient descent, on the same memory.

Both learn on the same training part of a PLM's memory and are compared on the same held-out part. The closed form reads
the memory from disk; gradient descent has its representations in RAM. Its time is measured until it stops, and
`seconds_to_best` until its lowest held-out error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pema.adapter.reconstruction import add_products, closed_form, reconstruction_error
from pema.memory.reader import Memory, View
from reproduction.benchmarks.inputs import plm_memory, rows_of
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.published import PROCEDURES, RECONSTRUCTION_BATCH, learn_reconstruction
from reproduction.benchmarks.timing import Run, alternate, row, significant, timing

DEV_FRACTION = 0.1
AIM = ">= 1000"


def ranks(options: Options, d: int) -> list[int]:
    """Return the ranks to measure: below d, without repetition."""
    return list(dict.fromkeys(r for r in (rank or d // 4 for rank in options.ranks) if 0 < r < d))


def run(options: Options, folder: Path) -> dict[str, Any]:
    """Measure all ranks."""
    memory = plm_memory(options, folder)
    train, held_out = memory.split(DEV_FRACTION, options.seed)
    result = [at_rank(options, train, held_out, rank, memory.d) for rank in ranks(options, memory.d)]
    summary = []
    for each in result:
        for name, learnt in each["gradient_descent"].items():
            lower = each["closed_form"]["held_out_error"] <= learnt["held_out_error"]
            against = f"{name}: {learnt['seconds']:.3g} s, {learnt['stopped']}"
            against += (
                f", held-out error {learnt['held_out_error']:.3g} against {each['closed_form']['held_out_error']:.3g}"
            )
            seconds = each["closed_form"]["median_seconds"]
            line = row(f"closed form, r {each['rank']}", seconds, "s", against, learnt["speed_up"], AIM)
            summary.append(line | {"met": line["met"] and lower})
    return {
        "summary": summary,
        "memory": {"plm": memory.manifest.plm.name, "d": memory.d, "pairs": train.pairs, "held_out": held_out.pairs},
        "procedures": {name: how.__dict__ for name, how in procedures(options).items()},
        "ranks": result,
    }


def procedures(options: Options) -> dict[str, Any]:
    """Return the variants of gradient descent, with the options' limit of passes."""
    return {name: replace(how, epochs=min(how.epochs, options.sgd_epochs)) for name, how in PROCEDURES.items()}


def at_rank(options: Options, train: View, held_out: View, rank: int, d: int) -> dict[str, Any]:
    """Measure both procedures at one rank."""
    times = alternate({"closed_form": lambda: closed_form(train, rank, d)}, options.repeats)["closed_form"]
    A, B_rct, error = closed_form(train, rank, d)
    closed = timing(times) | {
        "training_error": error,
        "held_out_error": reconstruction_error(held_out, A, B_rct),
        "where_it_goes": stages(train, d, options.repeats),
    }
    f, dev = rows_of(train), rows_of(held_out)
    descent = {}
    for name, how in procedures(options).items():
        torch.manual_seed(options.seed)
        learnt = learn_reconstruction(f, dev, rank, how, options.sgd_seconds).to_dict()
        speed_up = significant(learnt["seconds"] / closed["median_seconds"])
        to_best = significant(learnt["seconds_to_best"] / closed["median_seconds"])
        descent[name] = learnt | {"speed_up": speed_up, "speed_up_to_its_best": to_best}
    return {"rank": rank, "closed_form": closed, "gradient_descent": descent}


def stages(view: View, d: int, repeats: int) -> dict[str, float]:
    """Return the seconds of each stage of the closed form: reading, the d x d products, the eigendecomposition."""
    f = rows_of(view)
    moment = (f.T @ f).double() / len(f)

    def second_moment() -> None:
        for rows in torch.split(f, 8192):
            add_products(torch.zeros_like(moment), rows)

    runs: dict[str, Run] = {
        "reading": lambda: [len(batch.representations) for batch in view.batches(8192)],
        "second moment": second_moment,
        "eigendecomposition": lambda: torch.linalg.eigh(moment, UPLO="U"),
    }
    return {name: timing(times)["median_seconds"] for name, times in alternate(runs, repeats).items()}


def parts(options: Options, folder: Path) -> dict[str, Run]:
    """Return the parts to run in separate processes for their peak memory."""

    def split() -> tuple[Memory, View, View]:
        memory = Memory.open(folder / "memory")
        return memory, *memory.split(DEV_FRACTION, options.seed)

    def closed() -> None:
        memory, train, _ = split()
        closed_form(train, ranks(options, memory.d)[0], memory.d)

    def published() -> None:
        memory, train, held_out = split()
        how = replace(PROCEDURES["published code"], batch_size=min(RECONSTRUCTION_BATCH, train.pairs), epochs=2)
        learn_reconstruction(rows_of(train), rows_of(held_out), ranks(options, memory.d)[0], how, 10.0)

    return {"closed form": closed, "gradient descent, published code": published}
