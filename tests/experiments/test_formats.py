"""Formats: the same text for a value in the terminal, on pages and in the tables of docs."""

import html
import json
import re

import pytest

from made_results import make_comparison, write
from pema.evaluation.notation import NOTATIONS, metric_name, notation, score_text
from pema.experiments.formats import COSTS
from pema.experiments.reader import read_folder
from pema.experiments.table import comparison_tables
from pema.pages.report.document import report
from reproduction.folders import pack
from reproduction.lines import write_lines
from reproduction.studies import table
from reproduction.tables import comparisons
from reproduction.tables.results import read_results

COMET = {"PLM alone": 0.783, "LoRA": 0.8, "PEMA, best": 0.78}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison with four metrics, two of them to 100 and two to 1, and a second reference."""
    folder = make_comparison(tmp_path_factory.mktemp("results") / "made", count=20)
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    for row in comparison["rows"]:
        mean = COMET.get(row["label"], 0.5)
        row["metrics"]["comet"] = {"mean": mean, "std": None, "low": mean - 0.0312, "high": mean + 0.0088}
    for each in [each for each in comparison["differences"] if each["metric"] == "bleu"]:
        comparison["differences"].append(each | {"metric": "comet", "difference": 0.0021, "low": -0.001, "high": 0.005})
    for each in [each for each in comparison["differences"] if each["label"] == "LoRA"]:
        comparison["differences"].append(each | {"label": "IA3", "reference": "LoRA", "p_value": 0.0004})
    write(folder / "comparison.json", comparison)
    (folder / "comet").mkdir()
    for path in folder.glob("*-seed*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        score = {"metric": "comet", "segments": [COMET.get(run["label"], 0.5)], "signature": "made"}
        run["signature"]["config"]["grid"] = {}
        run["signature"]["machine"]["cpu_capability"] = "AVX2"
        write(path, run)
        write(folder / "comet" / path.name, score)
    comparison["signature"]["config"]["runs"] = {
        label: [run.run for run in runs] for label, runs in read_folder(folder).runs.items()
    }
    comparison["signature"]["machine"]["cpu_capability"] = "AVX2"
    write(folder / "comparison.json", comparison)
    return folder


@pytest.fixture(scope="module")
def tables(folder, tmp_path_factory):
    """Cells by label and heading, of every kind of table."""
    committed = tmp_path_factory.mktemp("committed")
    write_lines(committed / "made.jsonl", pack(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparisons, "FOLDER", committed)
        docs = comparisons.comparison("made")
    return {
        "terminal": [cells for each in comparison_tables(folder) for cells in zip(*columns(each), strict=True)],
        "page": [
            [html.unescape(re.sub("<[^>]*>", " ", cell)) for cell in re.findall("<t[dh].*?</t[dh]>", line)]
            for line in report(folder).splitlines()
            if line.startswith("<tr")
        ],
        "docs": [line.split("|")[1:-1] for line in docs.splitlines() if line.startswith("|")],
        "study": [
            line.split("|")[1:-1]
            for line in table(read_results(committed / "made.jsonl")).splitlines()
            if line.startswith("|")
        ],
    }


def columns(table):
    return [[str(column.header), *map(str, column.cells)] for column in table.columns]


def cells(rows, label):
    """All cells of the rows of a label, as one text."""
    return " | ".join(
        cell for first, *rest in rows if re.match(rf"\s*{re.escape(label)}(?![,\w])", first) for cell in rest
    )


@pytest.mark.parametrize("label", ["PLM alone", "LoRA", "PEMA, best", "IA3"])
@pytest.mark.parametrize("kind", ["terminal", "page", "docs", "study"])
def test_a_score_is_the_same_text_in_every_table(folder, tables, kind, label):
    row = read_folder(folder).rows[label]
    assert set(row.metrics) == {"bleu", "chrf", "formality_accuracy", "comet"}
    for metric, interval in row.metrics.items():
        text = score_text(metric, interval.mean)
        assert re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", cells(tables[kind], label)), (metric, text)
        if kind in ("terminal", "page"):
            assert f"{score_text(metric, interval.low)} to {score_text(metric, interval.high)}" in cells(
                tables[kind], label
            )


@pytest.mark.parametrize("kind", ["terminal", "page", "docs"])
def test_costs_and_differences_are_the_same_text_in_every_table(folder, tables, kind):
    results = read_folder(folder)
    text = cells(tables[kind], "LoRA")
    for name in results.cost_columns(COSTS):
        if not (kind == "docs" and name == "trainable_parameters"):
            assert COSTS[name].text(results.cost("LoRA", name)) in text, name
    against = re.sub(r"[() ,]+", " ", cells(tables[kind], "IA3"))
    for metric in results.metrics:
        difference = results.difference("LoRA", "IA3", metric)
        for value in (difference.difference, difference.low, difference.high):
            assert score_text(metric, value, signed=True) in against
    assert against.count("p < 0.001") >= len(results.metrics)


def test_one_comet_score_has_one_text():
    assert [score_text("comet", value) for value in (0.8, 0.78, 0.783)] == ["0.8000", "0.7800", "0.7830"]


@pytest.mark.parametrize("metric", NOTATIONS)
def test_digits_follow_from_the_metric_and_not_from_the_value(metric):
    decimals = notation(metric).decimals
    for value in (0.0, 1e-9, 0.9712, 1.0, 7.25, 99.999, 1234.5):
        text = score_text(metric, value)
        assert len(text.partition(".")[2]) == decimals
        assert float(text.replace(",", "")) == pytest.approx(value, abs=0.51 * 10**-decimals)
        assert score_text(metric, -value - 1, signed=True).startswith("-")
    assert metric_name(metric)
