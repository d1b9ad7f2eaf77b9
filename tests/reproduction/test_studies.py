"""The studies: the committed pages match the committed results; tables and plots show the results."""

import re
import tomllib
import xml.etree.ElementTree as ElementTree

import pytest

from pema.errors import AdapterError
from pema.experiments.experiment import Experiment
from reproduction import studies
from reproduction.lines import write_lines
from reproduction.tables import middle_layer, refinements, unrolling
from reproduction.tables.markdown import BEGIN, END, parts_of
from reproduction.tables.results import DEV, lines_of, read_results

SIGNATURE = {
    "config": {},
    "seed": 0,
    "versions": {"torch": "2.13"},
    "commit": None,
    "machine": {"processor": "made", "cores": 1, "cpu_capability": "AVX2"},
}
PLM = {"name": "made", "d": 8, "vocabulary_size": 16, "parameters": 9_000_000}


def made(file, lines, *, axes=None, seeds=(0, 1), reference="PLM alone", grid=None):
    """Write the results of lines: label -> (method, settings, chrF per seed, dev perplexity per seed)."""
    results, rows, found = [], [], []
    for number, (label, (method, settings, scores, perplexities)) in enumerate(lines.items()):
        signature = SIGNATURE | {"config": {"plm": PLM, "grid": grid or {}}}
        for seed, (score, perplexity) in enumerate(zip(scores, perplexities, strict=True)):
            costs = dict.fromkeys(("prepare_seconds", "train_peak_bytes", "seconds_per_token"), None)
            costs |= {"generated_tokens": None, "disk_bytes": None}
            run = {
                "run": f"line{number}-seed{seed}",
                "label": label,
                "method": method,
                "settings": settings,
                "seed": seed,
                "scores": {"chrf": {"value": score, "signature": "made"}},
                "dev_perplexity": perplexity,
                "trials": [],
                "costs": costs | {"train_seconds": 10 * seed, "trainable_parameters": 2000},
                "needs": {"weights": "none", "targets_at_owner": True, "gradients": False},
                "curve": [],
                "signature": signature,
            }
            results.append(run)
        interval = {"mean": sum(scores) / len(scores), "std": None, "low": 0.0, "high": 99.0}
        rows.append({"label": label, "seeds": len(scores), "metrics": {"chrf": interval}})
        if reference not in (None, label):
            difference = scores[0] - 30
            values = {"difference": difference, "low": -9.0, "high": 9.0, "p_value": 0.5}
            names = {"label": label, "reference": reference, "metric": "chrf"}
            found.append(names | values | {"significant": abs(difference) > 5})
    comparison = {"rows": rows, "differences": found, "signature": SIGNATURE}
    experiment = {
        "name": "made",
        "title": "Made & drawn",
        "kind": "sweep",
        "task": "translation",
        "plm": PLM,
        "seeds": list(seeds),
        "metrics": ["chrf"],
        "methods": list(lines),
        "reference": reference,
        "axes": axes or {},
        "data": {"name": "made", "sha256": "0", "train": 1500, "dev": 3, "test": 4},
        "signature": SIGNATURE,
    }
    write_lines(file, [{"experiment": experiment}, *results, {"comparison": comparison}])


RANKS = {
    "PLM alone": ("plm", {}, [30.0], [25.0]),
    "paper, rank=8": ("pema", {"preset": "paper", "rank": 8}, [31.0, 33.0], [20.0, 22.0]),
    "paper, rank=80": ("pema", {"preset": "paper", "rank": 80}, [36.0, 38.0], [12.0, 14.0]),
    "best, rank=80": ("pema", {"preset": "residual", "rank": 80}, [20.0, 20.0], [None, 50.0]),
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Folders of the studies in place of the repository's own."""
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(studies, "PAGES", tmp_path / "pages")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "README.md").write_text(f"# Studies\n\n{BEGIN}{END}behind\n", encoding="utf-8")
    return tmp_path


def cells(block):
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in found if len(row) > 1}


def texts(svg):
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def words(svg):
    return [text for text in texts(svg) if re.search("[A-Za-z]{2}", text)]


@pytest.mark.parametrize("name", studies.finished())
def test_the_committed_page_is_that_of_the_results(name):
    assert parts_of(studies.PAGES / f"{name}.md")[1] == studies.block(name), "run python -m reproduction"
    committed = (studies.PAGES / f"{name}.svg").read_bytes()
    # Ticks and paths are matplotlib's, which differ from one version to the next.
    assert words(committed) == words(studies.plot(name)), "run python -m reproduction"


def test_the_index_is_that_of_the_results():
    assert parts_of(studies.PAGES / "README.md")[1] == studies.index(), "run python -m reproduction"


def test_every_page_and_every_result_is_of_a_study():
    own = {page.PAGE.stem for page in (unrolling, middle_layer, refinements)}
    pages = {path.stem for path in studies.PAGES.glob("*.md")} - {"README"} - own
    results = {path.stem for path in studies.RESULTS.iterdir()}
    assert pages == set(studies.finished())
    assert results <= set(studies.STUDIES)


def test_every_config_is_run_and_says_what_it_costs():
    configs = {path.stem: path.read_text(encoding="utf-8") for path in studies.CONFIGS.glob("*.toml")}
    assert set(configs) == set(studies.STUDIES)
    for name, text in configs.items():
        assert re.search(r"^# .*minutes on one core", text), name
        assert tomllib.loads(text)["seeds"] == [0, 1, 2], name


def test_the_table_holds_means_and_spreads(house):
    made(studies.results_of("rank"), RANKS, axes={"rank": [8, 80]})
    block = studies.block("rank")
    table = cells(block)
    assert table["PLM alone"] == ["30.00", "25.00", "2.00 k"]
    assert table["paper, rank=8"] == ["32.00 ± 1.41", "21.00 ± 1.41", "2.00 k"]
    assert table["paper, rank=80"] == ["37.00 ± 1.41 +", "**13.00 ± 1.41**", "2.00 k"]
    assert table["best, rank=80"] == ["20.00 ± 0.00 -", "–", "2.00 k"]
    assert "made (9.0 M parameters), made: 1,500 training examples, 3 dev, 4 test." in block
    assert "over seeds 0, 1; + better, - worse than PLM alone" in block
    assert "one run" not in block
    assert "`pema sweep reproduction/configs/studies/rank.toml` on made" in block


def test_runs_of_fewer_seeds_are_told_apart(house):
    made(studies.results_of("rank"), RANKS | {"once": ("pema", {"rank": 4}, [31.0], [20.0])})
    block = studies.block("rank")
    assert cells(block)["once"][:2] == ["31.00", "20.00"]
    assert "over seeds 0, 1; without ± one run; + better" in block


def test_what_dev_data_chose_of_a_grid_is_named(house):
    lines = {"LoRA": ("lora", {"learning_rate": 0.003, "seconds": 20.0}, [31.0, 33.0], [20.0, 22.0])}
    made(studies.results_of("rank"), lines, grid={"learning_rate": [0.001, 0.003]}, reference=None)
    assert "LoRA, learning_rate=0.003" in cells(studies.block("rank"))


def test_methods_without_the_axis_are_levels(house):
    made(studies.results_of("rank"), RANKS | {"LoRA": ("lora", {}, [33.0, 34.0], [9.0, 9.5])}, axes={"rank": [8, 80]})
    svg = ElementTree.fromstring(studies.plot("rank"))
    dashed = [line for line in svg.iter("{http://www.w3.org/2000/svg}path") if "dasharray" in line.get("style", "")]
    # Two panels and the legend, for the PLM alone and for LoRA.
    assert len(dashed) == 6
    assert "LoRA" in texts(studies.plot("rank"))


def test_lines_are_named_by_what_is_not_swept(house):
    made(studies.results_of("rank"), RANKS, axes={"rank": [8, 80]})
    shown = texts(studies.plot("rank"))
    assert {"paper", "best", "PLM alone", "chrF", "dev perplexity", "rank r", "8", "80"} <= set(shown)
    assert not [text for text in shown if "rank=" in text]


def test_a_study_without_an_axis_has_a_row_a_method(house):
    made(studies.results_of("ablations"), RANKS)
    shown = texts(studies.plot("ablations"))
    assert {"paper, rank=8", "paper, rank=80", "best, rank=80", "PLM alone"} <= set(shown)


@pytest.mark.parametrize("name", ["rank", "ablations"])
def test_a_plot_is_the_same_to_the_byte_and_changes_with_the_results(house, name):
    made(studies.results_of(name), RANKS)
    before = studies.plot(name)
    assert studies.plot(name) == before
    assert b"Made &amp; drawn" in before
    assert b"dc:date" not in before
    file = studies.results_of(name)
    file.write_text(file.read_text(encoding="utf-8").replace("38.0", "38.5"), encoding="utf-8")
    assert studies.plot(name) != before


def test_error_bars_are_standard_deviations_over_seeds(house):
    made(studies.results_of("rank"), RANKS)
    alone, low, *_ = lines_of(read_results(studies.results_of("rank")))
    assert alone.spread("chrf") is None
    assert low.spread("chrf") == pytest.approx(2**0.5)
    assert low.mean(DEV) == pytest.approx(21)


def test_pages_are_begun_and_what_is_written_by_hand_stays(house):
    made(studies.results_of("rank"), RANKS)
    studies.write_pages()
    page = house / "pages" / "rank.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Made & drawn\n\n{studies.STUDIES['rank'].question}\n\n{BEGIN}![Made & drawn](rank.svg)")
    page.write_text(text.replace(BEGIN, f"An answer.\n\n{BEGIN}").replace("32.00", "99.90"), encoding="utf-8")
    studies.write_pages()
    assert page.read_text(encoding="utf-8") == text.replace(BEGIN, f"An answer.\n\n{BEGIN}")
    index = (house / "pages" / "README.md").read_text(encoding="utf-8")
    assert f"- [Made & drawn](rank.md): {studies.STUDIES['rank'].question}\n{END}behind\n" in index
    assert {path.name for path in (house / "pages").iterdir()} == {"README.md", "rank.md", "rank.svg"}


def test_a_study_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    ran = []

    def run_into(file, experiment, work):
        assert isinstance(experiment, Experiment)
        ran.append((experiment.name, experiment.kind, file, work))
        if experiment.name == "rank":
            raise AdapterError("it diverged")

    monkeypatch.setattr(studies, "run_into", run_into)
    assert studies.run(tmp_path, ["rank", "kappa"]) == ["rank: it diverged"]
    assert ran == [(name, "sweep", studies.results_of(name), tmp_path) for name in ("rank", "kappa")]
