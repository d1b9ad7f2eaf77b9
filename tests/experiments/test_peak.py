"""The memory of a process, as counted by the kernel."""

import pytest

from pema.experiments.peak import STATUS, peak_above, reset_peak, resident

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of a process")


def test_a_peak_is_what_was_touched_after_the_last_reset():
    reset_peak()
    before, _ = resident()
    taken = bytearray(b"\1" * (64 << 20))
    del taken
    assert 60 << 20 < peak_above(before) < 160 << 20
    reset_peak()
    assert peak_above(resident()[0]) < 20 << 20
    assert peak_above(1 << 50) == 0
