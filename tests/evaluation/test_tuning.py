"""The choice of an adapter's schedule by generated texts: from Python, from the command line, and what is stored."""

import json
from dataclasses import replace

import pytest
import sacrebleu

import pema
from pema.adapter.schedule import Constant, GradualUnrolling, Linear, NoAdapter
from pema.cli import main
from pema.errors import ConfigError, DataError
from pema.evaluation.choice import rank
from pema.evaluation.tuning import CANDIDATES, Tuning
from pema.tasks.held_out import spread

CONFIG = pema.preset("residual", rank=16, epochs=12, learning_rate=3e-2, device="cpu")


def examples(numbers):
    return [pema.Example(f"the house {i}", f"das Haus {i}") for i in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("tune")
    tiny_model("llama", seed=3).save_pretrained(folder / "plm")
    tiny_tokenizer().save_pretrained(folder / "plm")
    plm = pema.PLM.from_pretrained(folder / "plm")
    plm.adapt(examples(range(20)), "translation", CONFIG, folder / "adapted")
    rows = "".join(f"{each.source}\t{each.target}\n" for each in examples(range(30, 36)))
    (folder / "dev.tsv").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plm(folder):
    return pema.PLM.from_pretrained(folder / "plm")


@pytest.fixture
def adapter(folder):
    return pema.Adapter.from_pretrained(folder / "adapted" / "adapter")


def chrf(plm, adapter, dev, schedule):
    texts = pema.generate(plm, adapter, [each.source for each in dev], schedule=schedule)
    return sacrebleu.corpus_chrf(texts, [[each.target for each in dev]]).score


def test_the_best_schedule_becomes_the_adapters_own(plm, adapter, tmp_path):
    dev = examples(range(30, 36))
    # The distribution of a PLM with random weights is nearly flat, so that a small weight decides its texts.
    weak, candidates = Constant(1e-3), [Constant(3e-3), Constant(1e-2), Constant(1.0), GradualUnrolling(0.1)]
    adapter.config = replace(adapter.config, schedule=weak)
    tuning = pema.tune(plm, adapter, dev, metric="chrf", schedules=candidates)
    scores = dict(tuning.scores)
    assert list(scores) == [weak, *candidates]
    for schedule, score in scores.items():
        assert score == pytest.approx(chrf(plm, adapter, dev, schedule)), schedule
    assert tuning.plm_alone == pytest.approx(chrf(plm, adapter, dev, NoAdapter()))
    assert tuning.score == scores[tuning.best] == max(scores.values()) > max(tuning.plm_alone, scores[weak])
    assert tuning.helps
    assert len(set(scores.values())) > 2
    adapter.save_pretrained(tmp_path)
    loaded = pema.Adapter.from_pretrained(tmp_path)
    assert loaded.config.schedule == tuning.best
    assert chrf(plm, loaded, dev, None) == pytest.approx(tuning.score)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["pema"]["training"]["tuning"]
    assert stored == tuning.to_dict()
    assert (stored["metric"], stored["texts"], len(stored["scores"])) == ("chrf", 6, len(scores))
    assert stored["signature"].startswith("chrF")


def test_a_constant_weight_and_the_papers_schedule_are_candidates(plm, adapter):
    tuning = pema.tune(plm, adapter, examples([30]))
    assert [schedule for schedule, _ in tuning.scores] == list(dict.fromkeys((Constant(), *CANDIDATES)))
    assert {type(schedule) for schedule in CANDIDATES} == {Constant, Linear, GradualUnrolling}
    assert tuning.metric == "bleu"


def test_equal_scores_leave_the_adapters_own_schedule(plm, adapter):
    tuning = pema.tune(plm, adapter, examples([40]), metric="exact_match", schedules=[Constant(0.0), NoAdapter()])
    assert {score for _, score in tuning.scores} == {0.0} == {tuning.plm_alone}
    assert tuning.best == adapter.config.schedule == Constant()
    assert not tuning.helps


def test_a_metric_may_count_down_and_be_undefined():
    assert sorted([3.0, None, 1.0, 2.0], key=lambda score: rank("slot_errors", score)) == [1.0, 2.0, 3.0, None]
    assert sorted([3.0, None, 1.0, 2.0], key=lambda score: rank("bleu", score)) == [3.0, 2.0, 1.0, None]
    scores = ((Constant(0.5), None), (Linear(), 4.0), (GradualUnrolling(), 2.0))
    assert Tuning("slot_errors", 1, scores, 3.0, "made").best == GradualUnrolling()
    assert Tuning("slot_errors", 1, scores, 3.0, "made").helps
    assert Tuning("bleu", 1, scores, 4.0, "made").best == Linear()
    assert not Tuning("bleu", 1, scores, 4.0, "made").helps


def test_few_texts_are_spread_over_all_examples(plm, adapter):
    dev = examples(range(30, 40))
    some = pema.tune(plm, adapter, dev, texts=3, schedules=[Constant(1.0)])
    assert spread(10, 3) == [0, 3, 6]
    assert some.texts == 3
    again = pema.tune(plm, adapter, [dev[0], dev[3], dev[6]], schedules=[Constant(1.0)])
    assert dict(again.scores)[Constant(1.0)] == dict(some.scores)[Constant(1.0)]
    assert spread(4, 100) == [0, 1, 2, 3]
    assert spread(0, 5) == []


def test_what_cannot_be_tuned_is_refused_before_anything_is_generated(plm, adapter, monkeypatch):
    monkeypatch.setattr("pema.evaluation.tuning.generate", None)
    dev = examples([1])
    with pytest.raises(DataError, match="there are no examples to choose a schedule on: give dev examples"):
        pema.tune(plm, adapter, [])
    with pytest.raises(ConfigError, match="lambda_max is what is chosen here: name candidates with schedules="):
        pema.tune(plm, adapter, dev, lambda_max=0.5)
    with pytest.raises(ConfigError, match="schedule is what is chosen here"):
        pema.tune(plm, adapter, dev, schedule="constant")
    with pytest.raises(ConfigError, match=r"unknown metric 'blue'.*did you mean 'bleu'"):
        pema.tune(plm, adapter, dev, metric="blue")
    with pytest.raises(ConfigError, match="formality_accuracy needs formal and informal references"):
        pema.tune(plm, adapter, dev, metric="formality_accuracy")
    with pytest.raises(ConfigError, match="texts=0 is too small"):
        pema.tune(plm, adapter, dev, texts=0)
    assert adapter.config.schedule == Constant()


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pema", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_command_line_stores_what_python_chooses(plm, folder, adapter, tmp_path, monkeypatch, capsys):
    adapter.save_pretrained(tmp_path / "adapter")
    expected = pema.tune(plm, adapter, pema.read_examples(data=folder / "dev.tsv"), metric="chrf").to_dict()
    arguments = (
        "tune",
        tmp_path / "adapter",
        "--plm",
        folder / "plm",
        "--data",
        folder / "dev.tsv",
        "--metric",
        "chrf",
    )
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out) == {"adapter": str(tmp_path / "adapter"), **expected}
    assert pema.Adapter.from_pretrained(tmp_path / "adapter").config == adapter.config
    code, out, _ = run(monkeypatch, capsys, *arguments, "--texts", 2)
    assert code == 0
    assert sum("(stored)" in line for line in out.splitlines()) == 1
    assert all(str(schedule) in out for schedule in CANDIDATES)
    assert "PLM alone" in out


def test_the_command_line_refuses_by_name(folder, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "tune", "owner/name", "--plm", "embedded", "--data", folder / "dev.tsv")
    assert code == 1
    assert "owner/name is not a folder, which the schedule is stored in: download the adapter first" in err
    adapter = folder / "adapted" / "adapter"
    before = (adapter / "adapter_config.json").read_bytes()
    code, _, err = run(monkeypatch, capsys, "tune", adapter, "--plm", "embedded", "--data", folder / "dev.tsv")
    assert code == 1
    assert "adapter" in err.splitlines()[-1]
    assert (adapter / "adapter_config.json").read_bytes() == before
