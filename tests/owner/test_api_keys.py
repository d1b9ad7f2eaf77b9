import pytest

from pema.errors import ConfigError
from pema.owner.api_keys import api_key
from pema.owner.client.connection import Connection


@pytest.mark.parametrize("around", [" {}", "{} ", "{}\n", "{}\r\n", "\t{}"])
def test_white_space_around_a_key_is_no_part_of_it(monkeypatch, around):
    monkeypatch.setenv("A_KEY", around.format("pema_x"))
    assert api_key("A_KEY") == "pema_x"
    assert api_key("A_KEY", around.format("pema_y")) == "pema_y"


def test_a_key_with_white_space_never_reaches_a_message(monkeypatch):
    """The HTTP library refuses such a header, and its message contains the key."""
    monkeypatch.setenv("PEMA_API_KEY", "pema_x ")
    connection = Connection("http://127.0.0.1:1", patience=0.0)
    with pytest.raises(Exception, match="cannot be reached") as caught:
        connection.get("/v1/plm")
    assert "pema_x" not in str(caught.value)


@pytest.mark.parametrize("key", ["pema_é", "\x7f", "a b", "a\r\nHost: b"])
def test_a_key_that_no_header_can_hold_is_refused_without_repeating_it(monkeypatch, key):
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(ConfigError, match="the API key contains invalid characters: check A_KEY") as caught:
        api_key("A_KEY")
    assert key not in str(caught.value)


def test_no_key_is_an_empty_text(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    assert api_key("A_KEY") == ""
