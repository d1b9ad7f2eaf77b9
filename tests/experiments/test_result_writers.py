"""The report as tables in files: Markdown, LaTeX and CSV, of complete and of unfinished experiments."""

import csv
import io
import json
import re

import pytest

from made_results import METHODS, make_comparison, make_sweep, write
from pema.cli import main
from pema.errors import ConfigError, DataError
from pema.evaluation.notation import NOTHING, score_text
from pema.experiments.formats import COSTS
from pema.experiments.reader import read_folder, read_results
from pema.experiments.table import comparison_tables
from pema.experiments.tables import result_tables
from pema.experiments.writers import LATEX, comma_separated, latex, markdown
from pema.pages.report.document import report
from pema.pages.report.writing import write_report

NASTY = r"50% & more_{x} #1 $a^b$ ~ \\ <i>|\"q\""


def edit(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write(path, value)


@pytest.fixture
def folder(tmp_path):
    """A comparison with two references, a metric that rests on few texts, and a training that did not help."""
    folder = make_comparison(tmp_path / "results" / "made", count=40)

    def change(comparison):
        comparison["rows"][2]["metrics"]["formality_accuracy"]["texts"] = 3
        comparison["rows"][3]["no_help"] = [{"run": "ia3-seed0", "reason": "step 0"}]
        comparison["rows"][5]["no_help"] = [{"run": "full-fine-tuning-seed1", "reason": "same texts"}]
        for each in [each for each in comparison["differences"] if each["label"] != "LoRA"]:
            comparison["differences"].append(each | {"reference": "LoRA"})

    edit(folder / "comparison.json", change)
    return folder


def unfinished(folder, *labels):
    """Make the comparison one whose runs of these labels are not finished yet."""
    runs = {label: [run.run for run in runs] for label, runs in read_folder(folder).runs.items()}
    for label in labels:
        for name in runs[label]:
            (folder / f"{name}.json").unlink()
            (folder / f"{name}.txt").unlink()

    def change(comparison):
        for name in ("rows", "differences"):
            comparison[name] = [each for each in comparison[name] if each["label"] not in labels]
        comparison["differences"] = [each for each in comparison["differences"] if each["reference"] not in labels]
        compared = {label: names for label, names in runs.items() if label not in labels}
        comparison["signature"]["config"]["runs"] = compared

    edit(folder / "comparison.json", change)
    edit(folder / "experiment.json", lambda about: about.update(runs=runs))
    return runs


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_every_number_of_a_comparison_is_in_the_csv_unrounded(folder):
    make_sweep(folder.parent / "swept", count=20)
    experiments = read_results(folder.parent)
    rows = rows_of(comma_separated(experiments))
    assert len(rows) == sum(len(results.rows) for results in experiments) == 9 + 13
    by_line = {(row["experiment"], row["label"]): row for row in rows}
    for results in experiments:
        for label, line in results.rows.items():
            row = by_line[results.about.name, label]
            assert int(row["seeds"]) == line.seeds
            for metric, interval in line.metrics.items():
                for column, value in ((metric, interval.mean), (f"{metric} low", interval.low)):
                    assert float(row[column]) == value
                assert row[f"{metric} std"] == ("" if interval.std is None else repr(interval.std))
            for name in results.cost_columns(COSTS):
                assert float(row[name]) == results.cost(label, name)
    lora, ia3 = by_line["made", "LoRA"], by_line["made", "IA3"]
    difference = experiments[0].difference("LoRA", "IA3", "chrf")
    assert float(ia3["chrf minus LoRA"]) == difference.difference
    assert float(ia3["chrf minus LoRA p"]) == difference.p_value
    assert lora["chrf minus LoRA"] == ""
    assert lora["formality_accuracy texts"] == "3"
    assert by_line["made", "PLM alone"]["needs_gradients"] == "false"
    assert (ia3["runs_not_helped_by_training"], lora["runs_not_helped_by_training"]) == ("1", "0")
    assert by_line["swept", "PLM alone"]["chrf minus LoRA"] == ""


def test_cut_texts_have_a_column_in_every_table_where_there_are_any(folder):
    def spent(count):
        return lambda run: run["costs"].update(cut_texts=count)

    titles = ("Cut texts", "cut_texts")

    def written():
        results = read_folder(folder)
        return [markdown([results]), latex([results]), report(folder), comma_separated([results])]

    for run in read_folder(folder).runs["LoRA"]:
        edit(folder / f"{run.run}.json", spent(0))
    assert not any(title in text for text in written() for title in titles)
    for run, count in zip(read_folder(folder).runs["LoRA"], (1234, 1235, 1236), strict=True):
        edit(folder / f"{run.run}.json", spent(count))
    for run, count in zip(read_folder(folder).runs["IA3"], (0, 1, 0), strict=True):
        edit(folder / f"{run.run}.json", spent(count))
    *shown, table = written()
    assert all("Cut texts" in text and "1,235" in text for text in shown)
    costs = next(each for each in result_tables(read_folder(folder)) if "Cut texts" in each.columns)
    column = costs.columns.index("Cut texts")
    assert {row[0].text: row[column].text for row in costs.rows if row[column].text != NOTHING} == {
        "LoRA": "1,235",
        "IA3": "0.3",
    }
    rows = {row["label"]: row["cut_texts"] for row in csv.DictReader(io.StringIO(table))}
    assert (rows["LoRA"], float(rows["IA3"]), rows["kNN-LM"]) == ("1235.0", pytest.approx(1 / 3), "")


def test_latex_has_one_cell_for_every_column_and_the_best_in_bold(folder):
    results = read_folder(folder)
    text = latex([results])
    tables = re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, re.DOTALL)
    assert len(tables) == len(result_tables(results)) == 3
    for table in tables:
        columns = len(re.search(r"\\begin\{tabular\}\{(l r*)\}".replace(" ", ""), table)[1])
        body = re.search(r"\\toprule\n(.*)\\bottomrule", table, re.DOTALL)[1].replace("\\midrule\n", "")
        for line in body.splitlines():
            assert line.endswith(r" \\")
            assert len(re.split(r"(?<!\\)&", line)) == columns
    for metric in results.metrics:
        bold = f"\\textbf{{{score_text(metric, results.best(metric))} "
        (line,) = [line for line in tables[0].splitlines() if bold in line]
        assert line.startswith("Full fine-tuning ")
    assert tables[0].count(r"\textbf") == len(results.metrics)
    assert "1.000" not in text or "on 3 of 40" in text


def test_what_latex_and_markdown_would_read_as_a_command_stays_text(tmp_path):
    folder = make_comparison(tmp_path / "a", count=3, title=NASTY)
    results = [read_folder(folder)]
    caption = re.search(r"\\caption\{(.*)\}", latex(results))[1]
    plain = caption
    for character, command in LATEX.items():
        if character != "\\":
            plain = plain.replace(command, character)
    assert plain.replace(LATEX["\\"], "\\") == NASTY
    heading = markdown(results).splitlines()[0]
    assert re.sub(r"\\(.)", r"\1", heading) == f"## {NASTY}"
    assert not re.search(r"(?<!\\)[<|*`\[]", heading)


def test_markdown_has_the_same_cells(folder):
    results = read_folder(folder)
    text = markdown([results]).replace("\\<", "<")
    for table in result_tables(results):
        for row in table.rows:
            cells = [(cell, " ".join(cell.text.split())) for cell in row]
            line = " | ".join(f"**{written}**" if cell.best else written for cell, written in cells)
            assert f"| {line} |" in text


@pytest.mark.parametrize(("name", "start"), [("t.html", "<!doctype"), ("t.md", "##"), ("t.tex", "%"), ("t.csv", "exp")])
def test_the_suffix_decides_what_is_written(folder, tmp_path, name, start, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pema", "report", str(folder), "-o", str(tmp_path / name), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


@pytest.mark.parametrize("name", ["t.txt", "t", "t.TEX"])
def test_another_suffix_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ConfigError, match=r"unknown suffix '.*' of .*: use \.html, \.md, \.tex or \.csv\."):
        write_report(tmp_path / "nowhere", tmp_path / name)


@pytest.mark.parametrize("write_table", [report, lambda folder: latex([read_folder(folder)]), None])
def test_tables_say_on_how_many_texts_a_value_rests_and_where_training_did_not_help(folder, write_table):
    if write_table is None:
        (quality, *_) = comparison_tables(folder)
        cells = [cell for column in quality.columns for cell in column.cells]
        text = " ".join(map(str, [*cells, quality.caption]))
    else:
        text = write_table(folder)
    assert text.count("on 3 of 40") == 1
    marks = text.count("†") + text.count(r"$\dagger$")
    assert marks == (2 + 2 + 1 if write_table is report else 2 + 1)
    assert "the held-out loss never fell, so the weights of step 0 were kept (ia3-seed0)" in text
    assert "the texts are those of the PLM alone (full-fine-tuning-seed1)" in text


def test_an_unfinished_comparison_has_a_report_that_names_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    unfinished(folder, "IA3", "PEMA, best")
    results = read_folder(folder)
    assert list(results.rows) == [label for label, *_ in METHODS if label not in ("IA3", "PEMA, best")]
    assert results.missing == tuple(f"{name}-seed{seed}" for name in ("ia3", "pema--best") for seed in range(3))
    sentence = f"Not finished: {', '.join(results.missing)}. Run `pema compare` again: it continues."
    assert sentence in report(folder)
    assert sentence in comparison_tables(folder)[0].caption.plain
    monkeypatch.setattr("sys.argv", ["pema", "report", str(folder), "-o", str(tmp_path / "t.csv"), "--json"])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["missing"] == {"made": list(results.missing)}
    assert len(rows_of((tmp_path / "t.csv").read_text(encoding="utf-8"))) == 7


def test_a_comparison_without_its_reference_yet_marks_nothing(folder):
    unfinished(folder, "PLM alone")
    results = read_folder(folder)
    assert results.about.reference is None
    assert "better" not in " ".join(result_tables(results)[0].notes)
    assert report(folder)


def test_a_run_of_a_seed_that_is_no_longer_planned_is_named(folder):
    def fewer(experiment):
        experiment["runs"] = {label: names[:2] for label, names in experiment["runs"].items()}

    unfinished(folder)
    edit(folder / "experiment.json", fewer)
    with pytest.raises(DataError, match=r"-seed2 is of seed 2, which experiment.json does not name: remove it"):
        read_folder(folder)


def test_runs_that_ended_after_the_last_comparison_are_named(folder):
    unfinished(folder, "IA3")
    kept = {path.name: path.read_bytes() for path in folder.glob("lora-*")}

    def forget(comparison):
        comparison["rows"] = [row for row in comparison["rows"] if row["label"] != "LoRA"]
        without = [each for each in comparison["differences"] if "LoRA" not in (each["label"], each["reference"])]
        comparison["differences"] = without
        del comparison["signature"]["config"]["runs"]["LoRA"]

    edit(folder / "comparison.json", forget)
    assert kept
    results = read_folder(folder)
    assert results.uncompared == ("lora-seed0", "lora-seed1", "lora-seed2")
    assert "Finished, but not in the table yet: lora-seed0, lora-seed1, lora-seed2. Run" in report(folder)


def test_a_comparison_without_finished_runs_is_refused_alone_and_left_out_among_others(folder, capsys):
    other = make_comparison(folder.parent / "other", count=20)
    edit(other / "experiment.json", lambda about: about.update(runs={"PLM alone": ["plm-alone-seed0"]}))
    (other / "comparison.json").unlink()
    with pytest.raises(DataError, match=r"no run is compared yet: run `pema compare` again, which continues"):
        read_results(other)
    assert [results.about.name for results in read_results(folder.parent)] == ["made"]
    assert f"{other} is left out: none of its finished runs is compared yet." in capsys.readouterr().err
