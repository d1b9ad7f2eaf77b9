"""The choice among candidates on dev: by generated texts, by perplexity, and what is kept of it."""

import pytest
import sacrebleu

from pema.errors import ConfigError, MismatchError
from pema.experiments.choice import best
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.estimate import Speed
from pema.experiments.plan import plan_experiment
from pema.experiments.records import Trial
from pema.experiments.workplace import Workplace
from pema.files import read_json
from pema.methods.adapted import mixed
from pema.pages.report.document import report


def trial(name, perplexity, score):
    return Trial(settings={"name": name}, dev_perplexity=perplexity, dev_score=score)


@pytest.mark.parametrize(
    ("metric", "chosen"),
    [("bleu", "words"), ("slot_errors", "facts"), ("perplexity", "likely")],
)
def test_the_best_score_wins_whichever_way_the_metric_counts(metric, chosen):
    tried = [trial("likely", 2.0, 20.0), trial("words", 9.0, 30.0), trial("facts", 5.0, 10.0)]
    assert best(tried, metric).settings["name"] == chosen


def test_equal_scores_are_decided_by_perplexity_and_undefined_ones_lose():
    tried = [trial("first", None, 10.0), trial("second", 3.0, 10.0), trial("third", 4.0, 10.0)]
    assert best(tried, "bleu").settings["name"] == "second"
    assert best([trial("none", 1.0, None), trial("some", None, 0.0)], "bleu").settings["name"] == "some"
    assert best([trial("none", None, None), trial("some", 7.0, None)], "perplexity").settings["name"] == "some"
    assert best([trial("first", None, None), trial("second", None, None)], "bleu").settings["name"] == "first"


def written(folder, file, dev="dev.tsv", **changes):
    """Write the tiny comparison to another file, with changed or added keys at the top, and read it."""
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("dev.tsv", dev)
    keys = "".join(f"{key} = {value!r}\n" for key, value in changes.items())
    (folder / f"{file}.toml").write_text(keys + text, encoding="utf-8")
    return read_config(folder / f"{file}.toml", "compare")


def test_every_candidate_is_scored_on_the_texts_it_generates_for_dev(folder, compared):
    experiment, _ = compared
    run = read_json(folder / "results" / "tiny" / "pema-seed1.json")
    assert (run["signature"]["config"]["choose_by"], run["signature"]["config"]["choose_texts"]) == ("chrf", 3)
    workplace = Workplace(folder / "work", experiment)
    (line,) = (line for line in experiment.lines() if line.label == "PEMA")
    assert len(run["trials"]) == 2
    for tried in run["trials"]:
        stages, plm = workplace.stages(line.method, tried["settings"], 0), workplace.plm({})
        with workplace.open(stages, plm) as adapted:
            texts = adapted.generate(experiment.data.dev).texts
        targets = [example.target for example in experiment.data.dev]
        assert tried["dev_score"] == pytest.approx(sacrebleu.corpus_chrf(texts, [targets]).score)
    chosen = max(run["trials"], key=lambda each: each["dev_score"])
    assert chosen["settings"] == run["settings"]
    assert "chrF of generated texts (which decided); dev perplexity" in report(folder / "results" / "tiny")
    alone = read_json(folder / "results" / "tiny" / "alone-seed0.json")["signature"]["config"]
    assert "choose_by" not in alone


def test_texts_for_dev_are_generated_once_for_all_metrics(folder, compared, monkeypatch):
    generated = []

    def counted(plm, adapter, sources, *more, **settings):
        generated.append(len(sources))
        return generate_counted(plm, adapter, sources, *more, **settings)

    generate_counted = mixed.generate_counted
    monkeypatch.setattr(mixed, "generate_counted", counted)
    run_experiment(written(folder, "by-bleu", choose_by="bleu"), folder / "results", folder / "work")
    assert generated == [2, 4]  # warm-up and test: the texts for dev are those of the comparison by chrF
    run = read_json(folder / "results" / "by-bleu" / "pema-seed0.json")
    assert run["signature"]["config"]["choose_by"] == "bleu"
    with pytest.raises(MismatchError, match=r"pema-seed0.json was run with another choose_by: 'bleu', not 'chrf'"):
        run_experiment(written(folder, "again", name="by-bleu"), folder / "results", folder / "work")
    run_experiment(written(folder, "two", choose_texts=2), folder / "results", folder / "work")
    assert generated == [2, 4, 2, 2, 2, 4]  # the first two dev texts of both candidates
    run = read_json(folder / "results" / "two" / "pema-seed0.json")
    assert run["signature"]["config"]["choose_texts"] == 2


def test_perplexity_needs_no_texts_and_keeps_earlier_results_valid(folder, compared, monkeypatch):
    monkeypatch.setattr(Workplace, "dev_texts", None)
    experiment = written(folder, "likely", choose_by="perplexity")
    run_experiment(experiment, folder / "results", folder / "work")
    run = read_json(folder / "results" / "likely" / "pema-seed0.json")
    assert not {"choose_by", "choose_texts"} & set(run["signature"]["config"])
    assert all(set(tried) == {"settings", "dev_perplexity"} for tried in run["trials"])
    chosen = min(run["trials"], key=lambda tried: tried["dev_perplexity"])
    assert run["settings"] == chosen["settings"]
    assert "Tried on dev data: dev perplexity" in report(folder / "results" / "likely")


def test_the_examples_of_the_choice_are_spread_over_all(folder):
    rows = "".join(f"the house {i}\tdas Haus {i}\n" for i in range(7))
    (folder / "seven.tsv").write_text(rows, encoding="utf-8")
    assert written(folder, "spread", dev="seven.tsv", choose_texts=3).choice_numbers == [0, 2, 4]
    assert written(folder, "spread", dev="seven.tsv", choose_texts=7).choice_numbers == list(range(7))
    assert written(folder, "spread", dev="seven.tsv").choice_numbers == list(range(7))


def test_a_plan_counts_the_texts_for_dev(folder, monkeypatch):
    monkeypatch.setattr(Speed, "of", lambda *_: Speed(token=0.0, step=1.0, vector=0.0))
    folders = folder / "nothing", folder / "none"
    ((_, likely), (_, both), (_, one)) = (
        plan_experiment(written(folder, "planned", **changes), *folders)
        for changes in ({"choose_by": "perplexity"}, {}, {"choose_texts": 1})
    )
    target = (both.seconds - likely.seconds) / 2  # two candidates, whose texts for dev fit in one batch
    assert target > 1
    assert one.seconds - likely.seconds == pytest.approx(2 * target, abs=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choose_by": "blue"}, r"unknown choose_by 'blue': use chrf, bleu or perplexity \(did you mean 'bleu'\?\)"),
        ({"choose_by": "sari"}, r"unknown choose_by 'sari': use chrf, bleu or perplexity"),
        ({"choose_texts": 0}, r"choose_texts=0 is too small: it must be at least 1"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        written(folder, "refused", **changes)


def test_formality_chooses_only_if_dev_is_annotated(folder):
    for register in ("formal", "informal"):
        (folder / f"{register}.txt").write_text("[F]Sie[/F]\n" * 4, encoding="utf-8")
    text = (folder / "tiny.toml").read_text(encoding="utf-8")
    marks = 'formal = "formal.txt", informal = "informal.txt" }'
    text = text.replace('metrics = ["chrf", "bleu"]', 'metrics = ["formality_accuracy", "bleu"]')
    text = text.replace('"test.tsv" }', f'"test.tsv", {marks}')
    file = folder / "marked.toml"
    file.write_text(text, encoding="utf-8")
    assert read_config(file, "compare").choice_metric == "bleu"
    file.write_text('choose_by = "formality_accuracy"\n' + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"choose_by 'formality_accuracy' needs .* of dev .* another metric"):
        read_config(file, "compare")
    (folder / "four.tsv").write_text("the house\tdas Haus\n" * 4, encoding="utf-8")
    file.write_text(text.replace('"dev.tsv" }', f'"four.tsv", {marks}'), encoding="utf-8")
    assert read_config(file, "compare").choice_metric == "formality_accuracy"
