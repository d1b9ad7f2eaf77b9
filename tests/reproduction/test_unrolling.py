"""The study of Gradual Unrolling: its courses are the package's, SL follows each row, and dev data choose."""

from types import SimpleNamespace

import pytest
import torch

import pema
from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import GradualUnrolling, Linear
from pema.experiments.records import Trial
from pema.tasks.registry import get_task
from reproduction.experiments import unrolling
from reproduction.experiments.unrolling import POINTS, Adapted, Unrolling, target_lengths
from reproduction.lines import put_run
from reproduction.tables import unrolling as tables
from reproduction.tables.unrolling import Point, chosen, reported

TASK = get_task("translation")
SOURCES = ["a house", "the small house is here", "dog", "where is the small dog of the house", "here it is"]
EXAMPLES = [pema.Example(source, "Haus " * (k + 1), alternatives=("x",)) for k, source in enumerate(SOURCES)]


@pytest.fixture(scope="module")
def adapted(tiny_plm):
    plm = tiny_plm()
    adapter = Adapter(
        AdapterConfig(d=32, vocabulary_size=320, rank=8, plm=plm.description, task="translation", max_new_tokens=12),
        seed=1,
    )
    with torch.no_grad():
        adapter.B_pd.normal_(generator=torch.Generator().manual_seed(2))
    return Adapted(plm, adapter, TASK, 3.4)


def test_the_names_of_schedules_lead_back_to_them():
    assert [Point.of(point.key) for point in POINTS] == POINTS
    assert len({point.key for point in POINTS}) == len(POINTS)


@pytest.mark.parametrize(("power", "schedule"), [(1, Linear(0.8)), (2, GradualUnrolling(0.8))])
def test_the_courses_are_those_of_the_package(power, schedule):
    step, length = torch.arange(9)[:, None], torch.tensor([[1, 4, 7]])
    torch.testing.assert_close(Unrolling(0.8, power).weights(step, length), schedule.weights(step, length))


@pytest.mark.parametrize(("course", "schedule"), [("square", GradualUnrolling(1.0)), ("linear", Linear(1.0))])
def test_with_the_inputs_length_the_texts_are_those_of_the_package(adapted, monkeypatch, course, schedule):
    monkeypatch.setattr(unrolling, "BATCH", 2)
    texts, tokens = adapted.generate(Point(course, 1.0), EXAMPLES)
    assert texts == pema.generate(adapted.plm, adapted.adapter, SOURCES, TASK, schedule)
    assert 0 < tokens <= 12


def test_sl_of_the_target_follows_its_row(adapted, monkeypatch):
    """In any batches, a text is that of its example alone with SL = the length of its target."""
    monkeypatch.setattr(unrolling, "BATCH", 2)
    point = Point("square", 1.0, "target")
    texts, _ = adapted.generate(point, EXAMPLES)
    assert texts == [adapted.generate(point, [example])[0][0] for example in EXAMPLES]
    lengths = target_lengths(adapted.plm, TASK, EXAMPLES)
    assert len(set(lengths)) == len(EXAMPLES)
    assert adapted.lengths(point, [9, 9, 9, 9, 9], lengths) == lengths
    assert adapted.lengths(Point("square", 1.0, "4 input"), [2, 3], []) == [8, 12]
    assert adapted.lengths(Point("square", 1.0, "mean target"), [2, 9], []) == [3, 3]


def test_dev_chooses_by_the_main_metric_among_what_needs_no_reference():
    bleu = {"none": 5.0, "square 0.9": 20.0, "square 0.9, SL target": 40.0, "square 1.0": 25.0}
    bleu |= {"linear 0.9": 30.0, "constant 0.7": 35.0, "fitted": 50.0}
    line = {"task": "records", "dev": {key: {"bleu": value} for key, value in bleu.items()}}
    assert chosen(line, "square") == Point("square", 1.0)
    assert reported(line) == [Point("none"), Point("square", 0.9), Point("square", 1.0), Point("constant", 0.7)]


def trial(schedule, lambda_max, perplexity, score):
    settings = {"schedule": schedule, "lambda_max": lambda_max}
    return Trial(settings=settings, dev_perplexity=perplexity, dev_score=score)


def test_the_page_has_the_means_over_seeds_and_what_comparisons_chose(tmp_path, monkeypatch):
    signature = {"config": {}, "seed": 0, "versions": {"torch": "2.13.0"}, "commit": None, "machine": MACHINE}
    for seed, bleu in ((0, 20.0), (1, 22.0)):
        scores = {"bleu": bleu, "chrf": 40.0, "slot_errors": 50.0, "perplexity": 6.0, "texts": ["a text"] * 6}
        run = {"task": "records", "contexts": "teacher", "preset": "best", "seed": seed, "mean_input": 40.2}
        run |= {"examples": {"train": 500, "dev": 60, "test": 100}, "mean_target": 28.3, "sources": ["name[Cocum]"] * 6}
        run |= {"dev": {"square 0.9": scores}, "test": {} if seed else {"square 0.9": scores}, "signature": signature}
        put_run(tmp_path / "unrolling.jsonl", f"records-teacher-best-seed{seed}", run)
    trials = [trial("constant", 0.7, 3.0, 25.0), trial("constant", 1.0, 4.0, 30.0), trial("unrolling", 0.9, 5.0, 20.0)]
    run = SimpleNamespace(trials=trials, signature=SimpleNamespace(config={"choose_by": "bleu"}))
    old = SimpleNamespace(trials=trials, signature=SimpleNamespace(config={}))
    about = SimpleNamespace(about=SimpleNamespace(title="Made"))
    lines = [SimpleNamespace(results=about, label=name, runs=[each]) for name, each in (("new", run), ("old", old))]
    monkeypatch.setattr(tables, "FILE", tmp_path / "unrolling.jsonl")
    monkeypatch.setattr(tables, "files", lambda folder: ["made"])
    monkeypatch.setattr(tables, "read_results", lambda file: None)
    monkeypatch.setattr(tables, "lines_of", lambda results: lines)
    page = tables.unrolling()
    assert "| Gradual Unrolling 0.9 | 21.00 ± 1.41 | 40.00 ± 0.00 | 50.00 ± 0.00 | 6.00 ± 0.00 |" in page
    assert "| teacher, `best` | Gradual Unrolling 0.9 | 20.00 | 40.00 | 50.00 |" in page
    assert "| Made | new | BLEU | 30.00 (1.0) | 20.00 (0.9) | constant, 25.00 (0.7) |" in page
    assert "| record | name[Cocum] |" in page
    assert "| old |" not in page


MACHINE = {"processor": "made", "cores": 2, "cpu_capability": "AVX512"}
