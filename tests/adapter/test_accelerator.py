"""Training on a GPU, where there is one: as on the CPU, captured as uncaptured, and without waiting for the device."""

import json
from dataclasses import replace

import pytest
import torch
from made_memories import make_memory

from pema.adapter import captured
from pema.adapter.fused import is_usable, losses_of
from pema.adapter.joint import JointRun
from pema.adapter.presets import preset
from pema.adapter.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = {
    "paper": ("paper", {"init": "pca"}),  # whose A and B_rct have the same signs
    "residual": ("residual", {"vocabulary": "full"}),
    "the sample with all targets": ("residual", {"vocabulary": "sampled"}),
    "the sample with the frequent targets": ("residual", {"vocabulary": "sampled"}),
    "paper in bfloat16": ("paper", {"init": "pca", "precision": "bfloat16"}),
    "residual in bfloat16": ("residual", {"vocabulary": "full", "precision": "bfloat16"}),
    "copying": ("best", {"vocabulary": "full", "copy_least": 0.0}),
    "copying with the sample": ("best", {"vocabulary": "sampled", "copy_least": 0.0}),
}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("accelerator") / "memory", examples=200, prompts=True)


@pytest.fixture
def config(request, monkeypatch):
    name, changes = KINDS[request.param]
    for module in ("config", "sampled", "training"):
        monkeypatch.setattr(f"pema.adapter.{module}.SAMPLE", 5)
    monkeypatch.setattr("pema.adapter.config.CORE", 6 if "frequent" in request.param else 100)
    monkeypatch.setattr("pema.adapter.sampled.CORE", 6 if "frequent" in request.param else 100)
    settings = {"epochs": 3, "batch_size": 32, "rank": 8, "precision": "float32", "log_every": 1, "device": "cuda"}
    return preset(name, **settings | changes)


@pytest.mark.parametrize("V", [5, 4096, 50_272])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cap", [None, 2.5, 30.0])
@pytest.mark.parametrize("size", [10, 1e4])
def test_the_kernel_is_autograds_cross_entropy(V, biased, cap, size):
    assert is_usable(torch.device("cuda"))
    random = torch.Generator("cuda").manual_seed(0)
    given = (size * torch.randn(3, V, generator=random, device="cuda")).bfloat16()
    bias = torch.randn(V, generator=random, device="cuda") if biased else None
    y = torch.tensor([0, V - 1, V // 2], device="cuda")
    x = given.float().requires_grad_()
    logits = x if bias is None else x + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    expected.sum().backward()
    assert torch.allclose(losses_of(given, y, bias, cap), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(given.float(), x.grad, rtol=1e-2, atol=1e-5)  # bfloat16 has 8 bits


def losses(folder):
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("config", KINDS, indirect=True)
def test_a_gpu_trains_as_the_cpu_does(config, memory, tmp_path):
    still = replace(config, dropout=0.0)
    train(memory, still, tmp_path / "gpu")
    train(memory, replace(still, device="cpu"), tmp_path / "cpu")
    rounding = 0.03 if config.precision == "bfloat16" else 1e-3
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=rounding)


@pytest.mark.parametrize("config", [kind for kind in KINDS if "copying" not in kind], indirect=True)
def test_captured_steps_are_those_of_the_function(config, memory, tmp_path, monkeypatch):
    captures = []
    capture = captured.Captured._capture

    def watching(self, inputs):
        captures.append(len(inputs[0]))
        capture(self, inputs)

    monkeypatch.setattr(captured.Captured, "_capture", watching)
    train(memory, config, tmp_path / "captured")
    assert captures == [32]
    monkeypatch.setattr(captured, "WARM_UP", 1 << 30)
    train(memory, config, tmp_path / "called")
    assert captures == [32]
    assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "called"), rel=1e-6)


@pytest.mark.parametrize("config", KINDS, indirect=True)
@pytest.mark.parametrize("batch_size", [32, 33])
def test_no_step_waits_for_the_device(config, batch_size, memory, tmp_path, monkeypatch):
    step, steps = JointRun.step, []

    def watched(run, *given):
        mode = "error" if run.state.step > 0 else "default"
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return step(run, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            steps.append(mode)

    monkeypatch.setattr(JointRun, "step", watched)
    monkeypatch.setattr(captured, "WARM_UP", 1 << 30)  # a capture waits once
    train(memory, replace(config, batch_size=batch_size), tmp_path / "adapter")
    assert steps.count("error") == len(steps) - 1 > 10


@pytest.mark.parametrize("config", ["residual"], indirect=True)
def test_a_resumed_training_goes_on_with_captured_steps(config, memory, tmp_path, monkeypatch):
    train(memory, config, tmp_path / "whole")
    step = JointRun.step

    def stopping(run, *given):
        if run.state.step == 40:
            raise KeyboardInterrupt
        return step(run, *given)

    monkeypatch.setattr(JointRun, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(memory, config, tmp_path / "resumed")
    monkeypatch.setattr(JointRun, "step", step)
    train(memory, config, tmp_path / "resumed", resume=True)
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
