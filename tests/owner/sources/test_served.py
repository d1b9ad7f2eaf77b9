"""Names of PLMs that llama.cpp, vLLM or SGLang runs."""

import hashlib

import pytest

from pema.cli.options import require_plm
from pema.errors import ConfigError, OwnerError
from pema.owner.sources import names, packaged
from pema.owner.sources.packaged import PACKAGED, PackagedPLM
from pema.owner.sources.served import Served, is_served, served


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_a_file_a_server_and_a_head(file, tmp_path):
    assert served(f"llamacpp:{file}") == Served("tiny", file, None)
    assert served(f"llamacpp+http://host:8080#{file}") == Served("tiny", file, "http://host:8080")
    assert served(f"llamacpp+https://host/v#{tmp_path}") == Served(tmp_path.name, tmp_path, "https://host/v")
    for begin in ("llamacpp:", "llamacpp+", "vllm+", "sglang+", "logprobs+"):
        assert is_served(f"{begin}x")
    assert not is_served("https://x")


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("llamacpp:", OwnerError, r"llamacpp: names no GGUF file: llama\.cpp runs files that end in \.gguf"),
        ("llamacpp:gpt2", OwnerError, "llamacpp:gpt2 names no GGUF file"),
        ("llamacpp:no.gguf", OwnerError, r"the GGUF file no\.gguf does not exist: check the path"),
        ("llamacpp:http://h:1", ConfigError, r"for one that runs, give llamacpp\+http://h:1#FILE"),
        (
            "llamacpp+host:1#x.gguf",
            ConfigError,
            r"is not the address of a server: give llamacpp\+http://host:port#HEAD",
        ),
        ("llamacpp+http://h:1", ConfigError, "does not say where the LM head is: append # and the server's GGUF file"),
        ("llamacpp+http://h:1#no.gguf", OwnerError, r"the GGUF file no\.gguf does not exist"),
        (
            "llamacpp+http://h:1#nowhere",
            OwnerError,
            "the folder nowhere does not exist: give the server's GGUF file, or",
        ),
    ],
)
def test_names_that_cannot_be(name, error, match):
    for read in (served, require_plm):
        with pytest.raises(error, match=match):
            read(name)


def test_servers_that_give_vectors(file, tmp_path):
    url = "http://host:8001?completions=http://host:8000&model=tiny"
    assert served(f"vllm+{url}#{tmp_path}") == Served(tmp_path.name, tmp_path, url)
    assert served(f"sglang+https://host#{file}") == Served("tiny", file, "https://host")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("host:1#x", ConfigError, r"is not the address of a server: give {}\+http://host:port#HEAD"),
        ("http://h:1", ConfigError, "does not say where the LM head is: append # and a folder with the released head"),
        ("http://h:1#no.gguf", OwnerError, r"the GGUF file no\.gguf does not exist"),
        ("http://h:1#nowhere", OwnerError, "the folder nowhere does not exist: give a folder with the released head"),
    ],
)
def test_addresses_that_cannot_be(engine, name, error, match):
    for read in (served, require_plm):
        with pytest.raises(error, match=match.format(engine)):
            read(f"{engine}+{name}")


def test_a_packaged_plm_in_parts_is_joined_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    parts = [tmp_path / f"part{n}" for n in range(3)]
    for n, part in enumerate(parts):
        part.write_bytes(b"GGUF" if n == 0 else bytes([n]) * 5)
    content = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    monkeypatch.setitem(PACKAGED, "parts", PackagedPLM("x", "x", "1", (("a", "b"),), content))
    monkeypatch.setattr(names, "packaged_files", lambda name: parts)
    found = served("llamacpp:parts")
    assert found.model.read_bytes() == b"".join(part.read_bytes() for part in parts)
    assert (found.name, found.content) == ("parts", content)
    found.model.write_bytes(b"damaged")
    assert served("llamacpp:parts").model.read_bytes() != b"damaged"
    parts[1].write_bytes(b"other")
    assert served("llamacpp:parts") == found
    found.model.unlink()
    with pytest.raises(OwnerError, match="parts differs from the tested file: SHA-256"):
        served("llamacpp:parts")
    assert not list((tmp_path / "cache" / "gguf").glob("*.gguf"))


def test_a_packaged_plm_that_is_not_installed(monkeypatch):
    plm = PackagedPLM("x", "x", "1", (("pema-no-such-package", "b"),), "0" * 64)
    monkeypatch.setitem(packaged.PACKAGED, "missing", plm)
    with pytest.raises(OwnerError, match=r"the PLM missing .* is not installed: pip install"):
        served("llamacpp:missing")
