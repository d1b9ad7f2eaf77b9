import pytest

from gguf_files import TEMPLATE, build_llama, write_gguf
from pema.owner.local import LocalPLM
from tiny import build_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PEMA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The same model in several types, with the pre-tokeniser that its tokenizer has in llama.cpp."""
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(folder / f"tiny.{kind}.gguf", kind, tokenizer_pre="gpt-2") for kind in ("F32", "Q8_0")}


@pytest.fixture(scope="session")
def local():
    """The model of the files as transformers runs it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LocalPLM(build_llama(), tokenizer)


@pytest.fixture
def texts(local):
    return [local.tokenizer(text).input_ids for text in ("the house and the dog", "one two three", "a cat")]
