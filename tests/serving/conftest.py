import pytest
import trustme
from served import served


@pytest.fixture(scope="session")
def plm(tiny_plm):
    plm = tiny_plm()
    # The first use tries short cuts; every test then finds them tried.
    list(plm.represent([[1, 5, 6], [1, 5, 7, 8]], [1, 1]))
    list(plm.predict([[1, 5, 6], [1, 5, 7, 8]], [2, 2]))
    return plm


@pytest.fixture
def client(plm):
    with served(plm) as client:
        yield client


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for the loopback with the authority that signed it, in one file, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    cert, private = folder / "cert.pem", folder / "key.pem"
    chain = [blob.bytes() for blob in issued.cert_chain_pems]
    cert.write_bytes(b"".join([*chain, authority.cert_pem.bytes()]))
    private.write_bytes(issued.private_key_pem.bytes())
    return cert, private


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A PLM on disk."""
    folder = tmp_path_factory.mktemp("served")
    tiny_model().save_pretrained(folder / "plm")
    tiny_tokenizer().save_pretrained(folder / "plm")
    return folder
