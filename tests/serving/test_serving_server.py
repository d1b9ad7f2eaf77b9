"""Addresses on which a server may listen, and their requirements."""

import socket

import pytest
from served import key

from pema.errors import ConfigError
from pema.serving.policy import Policy
from pema.serving.server import Address

KEYED = Policy(keys=(key(),))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_nothing(host):
    Address(host).check(Policy(), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_network_needs_keys_and_tls(host, certificate):
    for policy, files, missing in (
        (Policy(), (None, None), r"a policy with keys \(--policy\) and TLS"),
        (Policy(), certificate, "a policy with keys"),
        (KEYED, (None, None), "TLS"),
    ):
        with pytest.raises(ConfigError, match=f"{host} can be reached from other machines and lacks {missing}"):
            Address(host, 1, *files).check(policy, insecure=False)
        Address(host, 1, *files).check(policy, insecure=True)
    Address(host, 1, *certificate).check(KEYED, insecure=False)


def test_certificates_that_cannot_be_used(certificate, tmp_path):
    cert, private = certificate
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key go together"):
        Address(certificate=cert).check(KEYED, insecure=False)
    (tmp_path / "empty").touch()
    for files in ((tmp_path / "nowhere", private), (cert, tmp_path / "empty"), (private, cert)):
        with pytest.raises(ConfigError, match=r"the certificate .* cannot be used"):
            Address("127.0.0.1", 1, *files).check(KEYED, insecure=False)


def test_listening(certificate):
    with Address(port=0).listen() as listener:
        port = listener.getsockname()[1]
        assert listener.proto == socket.IPPROTO_TCP  # or asyncio leaves Nagle's algorithm on
        assert Address(port=0).url(listener) == f"http://127.0.0.1:{port}"
        assert Address("127.0.0.1", 0, *certificate).url(listener) == f"https://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
            Address(port=port).listen()
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        Address("203.0.113.1", 0).listen()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_addresses_of_ipv6():
    try:
        listener = Address("::1", 0).listen()
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert Address("::1").url(listener).startswith("http://[::1]:")
