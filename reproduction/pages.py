"""The pages of committed results, and the command behind every number."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reproduction import studies
from reproduction.lines import SUFFIX, files
from reproduction.paths import DOCS, RESULTS, ROOT
from reproduction.tables import (
    attack,
    benchmarks,
    comparisons,
    demo,
    log_probabilities,
    middle_layer,
    million_pairs,
    owners,
    paper_shape,
    privacy,
    refinements,
    rounding,
    scaling,
    server_load,
    settings,
    slots,
    unrolling,
    vocabulary,
)
from reproduction.tables.markdown import head, replace_block, row

PLM_CARD = ROOT / "src" / "pema" / "plm" / "tatoeba-en-de-9m" / "README.md"


@dataclass(frozen=True)
class Origin:
    """Origin of numbers.

    Attributes:
        numbers: what they are.
        page: where they stand.
        command: what measures them.
        results: the committed files that hold them; none where the page itself is the result.
    """

    numbers: str
    page: Path
    command: str
    results: tuple[Path, ...] = ()


def results() -> str:
    """Return the figures of docs/results.md."""
    return comparisons.summaries() + slots.slots() + "\n" + owners.owners() + "\n" + comparisons.comparisons()


def recoveries() -> str:
    """Return the figures of docs/owners.md."""
    return log_probabilities.log_probabilities() + "\n" + rounding.rounding()


def scaled() -> str:
    """Return the figures of docs/scaling.md."""
    return million_pairs.million_pairs() + scaling.scaling()


SECURITY = ROOT / "SECURITY.md"
README = ROOT / "README.md"


def origins() -> list[Origin]:
    """Return the origins of all numbers in README and docs."""
    compared = files(comparisons.FOLDER)
    return [
        Origin("the demo", README, demo.COMMAND, (demo.FILE,)),
        *(
            Origin(
                f"methods side by side, {plm}",
                DOCS / "results.md",
                comparisons.summary_command(every),
                tuple(comparisons.FOLDER / f"{results.about.name}{SUFFIX}" for results in every),
            )
            for plm, every in comparisons.by_plm().items()
        ),
        *(
            Origin(name, DOCS / "benchmarks.md", command, (benchmarks.FILE,))
            for name, command in benchmarks.commands().items()
        ),
        *(
            Origin(f"comparison `{file.stem}`", DOCS / "results.md", comparisons.command(file.stem), (file,))
            for file in compared
        ),
        Origin("errors by slot", DOCS / "results.md", slots.COMMAND, (slots.FILE,)),
        Origin("other owners of the PLM", DOCS / "results.md", owners.COMMAND, (owners.FILE,)),
        Origin("vocabularies of training", DOCS / "presets.md", vocabulary.COMMAND, (vocabulary.FILE,)),
        Origin("log-probabilities alone", DOCS / "owners.md", log_probabilities.COMMAND, (log_probabilities.FILE,)),
        Origin("adapters from them", DOCS / "owners.md", rounding.COMMAND, (rounding.FILE,)),
        Origin("masked heads", DOCS / "masked-head.md", privacy.MASKED_HEAD_COMMAND, (privacy.MASKED_HEAD,)),
        Origin("what comes back from a memory", DOCS / "privacy.md", privacy.INVERSION_COMMAND, (privacy.INVERSION,)),
        Origin("load of the server", DOCS / "serving.md", server_load.COMMAND, (server_load.FILE,)),
        Origin("attacks", SECURITY, attack.COMMAND, (attack.FILE,)),
        Origin("private training", DOCS / "private-training.md", privacy.PRIVATE_COMMAND, (privacy.PRIVATE,)),
        Origin("a million pairs", DOCS / "scaling.md", million_pairs.COMMAND, (million_pairs.FILE,)),
        *(
            Origin("one and two workers", DOCS / "scaling.md", scaling.COMMAND, (file,))
            for file in (scaling.FILE,)
            if file.exists()
        ),
        Origin("the paper's shape", DOCS / "paper-shape.md", paper_shape.COMMAND, (paper_shape.FILE,)),
        *(
            Origin(f"study `{name}`", studies.PAGES / f"{name}.md", studies.command(name), (studies.results_of(name),))
            for name in studies.finished()
        ),
        Origin("study of Gradual Unrolling", unrolling.PAGE, unrolling.COMMAND, (unrolling.FILE,)),
        Origin("study of a middle layer", middle_layer.PAGE, middle_layer.COMMAND, (middle_layer.FILE,)),
        Origin("study of refinements", refinements.PAGE, refinements.COMMAND, (refinements.FILE,)),
        Origin("the embedded PLM's BLEU", PLM_CARD, "python -m reproduction.models.embedded_plm PAIRS -o FOLDER"),
        Origin(
            "the inspector's example",
            DOCS / "examples" / "inspector.html",
            "python -m reproduction.experiments.inspector",
        ),
    ]


def table() -> str:
    """Return a table of all origins."""
    text = head(["numbers", "page", "command", "results, in `reproduction/results/`"])
    for origin in origins():
        name = origin.page.relative_to(ROOT).as_posix()
        link = f"[{name}]({Path(os.path.relpath(origin.page, DOCS)).as_posix()})"
        stored = ", ".join(f"`{file.relative_to(RESULTS).as_posix()}`" for file in origin.results)
        text += row([origin.numbers, link, f"`{origin.command}`", stored or "the page"])
    return text


BLOCKS: dict[Path, Callable[[], str]] = {
    README: demo.demo,
    SECURITY: attack.attack,
    DOCS / "benchmarks.md": benchmarks.benchmarks,
    DOCS / "results.md": results,
    DOCS / "presets.md": vocabulary.vocabulary,
    DOCS / "owners.md": recoveries,
    DOCS / "masked-head.md": privacy.masked_head,
    DOCS / "paper-shape.md": paper_shape.paper_shape,
    DOCS / "privacy.md": privacy.inversion,
    DOCS / "private-training.md": privacy.private,
    DOCS / "reproduction.md": table,
    DOCS / "scaling.md": scaled,
    DOCS / "serving.md": server_load.server_load,
    DOCS / "settings.md": settings.settings,
    unrolling.PAGE: unrolling.unrolling,
    middle_layer.PAGE: middle_layer.middle_layer,
    refinements.PAGE: refinements.refinements,
}
"""Writers of the generated part of each page."""


def write_pages() -> None:
    """Write the generated parts of all pages."""
    for page, block in BLOCKS.items():
        replace_block(page, block())
