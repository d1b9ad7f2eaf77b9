"""Names on the hub, checked by their `config.json`: each reason that a model cannot be used is named."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from pema.errors import OwnerError
from pema.owner.sources.names import require_model

WHAT = "a causal language model"


def refused(kind):
    """An error of the hub, as its library raises it after a response."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error\n\nmore")
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, r"its authors restrict access: ask for it .* log in with `hf auth login`\."),
        (errors.RepositoryNotFoundError, r"the hub has no such model, or it is private: .*"),
        (errors.RevisionNotFoundError, r"it has no revision 'v9' on the hub\."),
        (errors.LocalEntryNotFoundError, r"it is not in the cache, and the hub cannot be reached\."),
        (errors.RemoteEntryNotFoundError, r"it has no config\.json on the hub, so it is not a model of transformers\."),
        (errors.HfHubHTTPError, r"the hub does not give its config\.json: 404 Client Error more\."),
        (OSError, r"the hub does not give its config\.json: 404 Client Error more\."),
    ],
)
def test_each_reason_is_named(monkeypatch, kind, words):
    def fail(name, file, revision):
        assert (name, file, revision) == ("gpt3", "config.json", "v9")
        raise refused(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    advice = r" pema itself knows smollm2-135m, gemma3-270m, embedded\."
    with pytest.raises(OwnerError, match=f"^gpt3 cannot be loaded as {WHAT}: {words}{advice}$"):
        require_model("gpt3", WHAT, "v9")


def test_without_a_network_the_cache_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OwnerError, match=r"org/model .*: it is not in the cache, and HF_HUB_OFFLINE forbids"):
        require_model("org/model", WHAT)
    with pytest.raises(OwnerError, match=r"embeded .* \(did you mean embedded\?\)\.$"):
        require_model("embeded", WHAT)
    with pytest.raises(OwnerError, match=r"a b .*: it is neither a folder nor a name on the hub"):
        require_model("a b", WHAT)


def test_what_exists_is_accepted(monkeypatch, tmp_path):
    require_model("embedded", WHAT)
    (tmp_path / "config.json").touch()
    require_model(tmp_path, WHAT)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "config.json")
    require_model("org/model", WHAT)
