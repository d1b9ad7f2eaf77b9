import pytest
from apis import FakeAPI, recover

from gguf_files import TEMPLATE, build_llama
from pema.owner.local import LocalPLM
from tiny import build_tokenizer


@pytest.fixture(scope="session")
def local():
    """The model behind the API, as transformers runs it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LocalPLM(build_llama(), tokenizer)


@pytest.fixture(scope="session")
def recovered(local, tmp_path_factory):
    """Its recovered head."""
    folder = tmp_path_factory.mktemp("recovered") / "head"
    recover(FakeAPI(local), folder)
    return folder


@pytest.fixture
def texts(local):
    return [local.tokenizer(text).input_ids for text in ("the house and the dog", "one two three", "a cat")]
