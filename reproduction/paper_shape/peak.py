"""Peak memory of a block of code, as counted by Linux for the process, and memory limits of a process."""

from __future__ import annotations

import gc
import re
import resource
import threading
from pathlib import Path
from types import TracebackType

import torch

from pema.experiments.peak import peak_above, reset_peak, status

MEMINFO = Path("/proc/meminfo")
EVERY_SECONDS = 0.01
RESERVE = 1 << 30
"""Bytes left to other processes of the machine."""


def available_bytes(device: torch.device) -> int:
    """Return the bytes of the machine's or the accelerator's memory that a new process may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    figure = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    assert figure is not None
    return max(int(figure[1]) * 1024 - RESERVE, 0)


def limit(more_bytes: int) -> None:
    """Limit the further bytes that this process may allocate, so that it fails before the machine's memory is full."""
    now = status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, resource.RLIM_INFINITY))


class Peak:
    """Peak memory of a `with` block, above what was resident before it.

    Attributes:
        resident: of the process: pages of files that are mapped among them, such as a stored W_hd.
        anonymous: the same without files' pages, sampled every 10 ms; the kernel can drop a file's pages, not these.
        allocated: on the accelerator, by torch's allocator; None without one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resident = self.anonymous = 0
        self.allocated: int | None = None
        self._stop = threading.Event()
        self._highest = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        reset_peak()
        self._before = {name: status(name) for name in ("VmRSS", "RssAnon")}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._highest = max(self._highest, status("RssAnon"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._highest = max(self._highest, status("RssAnon"))
        self._stop.set()
        self._thread.join()
        self.resident = peak_above(self._before["VmRSS"])
        self.anonymous = max(0, self._highest - self._before["RssAnon"])
        if self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)

    def to_dict(self) -> dict[str, int | None]:
        """Return JSON-ready bytes."""
        return {"resident": self.resident, "anonymous": self.anonymous, "allocated": self.allocated}
