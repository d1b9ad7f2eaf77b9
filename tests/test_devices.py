"""Devices by name, and their bfloat16 support."""

import pytest
import torch

from pema import devices
from pema.devices import CPU_CHECKS, device_named, has_bfloat16
from pema.errors import AdapterError


@pytest.fixture
def cpu(tmp_path, monkeypatch):
    """The CPU, as if the system listed no flag for bfloat16."""
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f\n")
    return torch.device("cpu")


def test_bfloat16_needs_the_processor(monkeypatch, cpu):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not has_bfloat16(cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bfloat16(cpu)
    assert not has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor: 1\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx512f\n", False),
        ("Features\t: fp asimd\n", False),
    ],
)
def test_without_the_checks_of_torch_the_flags_decide(monkeypatch, cpu, text, expected):
    for name in CPU_CHECKS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    devices.CPU_INFO.write_text(text)
    assert has_bfloat16(cpu) is expected


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_without_flags_a_product_is_timed_once(monkeypatch, cpu, faster):
    for name in CPU_CHECKS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    devices.CPU_INFO.unlink()
    clock, calls = [0.0], []

    def linear(x, weight):
        calls.append(x.dtype)
        clock[0] += 1.0 if x.dtype == faster else 2.7

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    devices._is_faster_in_bfloat16.cache_clear()
    try:
        assert [has_bfloat16(cpu) for _ in range(3)] == [faster == torch.bfloat16] * 3
    finally:
        devices._is_faster_in_bfloat16.cache_clear()
    assert calls == [torch.float32, torch.bfloat16] * 5


def test_a_file_without_flags_is_none(cpu):
    devices.CPU_INFO.write_text("vendor: unknown\n")
    assert devices._cpu_flags() == frozenset()


def test_devices_are_named():
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(AdapterError, match=r"device='abacus' cannot be used on this machine: .* Use device='auto'"):
        device_named("abacus")


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory is a book"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error, lacks):
    assert devices.lacks_memory(error) == lacks
