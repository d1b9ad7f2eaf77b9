"""Resident memory of a process and its peak, as counted by Linux."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def status(name: str) -> int:
    """Read a value of /proc/self/status in bytes: VmRSS resident, VmHWM its peak, RssAnon resident without files."""
    figure = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert figure is not None, name
    return int(figure[1]) * 1024


def resident() -> tuple[int, int]:
    """Return the resident bytes of this process now, and their peak since the last reset."""
    if STATUS.exists():
        return status("VmRSS"), status("VmHWM")
    # Without a status file of the system only the peak of the whole process is known.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def peak_above(before: int) -> int:
    """Return the bytes by which the peak since the last reset exceeds the resident bytes `before`."""
    # The kernel counts in batches of pages, so a very small peak may appear below the resident bytes before.
    return max(0, resident()[1] - before)


def reset_peak() -> None:
    """Reset the peak, if the system supports it."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
