"""Memory that a process has, and its peak, as Linux counts them."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS resident, VmHWM its peak, RssAnon resident without files."""
    figure = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert figure is not None, name
    return int(figure[1]) * 1024


def resident() -> tuple[int, int]:
    """Bytes of this process that are in memory now, and the most that were since the peak was last reset."""
    if STATUS.exists():
        return status("VmRSS"), status("VmHWM")
    # Where the system keeps no status file, the peak of the whole process is all that is known.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def peak_above(before: int) -> int:
    """Bytes of the peak since it was last reset above what was resident `before`."""
    # The kernel counts by batches of pages, so a peak of next to nothing may come out below what was there.
    return max(0, resident()[1] - before)


def reset_peak() -> None:
    """Count the peak anew from now on, where the system can."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
