"""The device that a user names, and what it can do."""

import pytest
import torch

from pema.devices import CPU_CHECKS, device_named, has_bfloat16
from pema.errors import AdapterError


def test_bfloat16_needs_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not has_bfloat16(cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bfloat16(cpu)
    assert not has_bfloat16(torch.device("meta"))


def test_a_torch_without_the_checks_has_no_bfloat16(monkeypatch):
    for name in CPU_CHECKS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not has_bfloat16(torch.device("cpu"))


def test_devices_are_named():
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(AdapterError, match=r"device='abacus' cannot be used here: .* Use device='auto'"):
        device_named("abacus")
