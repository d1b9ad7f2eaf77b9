import pytest
from engine_plm import build_plm, write_model


@pytest.fixture(scope="session")
def local():
    """The model that the servers run, as transformers runs it."""
    return build_plm()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model's folder."""
    return write_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def bundle(local, tmp_path_factory):
    """A released head bundle, with the tokenizer's files."""
    folder = tmp_path_factory.mktemp("released") / "head"
    local.head().save(folder)
    local.tokenizer.save_pretrained(folder)
    return folder
