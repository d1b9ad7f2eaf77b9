"""SmolLM2 through llama.cpp: adapted to descriptions of restaurants, scored beside transformers; minutes long."""

from dataclasses import replace

import pytest

import pema
from pema.errors import OwnerError
from pema.experiments.data import restaurant_data
from pema.owner.opening import open_plm
from pema.owner.sources.packaged import packaged_files

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

TEXTS, DEV, GENERATED = 200, 20, 30
TEMPLATE = pema.Template("Describe this restaurant in one or two sentences: \n{source}\nDescription:")
STOP = {"max_new_tokens": 80, "stop": ("\n",)}


def adapt_and_score(plm, folder):
    """Metrics of the PLM alone and of PEMA, whose schedule is chosen on dev, and perplexities on dev."""
    data, task = restaurant_data(), replace(pema.get_task("data-to-text"), template=TEMPLATE)
    memory = pema.build_memory(plm, data.train[:TEXTS], task, folder / "memory", contexts="teacher")
    adapter, _ = pema.train(memory, pema.preset("best"), folder / "adapter")
    dev = pema.build_memory(plm, data.dev[:DEV], task, folder / "dev", contexts="teacher")
    schedules = [pema.Constant(weight) for weight in (0.7, 0.9, 1.0)]
    perplexities = {schedule: pema.perplexity(dev.view(), plm.head(), adapter, schedule) for schedule in schedules}
    test = data.test[:GENERATED]
    sources, references = [each.source for each in test], [[each.target, *each.alternatives] for each in test]

    def score(texts):
        scores = pema.evaluate(task, texts, references, sources=sources, metrics=["bleu", "slot_errors"])
        return {name: score.value for name, score in scores.items()}

    best = min(perplexities, key=perplexities.get)
    return (
        score(pema.generate(plm, None, sources, task, **STOP)),
        score(pema.generate(plm, adapter, sources, task, best, **STOP)),
        perplexities[best],
    )


def test_it_is_adapted_as_with_transformers(tmp_path):
    try:
        packaged_files("smollm2-135m")
    except OwnerError as error:
        pytest.skip(str(error))
    results = {
        name: adapt_and_score(open_plm(name), tmp_path / name.replace(":", "-"))
        for name in ("llamacpp:smollm2-135m", "smollm2-135m")
    }
    for alone, pema_scores, perplexity in results.values():
        assert pema_scores["bleu"] > alone["bleu"] + 15
        assert pema_scores["slot_errors"] < alone["slot_errors"]
        assert perplexity < 6
    (_, ours, perplexity), (_, theirs, expected) = results.values()
    assert perplexity == pytest.approx(expected, rel=0.03)
    assert ours["bleu"] == pytest.approx(theirs["bleu"], abs=6)
