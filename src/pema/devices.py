"""Devices by name, and whether they multiply bfloat16 matrices natively."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path

import torch

from pema.errors import AdapterError

CPU_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""Functions of `torch.cpu` that detect it on x86 processors; torch has no public one, and may lack these."""

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""Words of errors that torch and the libraries of accelerators raise as a plain RuntimeError."""

CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of processors that do, as named by Linux, on x86 and (the last one) on ARM."""


def device_named(name: str, setting: str = "device") -> torch.device:
    """Return the device of this name; "auto" is a GPU if there is one.

    Args:
        name: the name.
        setting: name of the setting, for the message.

    Raises:
        AdapterError: it cannot be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(
            f"{setting}={name!r} cannot be used on this machine: {error}. Use {setting}='auto'."
        ) from error
    return device


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on a device, which copies it while the program goes on."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    with torch.cuda.device(device):  # pinned memory belongs to the current device of a thread
        return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a device on the CPU; from a GPU in pinned memory, which it writes several times as fast."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    with torch.cuda.device(tensor.device):
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    return there


def is_asynchronous(device: torch.device) -> bool:
    """Return whether the program goes on while the device computes: what it waits for then costs time."""
    return device.type != "cpu"


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices natively; if not, they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in CPU_CHECKS)
    if any(check() for check in checks if check is not None):
        return True
    flags = _cpu_flags()
    return bool(flags & CPU_FLAGS) if flags else _is_faster_in_bfloat16()


def _cpu_flags() -> frozenset[str]:
    """Return the processor's flags; empty if the system does not list them."""
    try:
        text = CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[2].split()) if line else frozenset()


@functools.cache
def _is_faster_in_bfloat16() -> bool:
    """Measure a matrix product of a few milliseconds in both types, in turns."""
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):  # the first one of each type includes preparations
        for dtype, seconds in times.items():
            x = torch.ones(256, 512, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(x, x)
            seconds.append(time.perf_counter() - start)
    return min(times[torch.bfloat16]) < min(times[torch.float32])
