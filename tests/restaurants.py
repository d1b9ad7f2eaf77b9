"""SmolLM2 adapted to a small part of the bundled descriptions of restaurants, and scored: minutes of a core."""

from dataclasses import replace
from statistics import mean

import pytest

import pema
from pema.errors import OwnerError
from pema.experiments.data import restaurant_data
from pema.owner.sources.packaged import packaged_files

PLM = "smollm2-135m"
TEMPLATE = pema.Template("Describe this restaurant in one or two sentences: \n{source}\nDescription:")
STOP = {"max_new_tokens": 80, "stop": ("\n",)}


def require_packaged():
    """Skip the test if SmolLM2 is not installed."""
    try:
        packaged_files(PLM)
    except OwnerError as error:
        pytest.skip(str(error))


def adapt_and_score(plm, folder, texts, dev, generated, seeds=1):
    """Metrics of the PLM alone and of PEMA, whose schedule is chosen on dev, and its perplexity on dev.

    `texts`, `dev` and `generated` are the numbers of examples to learn from, to choose on and to generate for. The
    perplexity is the mean of `seeds` trainings; the texts are those of the first.
    """
    data, task = restaurant_data(), replace(pema.get_task("data-to-text"), template=TEMPLATE)
    memory = pema.build_memory(plm, data.train[:texts], task, folder / "memory", contexts="teacher")
    held_out = pema.build_memory(plm, data.dev[:dev], task, folder / "dev", contexts="teacher")
    adapters = [
        pema.train(memory, pema.preset("best", seed=seed), folder / f"adapter-{seed}")[0] for seed in range(seeds)
    ]

    def perplexity(schedule):
        return mean(pema.perplexity(held_out.view(), plm.head(), adapter, schedule) for adapter in adapters)

    perplexities = {schedule: perplexity(schedule) for schedule in map(pema.Constant, (0.7, 0.9, 1.0))}
    test = data.test[:generated]
    sources, references = [each.source for each in test], [[each.target, *each.alternatives] for each in test]

    def score(written):
        scores = pema.evaluate(task, written, references, sources=sources, metrics=["bleu", "slot_errors"])
        return {name: score.value for name, score in scores.items()}

    best = min(perplexities, key=perplexities.get)
    return (
        score(pema.generate(plm, None, sources, task, **STOP)),
        score(pema.generate(plm, adapters[0], sources, task, best, **STOP)),
        perplexities[best],
    )
