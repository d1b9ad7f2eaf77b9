"""The pages match the committed results, and the command behind every number exists and accepts its options."""

import importlib
import re
import shlex
import sys
import tomllib

import pytest

from pema.cli import main as pema
from reproduction import pages
from reproduction.lines import RUN, SUFFIX, read_lines
from reproduction.paths import CONFIGS, DOCS, RESULTS, ROOT
from reproduction.tables.markdown import BEGIN, END, parts_of

ORIGINS = pages.origins()
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FILES = sorted(RESULTS.rglob(f"*{SUFFIX}"))


def expanded(name: str) -> list[str]:
    """The names that braces stand for."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [name]


@pytest.mark.parametrize("page", pages.BLOCKS, ids=lambda page: page.name)
def test_the_numbers_are_those_of_the_results(page):
    assert parts_of(page)[1] == pages.BLOCKS[page](), "run python -m reproduction"


def test_the_part_between_the_markers_is_written_and_the_rest_stays(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}behind\n", encoding="utf-8")
    monkeypatch.setattr(pages, "BLOCKS", {page: lambda: "new\n"})
    pages.write_pages()
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}new\n{END}behind\n"


def test_every_file_of_results_makes_a_number():
    assert {file for origin in ORIGINS for file in origin.results} == set(FILES)
    assert {path for path in RESULTS.rglob("*") if path.is_file()} == set(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(RESULTS).as_posix())
def test_every_run_has_its_signature(file):
    runs = [line for line in read_lines(file) if RUN in line]
    assert runs
    for run in runs:
        assert {"config", "seed", "versions", "machine"} <= set(run["signature"])


@pytest.mark.parametrize("origin", ORIGINS, ids=lambda origin: f"{origin.page.name}: {origin.numbers}")
def test_the_page_names_the_command(origin):
    text = origin.page.read_text(encoding="utf-8")
    if origin.results:
        assert f"Made by `{origin.command}` on " in text


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_made_numbers_is_told(page):
    named = set(re.findall(r"Made by `([^`]*)` on ", page.read_text(encoding="utf-8")))
    assert named == {origin.command for origin in ORIGINS if origin.page == page and origin.results}


@pytest.mark.parametrize("command", sorted({origin.command for origin in ORIGINS}))
def test_the_command_exists_and_takes_its_options(command, monkeypatch, capsys):
    program, *arguments = shlex.split(command)
    if program == "python":
        _, module, *arguments = arguments
        # A package is run by its `__main__`.
        spec = importlib.util.find_spec(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
        run = importlib.import_module(spec.name).main
        words = ["--help"]
    else:
        assert program == "pema"
        run, words = pema, [arguments[0], "--help"]
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run()
    assert not stop.value.code
    text = capsys.readouterr().out
    for option in (word for word in arguments if word.startswith("--")):
        assert option in text, option


@pytest.mark.parametrize(
    "origin",
    [origin for origin in ORIGINS if re.match("pema (compare|sweep)", origin.command)],
    ids=lambda origin: origin.command,
)
def test_the_config_is_the_one_of_the_results(origin):
    _, kind, name = origin.command.split()
    configs = [ROOT / each for each in expanded(name)]
    assert [config.stem for config in configs] == [file.stem for file in origin.results]
    for config, file in zip(configs, origin.results, strict=True):
        assert config.is_relative_to(CONFIGS)
        given = tomllib.loads(config.read_text(encoding="utf-8"))
        (experiment,) = [line["experiment"] for line in read_lines(file) if "experiment" in line]
        assert (experiment["kind"], experiment["name"]) == (kind, config.stem)
        for field in ("title", "seeds"):
            assert experiment[field] == given[field]


@pytest.mark.parametrize("page", [*TEXTS, ROOT / "Makefile"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_and_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"-m (reproduction[\w.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")), module
    for path in re.findall(r"\breproduction/[\w./-]+", text):
        path = path.rstrip(".")
        if not re.search("[A-Z]{2}", path):
            assert (ROOT / path).exists(), path


def test_the_package_imports_nothing_of_it():
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) reproduction\b", path.read_text(encoding="utf-8"), re.MULTILINE), path
