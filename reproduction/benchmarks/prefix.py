"""Few-shot prompts whose common prefix is encoded once, against the same prompts encoded for every text.

All prompts begin with the same demonstrations. Every text has the same number of tokens in both variants, so that they
do the same work otherwise. Ratios are those of the shortest times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pema.methods.contract import AdaptedModel, Budget, Job
from pema.methods.few_shot import FewShot
from reproduction.benchmarks.building import unshared
from reproduction.benchmarks.inputs import examples, open_plm, task
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.timing import SHORTEST, Run, alternate, least_ratio, row, timing

DEMONSTRATIONS = 4
TEXTS = 24
"""Maximum number of texts."""


class PrefixCase:
    """A PLM with demonstrations in its prompts, and texts to generate and to score."""

    def __init__(self, options: Options) -> None:
        self.plm = open_plm(options)
        given = examples(options)
        self.texts = given[DEMONSTRATIONS:][:TEXTS]
        self.length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
        self.job = Job(options.plm, None, task(options), tuple(given[:DEMONSTRATIONS]), (), options.seed, Budget())

    def opened(self) -> AdaptedModel:
        """Return the method with new prompts: scores of the same prompts would be kept."""
        return FewShot(k=DEMONSTRATIONS).open(self.plm, self.job, Path(), Path())

    def generate(self) -> None:
        """Generate all texts."""
        self.opened().generate([each.source for each in self.texts], **self.length)

    def score(self) -> None:
        """Compute the perplexity of all texts."""
        self.opened().perplexity(self.texts)


def run(options: Options, _folder: Path) -> dict[str, Any]:
    """Measure generation and perplexity in alternation."""
    case = PrefixCase(options)
    case.plm.generator  # noqa: B018  (the first use tries shortcuts)
    case.score()
    summary, measured = [], {}
    for what, shared in (("generation", case.generate), ("perplexity", case.score)):
        times = alternate(
            {"shared": shared, "unshared": _unshared(shared)}, options.repeats, warm_up=0, clock=options.clock
        )
        measured[what] = {name: timing(t) for name, t in times.items()}
        ratio = least_ratio(times["unshared"], times["shared"])
        named = f"{what}, {len(case.texts)} texts after {DEMONSTRATIONS} demonstrations"
        summary.append(row(named, min(times["shared"]), "s", "prompts encoded for every text", ratio, ""))
    return {
        "summary": summary,
        "ratios_of": SHORTEST,
        "plm": case.plm.description.name,
        **case.length,
        "measured": measured,
    }


def _unshared(run_one: Run) -> Run:
    def run_unshared() -> None:
        with unshared():
            run_one()

    return run_unshared


def parts(options: Options, _folder: Path) -> dict[str, Run]:
    """Return the parts to run in separate processes for their peak memory, each including the PLM's weights."""

    def generate() -> None:
        PrefixCase(options).generate()

    return {"generation, shared": generate, "generation, unshared": _unshared(generate)}
