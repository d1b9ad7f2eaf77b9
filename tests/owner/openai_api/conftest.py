import pytest
from fake_api import KEY, FakeAPI, ModelAPI

from gguf_files import build_llama
from pema.owner.local import LocalPLM
from pema.owner.openai_api.config import APIConfig
from pema.owner.openai_api.plm import ProxyPLM
from pema.owner.openai_api.vocabulary import Vocabulary
from tiny import build_model, build_tokenizer

pytest.importorskip("openai")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01, raising=False)


@pytest.fixture
def api():
    fake = FakeAPI()
    with fake.running():
        yield fake


@pytest.fixture
def described(api, tmp_path):
    """The settings of the API, with a file of its own."""
    return {"base_url": api.url, "model": "m", "tokenizer": "t", "key": KEY, "cache": tmp_path / "answers.sqlite"}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """The folder of the API's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def closed():
    """The model behind the API."""
    return LocalPLM(build_llama(seed=3), build_tokenizer())


@pytest.fixture(scope="session")
def proxy():
    """The proxy, with another tokenizer than the API."""
    return LocalPLM(build_model("llama", seed=1, vocab_size=290), build_tokenizer(vocab_size=290))


@pytest.fixture
def sold(closed, tokens, proxy, tmp_path):
    """The API of `closed`, and a function that opens it beside `proxy`."""
    fake = ModelAPI(closed, Vocabulary.load(str(tokens), "completions"))

    def opened(**settings):
        given = {"tokenizer": str(tokens), "endpoint": "completions", "cache": tmp_path / "answers.sqlite"} | settings
        return ProxyPLM(APIConfig(base_url=fake.url, model="closed", key=KEY, **given), proxy)

    with fake.running():
        yield fake, opened
