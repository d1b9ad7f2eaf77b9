"""Every block of code in README and docs runs, and every link leads somewhere."""

import json
import re

import pytest

import pema
from documented import EXTRAS, KEY, ROOT, Reader, blocks, pages
from pema.experiments.data import support_data
from pema.serving.keys import digest

CODE = [page for page in pages() if blocks(page)]
MANY = {"private-training.md": 230}
"""Pages whose commands need more than 24 examples: private training takes 128 in a step."""

STRANGER = re.compile(r"(?:pip|uv) (?:install|add)[^`\n]*?[ '\"]pema(?![\w-])")
"""A command that takes the project `pema` from a package index."""


@pytest.fixture
def files(tmp_path, monkeypatch, request):
    """A folder with the files that the pages name, of a few sentences each."""
    data = support_data()
    count = MANY.get(request.getfixturevalue("page").name, 24)
    parts = {"train": data.train[:count], "dev": data.dev[:4], "test": data.test[:3], "others": data.train[-40:]}
    for name, examples in parts.items():
        lines = [json.dumps({"source": e.source, "target": e.target}, ensure_ascii=False) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (tmp_path / f"{name}.en").write_text("".join(f"{e.source}\n" for e in examples), encoding="utf-8")
        (tmp_path / f"{name}.de").write_text("".join(f"{e.target}\n" for e in examples), encoding="utf-8")
    (tmp_path / "policy.toml").write_text(f'[[keys]]\nname = "acme"\nsha256 = "{digest(KEY)}"\n', encoding="utf-8")
    (tmp_path / "reproduction").symlink_to(ROOT / "reproduction")
    if request.getfixturevalue("page").name == "storage.md":  # elsewhere the cache has converted PLMs
        monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, files, monkeypatch, capsys):
    reader = Reader(monkeypatch, capsys)
    try:
        reader.follow(page)
    finally:
        reader.close()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_starts_with_two_lines_of_installation_and_ten_of_python():
    install, python = (
        next(b.text for b in blocks(ROOT / "README.md") if b.language == name) for name in ("sh", "python")
    )
    assert len(install.splitlines()) == 2
    assert len(python.splitlines()) <= 10


def test_only_warnings_name_the_stranger_of_this_name_on_the_package_index():
    texts = {path: path.read_text(encoding="utf-8") for path in [*pages(), ROOT / "CHANGELOG.md", ROOT / "Dockerfile"]}
    texts |= {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    counts = {path: len(STRANGER.findall(text)) for path, text in texts.items()}
    assert {path.relative_to(ROOT).as_posix(): count for path, count in counts.items() if count} == {
        "README.md": 1,
        "docs/install.md": 2,
        "src/pema/extras.py": 1,
    }
    assert "**Do not `pip install pema`" in texts[ROOT / "README.md"]


def test_the_page_on_installation_lists_every_extra():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == sorted(EXTRAS)


def test_the_changelog_begins_with_the_version_of_the_package():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == pema.__version__
    assert f"version: {pema.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
