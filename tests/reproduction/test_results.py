"""Committed results: every line is checked against its record, and errors are named."""

import json

import pytest

from pema.errors import DataError
from pema.experiments.layout import COMET
from reproduction.lines import RUN, SUFFIX, read_lines, write_lines
from reproduction.paths import RESULTS
from reproduction.tables.results import lines_of, read_results

COMPARED = [path for path in sorted(RESULTS.rglob(f"*{SUFFIX}")) if path.parent.name in ("compare", "studies")]


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_earlier_versions_wrote_is_read_and_would_be_written_again(file):
    results = read_results(file)
    lines = read_lines(file)
    runs = {run.run: run for line in lines_of(results) for run in line.runs}
    for line in lines:
        if RUN in line:
            stored = {name: value for name, value in line.items() if name not in ("texts", "labels", COMET)}
            assert runs[line[RUN]].to_dict() == stored
        elif "experiment" in line:
            # Of an unfinished experiment only the methods that were run are read.
            methods = {"methods": line["experiment"]["methods"]} if results.missing else {}
            assert results.about.to_dict() | methods == line["experiment"]
        elif "comparison" in line:
            assert results.comparison.to_dict() == line["comparison"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({COMET: 3}, r"run .*: it is not an object\. Score the outputs again"),
        ({COMET: {"metric": "comet", "signature": "s"}}, "'segments' is missing"),
        ({COMET: {"metric": "comet", "signature": "s", "segments": []}}, "segments is empty"),
        ({"label": "somebody"}, "is a run of 'somebody', which is not in the experiment"),
        ({"speed": 1}, "unknown setting 'speed' of Run"),
        ({"seed": -1}, "seed=-1 is too small"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, change, message):
    lines = read_lines(RESULTS / "studies" / f"kappa{SUFFIX}")
    place = next(k for k, line in enumerate(lines) if RUN in line)
    lines[place] |= change
    write_lines(tmp_path / "kappa.jsonl", lines)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "kappa.jsonl")


def test_a_file_without_a_comparison_is_refused(tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps({"experiment": {}}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="lacks the line `experiment` or `comparison`"):
        read_results(tmp_path / "runs.jsonl")
