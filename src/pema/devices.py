"""What the devices here are: the one that a user names, and whether it multiplies bfloat16 matrices itself."""

from __future__ import annotations

import torch

from pema.errors import AdapterError

CPU_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""Functions of `torch.cpu` that say whether an x86 processor does: torch has no public one, and may lack these."""


def device_named(name: str) -> torch.device:
    """The device that a user names.

    Raises:
        AdapterError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(f"device={name!r} cannot be used here: {error}. Use device='auto'.") from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; without that they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = (getattr(torch.cpu, name, None) for name in CPU_CHECKS)
    return device.type == "cpu" and any(check() for check in checks if check is not None)
