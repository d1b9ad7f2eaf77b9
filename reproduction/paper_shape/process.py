"""One method of `paper_shape` at one shape, in a separate process: `python -m reproduction.paper_shape.process`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pema.devices import device_named
from pema.signature import signature
from reproduction.paper_shape.methods import RUN, finish, memory_path
from reproduction.paper_shape.options import METHODS, Setting, Shape, least_bytes, memory_pairs
from reproduction.paper_shape.peak import Peak, available_bytes, limit

OUT = "out.json"

ON_CPU = ("knn",)
"""Methods that run on the CPU: FAISS is installed for the CPU."""


def measure(shape: Shape, method: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """Return the result of one method with its signature; if it does not fit, its needs and the available memory."""
    torch.set_num_threads(setting.threads)
    device = torch.device("cpu") if method in ON_CPU else device_named(setting.device)
    warm_up(device)
    least, available = least_bytes(shape, method, setting), available_bytes(device)
    config = {"benchmark": "paper_shape", "shape": asdict(shape), "method": method} | setting.to_dict()
    result: dict[str, Any] = {"shape": shape.name, "method": method, "device": device.type}
    result |= {"least_bytes": least, "available_bytes": available, "signature": signature(config, 0)}
    if available < least:
        why = f"needs at least {least / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        return result | {"fits": False, "why": why}
    if device.type == "cpu":
        limit(available)
    pairs = memory_pairs(method, setting)
    memory = memory_path(shape, pairs, folder) if pairs else None
    out, started = folder / "out", time.perf_counter()
    try:
        with Peak(device) as peak:
            figures = RUN[method](shape, setting, device, memory, out)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        why = f"ran out of {available / 1e9:.1f} GB: {str(error).splitlines()[0][:200]}"
        return result | {"fits": False, "why": why}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    result |= {"fits": True, "peak_bytes": peak.to_dict(), **figures}
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result | {"load_average": [round(load, 2) for load in os.getloadavg()]}


def ran_out(error: Exception) -> bool:
    """Return whether an allocation failed; torch's allocator on the CPU raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def warm_up(device: torch.device) -> None:
    """Trigger what libraries load on first use, so that it is not counted for a method."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(64, 64, dtype=dtype, device=device, requires_grad=True)
        (a @ a).sum().backward()  # type: ignore[no-untyped-call]
        torch.optim.Adam([a], fused=True).step()
    finish(device)


def main() -> None:
    """Write a memory, or measure a method and write the result to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("memory", "measure"))
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    shape, setting = Shape(**given.shape), Setting(**given.setting)
    if given.what == "memory":
        memory_path(shape, memory_pairs(given.method, setting), given.folder)
    else:
        result = measure(shape, given.method, setting, given.folder)
        (given.folder / OUT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
