"""Comparable timings: variants in alternation, with medians and extremes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], object]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Clocks: that of the wall; the processor's time of all threads of this process, without waiting."""


SHORTEST = "shortest times"
"""What the ratios of a benchmark are of, if not of medians."""


def seconds(run: Run, clock: str = "wall") -> float:
    """Return the seconds of one call, at the end of which an accelerator has finished."""
    finish()
    started = CLOCKS[clock]()
    run()
    finish()
    return CLOCKS[clock]() - started


def finish() -> None:
    """Wait for an accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    runs: Mapping[str, Run], repeats: int, *, warm_up: int = 1, clock: str = "wall"
) -> dict[str, list[float]]:
    """Time each of `runs` `repeats` times, A B C A B C ..., so that a slow phase of the machine affects all."""
    for _ in range(warm_up):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
    return times


def timing(times: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes and number of repeated timings, in seconds."""
    return {
        "median_seconds": significant(statistics.median(times)),
        "min_seconds": significant(min(times)),
        "max_seconds": significant(max(times)),
        "repeats": len(times),
    }


def rate(work: float, unit: str, times: Sequence[float]) -> dict[str, Any]:
    """Return `timing`, and units of `work` per second at the median time."""
    return timing(times) | {f"{unit}_per_second": significant(work / statistics.median(times))}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of `alternate` of one variant's time divided by another's in the same round."""
    return significant(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)))


def least_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return one variant's shortest time divided by another's: other programs can only lengthen a time."""
    return significant(min(numerator) / min(denominator))


def row(what: str, value: float, unit: str, against: str, ratio: float, aim: str) -> dict[str, Any]:
    """Return one line of a result's summary; `aim` compares the ratio with a number, such as `>= 0.85`, or is empty."""
    sign, _, number = aim.partition(" ")
    met = None if not aim else ratio >= float(number) if sign == ">=" else ratio <= float(number)
    return {
        "what": what,
        "value": significant(value),
        "unit": unit,
        "against": against,
        "ratio": significant(ratio),
        "aim": aim,
        "met": met,
    }


def significant(value: float, digits: int = 4) -> float:
    """Round `value` to a number of significant digits."""
    return float(f"{value:.{digits}g}")


KINDS = {
    "matrix products": r"mm|addmm|bmm|baddbmm|matmul|linear|mkldnn_\w+|_?scaled_dot_product\w*|_flash_attention\w*",
    "softmax and cross-entropy": r"_?(log_)?softmax\w*|logsumexp|amax|aminmax|gather|scatter\w*|log\w*|exp\w*|nll_\w+",
    "random numbers": r"random_|bernoulli_?|native_dropout\w*|uniform_|normal_",
    "optimiser": r"_fused_\w+|_foreach_\w+|lerp_?|addcdiv_?|addcmul_?|linalg_vector_norm|optimizer.*|Optimizer.*",
    "copying and reading": (
        r"copy_|index\w*|cat|_?to(_copy)?|clone|contiguous|take|stack|fill_|zero_|zeros\w*|ones\w*|empty\w*|resize_|slice"
        r"|select|as_strided|narrow|embedding|expand|view|reshape|transpose|t|flatten|split\w*"
    ),
}
"""Patterns of the names of operators in torch's profiler, by kind of work."""


def breakdown(run: Run) -> dict[str, Any]:
    """Return the shares of a call's time in torch's operators by kind, and the rest as `outside torch`.

    The profiler slows small operators down, so these are shares of its own run, not of the timings. With an accelerator
    they are its time, and `outside torch` is what it waits.
    """
    on_device = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        wall = seconds(run)
    spent = dict.fromkeys((*KINDS, "other operators"), 0.0)
    for event in profile.key_averages():
        is_kernel = event.device_type.name != "CPU"
        if is_kernel and on_device:  # of a CUDA graph there are only these
            spent[kind_of(event.key, KERNELS)] += event.self_device_time_total / 1e6
        elif not is_kernel and not on_device:
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    # Operators on other threads run beside the caller, so the sum may exceed the wall time.
    spent["outside torch"] = max(0.0, wall - sum(spent.values()))
    whole = sum(spent.values())
    return {"profiled_seconds": significant(wall), "shares": {kind: round(s / whole, 3) for kind, s in spent.items()}}


KERNELS = {
    "matrix products": r"(?i).*(gemm|gemv|nvjet|cutlass|xmma|splitk|attention|flash|fmha).*",
    "softmax and cross-entropy": r"(?i)(_kernel|.*(softmax|logsumexp|gather|scatter|reduce_kernel)).*",
    "random numbers": r"(?i).*(random|distribution|philox).*",
    "optimiser": r"(?i).*(multi_tensor|adam).*",
    "copying and reading": r"(?i).*(memcpy|memset|copy|index|cat|embedding).*",
}
"""Patterns of the names of kernels, as KINDS."""


def kind_of(name: str, kinds: Mapping[str, str] = KINDS) -> str:
    """Return the kind of work of an operator in torch's profiler, or of a kernel."""
    name = name.removeprefix("aten::")
    return next((kind for kind, names in kinds.items() if re.fullmatch(names, name)), "other operators")
