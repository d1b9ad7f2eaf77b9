import subprocess

import pytest
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
    """A self-signed certificate for the loopback, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, private = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*made, *names, "-keyout", private, "-out", cert], check=True, capture_output=True)
    return cert, private
