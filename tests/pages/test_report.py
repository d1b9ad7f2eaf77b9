"""The report's page as text: contents, escapes and refusals."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from made_results import METHODS, make_comparison, make_sweep, write
from pema.cli import main
from pema.errors import DataError
from pema.evaluation.notation import metric_name, score_text
from pema.experiments import formats
from pema.experiments.reader import read_results
from pema.pages.page import static
from pema.pages.report.document import report

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1"> & <!--'


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with a comparison and a sweep; nobody changes it."""
    folder = tmp_path_factory.mktemp("results")
    make_comparison(folder / "a", count=20)
    make_sweep(folder / "b", count=20, examples=False)
    return folder


@pytest.fixture(scope="module")
def page(results):
    return report(results)


@pytest.fixture
def changeable(results, tmp_path):
    """A copy of the comparison, and a function that changes one of its JSON files."""
    folder = tmp_path / "copy"
    shutil.copytree(results / "a", folder)

    def change(name, edit):
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(value)
        write(folder / name, value)
        return folder

    change.folder = folder
    return change


class Reader(HTMLParser):
    """Rows of tables, every start tag, and all text outside scripts and styles."""

    def __init__(self, document):
        super().__init__()
        self.rows, self.tags, self.text, self.within = [], [], [], ""
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.within = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within in ("script", "style"):
            return
        self.text.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def data_of(document):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)[1])


def test_the_table_shows_every_method_with_its_numbers(results, page):
    (experiment, _) = read_results(results)
    rows = {row[0].split(" seed")[0]: row for row in Reader(page).rows}
    for label, *_ in METHODS:
        found, runs = experiment.rows[label], experiment.runs[label]
        row = next(row for name, row in rows.items() if name.startswith(label))
        for metric, cell in zip(("bleu", "chrf"), row[1:3], strict=True):
            values = found.metrics[metric]
            assert cell.startswith(f"{values.mean:.2f}")
            assert f"{values.low:.2f} to {values.high:.2f}" in cell
            assert (values.std is None) != (f"± {values.std or 0:.2f}" in cell)
            difference = experiment.differences["PLM alone"].get((label, metric))
            assert (difference is None) == (label == "PLM alone")
            if difference:
                assert f"{difference.difference:+.2f}, p " in cell
                assert ("▲" in cell) == (difference.mark == "+")
        seconds = sum(run.costs.train_seconds for run in runs) / len(runs)
        assert row[6] == formats.seconds(seconds)
    assert rows["LoRA3"][9:] == ["all", "yes", "yes\n"]
    assert rows["PLM alone1"][4:] == ["0", "0 B", "0 s", rows["PLM alone1"][7], "0 B", "no", "no", "no\n"]


def test_marks_say_above_below_and_no_difference(changeable):
    def edit(comparison):
        for found, (difference, significant) in zip(
            comparison["differences"], ((-1.5, True), (0.2, False), (3, True)), strict=False
        ):
            found |= {"difference": difference, "significant": significant, "p_value": 0.0123}

    text = "".join(Reader(report(changeable("comparison.json", edit))).text)
    assert "▼significantly below PLM alone:  -1.50, p = 0.012" in text
    assert "≈not significantly different from PLM alone:  +0.20, p = 0.012" in text
    assert "▲significantly above PLM alone:  +3.000, p = 0.012" in text


def test_every_run_shows_its_signature(results, page):
    text = "".join(Reader(page).text)
    for experiment in read_results(results):
        for run in (run for runs in experiment.runs.values() for run in runs):
            assert run.run in text
            assert json.dumps(run.signature.config, indent=2) in text
    runs = 25 + 37
    for known in ("2.13.0+cpu", "a made-up processor", "0" * 40, "BLEU|nrefs:1|case:mixed|eff:no|tok:13a"):
        assert text.count(known) >= runs


def test_scripts_get_means_curves_and_swept_settings(results, page):
    comparison, sweep = data_of(page).values()
    runs = read_results(results)[0].runs["LoRA"]
    lora = comparison["methods"][2]
    peaks = [run.costs.train_peak_bytes for run in runs]
    assert lora["costs"]["train_peak_bytes"]["mean"] == pytest.approx(sum(peaks) / 3)
    assert lora["output"] == read_results(results)[0].outputs["lora-seed0"]
    assert [run["curve"] for run in comparison["runs"] if run["method"] == 2] == [
        [[point.epoch, point.seconds, point.held_out_loss] for point in run.curve] for run in runs
    ]
    assert len(comparison["examples"]) == 20
    assert sweep["axes"] == ["rank", "learning_rate"]
    assert [sweep["methods"][n]["entry"] for n in (0, 1, 12)] == ["PLM alone", "PEMA", "PEMA"]
    assert [sweep["methods"][n]["settings"] for n in (0, 1)] == [{}, {"rank": 16, "learning_rate": 1e-4}]
    assert sweep["examples"] is None


def test_the_page_loads_nothing(page):
    # The name of SVG is no address: nothing is fetched from it.
    assert not re.search(r"https?://|@import|url\(", page.replace('"http://www.w3.org/2000/svg"', ""))
    for _, attributes in Reader(page).tags:
        assert "src" not in attributes
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"


def test_the_same_results_make_the_same_bytes_wherever_they_lie(results, page, tmp_path):
    shutil.copytree(results, tmp_path / "elsewhere")
    assert report(tmp_path / "elsewhere") == page
    assert str(results) not in page


def test_one_experiments_folder_is_a_report_too(results):
    document = report(results / "a")
    assert document.count("<article") == 1
    assert "<h1>Made-up comparison (test data)</h1>" in document
    assert len(data_of(document)) == 1


def test_text_of_results_stays_text(tmp_path):
    folder = make_comparison(tmp_path / "a", count=3, title=HOSTILE)
    for path in folder.glob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8").replace("LoRA", json.dumps(HOSTILE)[1:-1]))
        if "needs" in value:
            value["settings"] = {HOSTILE: HOSTILE}
            value["scores"]["bleu"]["signature"] = value["signature"]["commit"] = HOSTILE
            value["signature"]["config"] = {HOSTILE: [HOSTILE]}
        write(path, value)
    for path in folder.glob("*.txt"):
        path.write_text(f"{HOSTILE}\n" * 3, encoding="utf-8")
    write_lines = [json.dumps({"source": HOSTILE, "target": HOSTILE})] * 3
    (folder / "examples.jsonl").write_text("\n".join(write_lines) + "\n", encoding="utf-8")
    document = report(folder)
    tags = [tag for tag, _ in Reader(document).tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert data_of(document)["e0"]["examples"] == [[HOSTILE, [HOSTILE]]] * 3
    assert HOSTILE in "".join(Reader(document).text)


def test_what_was_not_measured_is_a_dash(changeable):
    def edit(run):
        run["costs"]["train_peak_bytes"] = None
        run["dev_perplexity"] = None

    changeable("plm-alone-seed0.json", edit)
    document = report(changeable("knn-lm-seed0.json", edit))
    row = next(row for row in Reader(document).rows if row and row[0].startswith("PLM alone"))
    assert row[5] == "–"
    assert data_of(document)["e0"]["methods"][0]["costs"]["train_peak_bytes"] is None


def test_further_references_have_a_table_each(changeable):
    def edit(comparison):
        found = {"label": "PLM alone", "reference": "LoRA", "metric": "bleu", "low": -3.0, "high": -1.0}
        found |= {"difference": -2.0, "p_value": 0.002, "significant": True}
        comparison["differences"].append(found)

    document = report(changeable("comparison.json", edit))
    assert "<summary>Compared with LoRA</summary>" in document
    assert "Compared with <b>PLM alone</b>" in document
    text = "".join(Reader(document).text)
    assert "▼significantly below LoRA:  -2.00, p = 0.002-3.00 to -1.00" in text


def test_without_a_reference_nothing_is_compared(changeable):
    def edit(about):
        about["reference"] = None

    changeable("experiment.json", edit)
    document = report(changeable("comparison.json", put("differences", [])))
    assert "significantly" not in document.replace(static("report/report.css"), "")
    assert data_of(document)["e0"]["reference"] is None


def test_scores_of_another_environment_join_the_runs(changeable):
    def edit(comparison):
        for row in comparison["rows"]:
            row["metrics"]["comet"] = {"mean": 0.75, "std": None, "low": 0.5, "high": 0.875}

    folder = changeable("comparison.json", edit)
    with pytest.raises(DataError, match=r"the run .*-seed0 has no score 'comet'\. Produce the results again"):
        report(folder)
    (folder / "comet").mkdir()
    for path in folder.glob("*-seed*.json"):
        write(folder / "comet" / path.name, {"metric": "comet", "segments": [0.25, 0.5], "signature": HOSTILE})
    text = "".join(Reader(report(folder)).text)
    assert text.count(f"0.375  ({HOSTILE})") == 25
    assert "COMET" in text
    write(folder / "comet" / "lora-seed0.json", {"metric": "comet", "segments": [0.25]})
    with pytest.raises(DataError, match=r"lora-seed0\.json: 'signature' is missing\. Score the outputs again"):
        report(folder)


def test_an_accelerators_memory_has_a_column_where_there_was_one(changeable):
    def edit(run):
        run["costs"]["train_peak_accelerator_bytes"] = 3_000_000_000

    assert "<span>Peak accelerator memory</span>" not in report(changeable.folder)
    document = report(changeable("lora-seed0.json", edit))
    rows = [row for row in Reader(document).rows if row]
    column = rows[1].index("Peak accelerator memory")
    assert [row[column] for row in rows[2:]].count("–") == 8
    assert next(row for row in rows if row[0].startswith("LoRA"))[column] == "3.00 GB"


def drop(name):
    """An edit that takes a field away; a dot stands between the names of nested ones."""

    def edit(value):
        *outer, last = name.split(".")
        for key in outer:
            value = value[key]
        del value[last]

    return edit


def put(name, new):
    def edit(value):
        *outer, last = name.split(".")
        for key in outer:
            value = value[int(key)] if isinstance(value, list) else value[key]
        value[last] = new

    return edit


AGAIN = r"Produce the results again with `pema compare`"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("experiment.json", drop("plm.name"), r"t\.json: 'plm\.name' is missing\. It is damaged or of an older"),
        ("experiment.json", put("kind", "both"), "unknown kind 'both': use compare or sweep"),
        ("experiment.json", put("kind", "sweep"), "'axes' is missing"),
        ("experiment.json", put("metrics", []), r"metrics is a list of 0 items, not a list of different names"),
        ("experiment.json", put("methods", [1]), r"methods\[0\]=1 must be a text"),
        ("experiment.json", put("metrics", ["bleu", "bleu"]), "not a list of different names"),
        ("experiment.json", put("reference", 3), "reference=3 must be a text"),
        ("experiment.json", put("reference", "none"), rf"names .*'LoRA'.* and the reference 'none'\. {AGAIN}"),
        ("experiment.json", put("data.test", 21), rf"seed0\.txt has 20 lines for 21 test examples\. {AGAIN}"),
        ("experiment.json", put("metric", "bleu"), r"unknown setting 'metric' of \w+: .*did you mean 'metrics'"),
        ("comparison.json", put("rows.0.label", "x"), r"comparison\.json has rows of 'x', .*, experiment\.json names"),
        ("comparison.json", put("rows.0.seeds", 9), "counts 9 seeds of 'PLM alone', but there are 1 runs"),
        ("comparison.json", drop("rows"), r"comparison\.json: 'rows' is missing"),
        ("comparison.json", put("rows", ["x"]), r"rows\[0\] is 'x', not an object"),
        ("comparison.json", put("rows.0.metrics", {}), "lacks 'bleu' of 'PLM alone'"),
        (
            "comparison.json",
            put("rows.0.metrics.bleu.low", None),
            r"rows\[0\]\.metrics\.bleu\.low=None must be a number",
        ),
        (
            "comparison.json",
            put("differences.0.p_value", "y" * 99),
            r"\.p_value='y+\.\.\.' must be a number",
        ),
        ("comparison.json", put("differences.0.significant", 1), "significant=1 must be true or false"),
        ("lora-seed1.json", drop("costs.disk_bytes"), r"seed1\.json: 'costs\.disk_bytes' is missing\. Remove it and"),
        ("lora-seed1.json", put("seed", True), "seed=True must be a whole number"),
        ("lora-seed1.json", drop("scores.chrf"), "the run lora-seed1 has no score 'chrf'"),
        ("lora-seed1.json", put("scores.chrf", 3), r"scores\.chrf is 3, not an object"),
        ("lora-seed1.json", put("curve", [{"epoch": 0}]), r"'curve\[0\]\.seconds' is missing"),
        ("lora-seed1.json", put("trials", [3]), r"trials\[0\] is 3, not an object"),
        (
            "lora-seed1.json",
            put("needs.weights", "few"),
            r"unknown (needs\.)?weights 'few': use none, some or all",
        ),
        ("lora-seed1.json", put("run", "lora"), r"contains the run 'lora': name the file lora\.json, or remove it"),
        (
            "lora-seed1.json",
            put("label", "Lora"),
            "lora-seed1 is a run of 'Lora', which is not in the experiment: remove it",
        ),
    ],
)
def test_a_damaged_result_is_named(changeable, name, edit, message):
    with pytest.raises(DataError, match=message):
        report(changeable(name, edit))


def test_missing_folders_and_runs_are_named(changeable, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder: give the folder that `pema compare`"):
        report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"contains no experiment: there is no experiment\.json in it or in its"):
        report(tmp_path / "empty")
    for path in changeable.folder.glob("lora-seed*.json"):
        path.unlink()
    with pytest.raises(DataError, match=f"copy contains no run of 'LoRA'. {AGAIN}"):
        report(changeable.folder)


def test_other_broken_files_are_named(changeable):
    folder = changeable.folder
    (folder / "examples.jsonl").write_text('{"source": "a", "target": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"examples\.jsonl has 1 lines for 20 test examples"):
        report(folder)
    (folder / "ia3-seed0.txt").unlink()
    with pytest.raises(DataError, match=r"ia3-seed0\.txt"):
        report(folder)
    (folder / "comparison.json").unlink()
    with pytest.raises(DataError, match=r"comparison\.json does not exist"):
        report(folder)


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (formats.scaled(0, "B"), "0 B"),
        (formats.scaled(999, "B"), "999 B"),
        (formats.scaled(999_600, "B"), "1.00 MB"),
        (formats.scaled(20_082e6, "B"), "20.1 GB"),
        (formats.scaled(294_912), "295 k"),
        (formats.scaled(None), "–"),
        (formats.seconds(0), "0 s"),
        (formats.seconds(0.0012), "1.20 ms"),
        (formats.seconds(3120.4), "3,120 s"),
        (formats.seconds(float("nan")), "–"),
        (score_text("formality_accuracy", 0.9712), "0.971"),
        (score_text("style_accuracy:some/model", 0.9712), "0.971"),
        (score_text("comet", 0.783), "0.7830"),
        (score_text("bleu:zh", -1.234, signed=True), "-1.23"),
        (score_text("bleu", None), "–"),
        (score_text("bleu", float("nan")), "–"),
        (formats.p_value(0.0004), "p < 0.001"),
        (formats.p_value(0.05), "p = 0.050"),
        (metric_name("rougeL"), "ROUGE-L"),
        (metric_name("my_metric"), "my metric"),
        (metric_name("style_accuracy:some/model"), "style accuracy (some/model)"),
    ],
)
def test_numbers_are_written_with_few_digits(made, known):
    assert made == known


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """WCAG 2's contrast ratio."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme):
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", static("page.css"))
    colours = {name: (light, dark)[scheme] for name, light, dark in found}
    for text in ("text", "muted", "accent", "better", "worse", "missing"):
        for ground in ("background", "surface", "raised"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["text"], colours["mark"]) >= 4.5
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    series = [name for name in colours if name.startswith("series-")]
    assert len(series) == 10
    for drawn in (*series, "strong-line", "mark-line"):
        assert contrast(colours[drawn], colours["surface"]) >= 3, drawn


def test_the_verb_writes_the_page_without_torch(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pema", "report", str(results), "-o", str(tmp_path / "page.html"), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "report": str(tmp_path / "page.html"),
        "bytes": (tmp_path / "page.html").stat().st_size,
        "experiments": 2,
        "missing": {},
    }
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report(results)
    code = (
        "import sys; from pema.cli.app import app\n"
        f"app(['report', {str(results)!r}, '-o', {str(tmp_path / 'second.html')!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_verb_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pema", "report", str(tmp_path), "-o", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "contains no experiment" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
