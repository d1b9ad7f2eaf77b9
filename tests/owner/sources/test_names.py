"""Names of PLMs: what they resolve to, and the errors for unknown ones."""

import shutil

import pytest

from pema.cache import cache_folder
from pema.errors import OwnerError
from pema.owner.local import LocalPLM
from pema.owner.sources import names
from pema.owner.sources.names import Source, known_names, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_folders_and_hub_names(folder):
    assert resolve(folder) == resolve(f"{folder}/") == Source(str(folder), "tiny-llama", "")
    assert resolve("facebook/opt-125m") == Source("facebook/opt-125m", "facebook/opt-125m", "")
    assert resolve("gpt2") == Source("gpt2", "gpt2", "")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/no/such/folder", "the folder /no/such/folder does not exist: check the path"),
        ("./nowhere", r"the folder \./nowhere does not exist"),
        ("some/deep/folder", "the folder some/deep/folder does not exist"),
        ("./nowhere.gguf", r"the GGUF file \./nowhere\.gguf does not exist: check the path\.$"),
        (
            "https://plm.example:8000",
            r"https://plm.example:8000 is the address of a server, and this needs the PLM itself",
        ),
        (
            "llamacpp:plm.gguf",
            r"llamacpp:plm\.gguf is run by llama\.cpp, and this needs the PLM itself: give plm\.gguf",
        ),
        ("llamacpp+http://host:8080#plm.gguf", "is the address of a server, and this needs the PLM itself"),
        ("vllm+http://host:8001#head", "is the address of a server, and this needs the PLM itself"),
        ("sglang+http://host:30000#head", "is the address of a server, and this needs the PLM itself"),
        ("pema-tests/no-such-model", r"pema-tests/no-such-model cannot be loaded as a causal language model: .+"),
        (
            "smolm2-135m",
            r"smolm2-135m cannot be loaded as a causal language model: .* pema itself knows smollm2-135m, "
            r"gemma3-270m, embedded \(did you mean smollm2-135m\?\)\.",
        ),
    ],
)
def test_names_that_cannot_be_loaded(name, match):
    with pytest.raises(OwnerError, match=match) as caught:
        LocalPLM.load(name)
    assert "\n" not in str(caught.value)


def test_advice_is_for_names_without_an_owner():
    assert known_names("HuggingFaceTB/SmolLM2-135M") == ""
    assert known_names("something-else") == " pema itself knows smollm2-135m, gemma3-270m, embedded."


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        OwnerError, match=r"contains no config\.json of a transformers model\. Give the folder that has"
    ):
        resolve(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OwnerError, match=r"file is not a PLM: give the folder of a transformers model, a GGUF file"):
        resolve(tmp_path / "file")


def test_the_embedded_plm_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setattr(names, "EMBEDDED_FOLDER", "no-such-plm")
    with pytest.raises(OwnerError, match="the embedded PLM is not part of this installation"):
        LocalPLM.load("embedded")


def test_the_embedded_plm_is_found_in_the_package(monkeypatch, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "plm" / names.EMBEDDED_FOLDER)
    monkeypatch.setattr(names.resources, "files", lambda package: tmp_path)
    assert LocalPLM.load("embedded").description.name == names.EMBEDDED_FOLDER


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PEMA_CACHE", raising=False)
    for value in (None, "", "relative"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "home" / ".cache" / "pema"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pema"
    monkeypatch.setenv("PEMA_CACHE", "~/own")
    assert cache_folder() == tmp_path / "home" / "own"
