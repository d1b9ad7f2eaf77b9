"""The address in the log of a started server."""

from collections import deque

import pytest

from pema.owner.llamacpp.child import READY
from pema.owner.llamacpp.process import _address


@pytest.mark.parametrize("begun", ["", "srv  load: ", "\n"])
def test_the_address_is_found_where_the_log_has_begun_the_line(begun):
    last = deque(maxlen=5)
    log = iter(f"first\n{begun}{READY}http://127.0.0.1:4\nlater\n".splitlines(keepends=True))
    assert _address(log, last) == "http://127.0.0.1:4"
    assert last[0] == "first\n"


def test_a_log_that_ends_has_no_address():
    last = deque(maxlen=5)
    assert _address(iter(["an error\n"]), last) is None
    assert list(last) == ["an error\n"]
