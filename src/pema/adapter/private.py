"""Training with differential privacy: DP-SGD (Abadi et al. 2016) with whole examples as the unit.

Neighbouring memories have the same number N of examples and differ in one: in one memory all its pairs are present,
in the other it is blank (no pairs, so no gradient). A step takes every example with probability q, independently of
the others, clips the gradient of its mean loss to norm C, sums them, adds noise N(0, (sigma C)^2) to every entry, and
divides by q N. The accountant of Opacus computes the sigma that keeps all steps together within (epsilon, delta).

All outputs of the training are computed from these noisy sums and from public values: the settings, N, the PLM,
the task and its template.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pema.adapter.accounting import accountant_name, epsilon_spent, noise_multiplier
from pema.adapter.checkpoint import Checkpoint, State, optimizer_shapes, optimizer_tensors, restore_optimizer
from pema.adapter.clipping import clipped_sum
from pema.adapter.config import TrainConfig
from pema.adapter.loss import CrossEntropy
from pema.adapter.module import Adapter
from pema.adapter.optimisation import adapter_config, learning_rate_at, make_optimizer, set_rate, uses_bfloat16
from pema.adapter.reconstruction import where_not_finite
from pema.adapter.secret import KEY_BYTES, Secret
from pema.console import progress
from pema.devices import device_named
from pema.errors import AdapterError, ConfigError
from pema.memory.reader import Memory, View
from pema.memory.shard import Integers
from pema.signature import signature

EXAMPLES_AT_ONCE = 64
"""Number of examples whose pairs are in RAM at a time."""


def train_privately(
    memory: Memory, config: TrainConfig, output: Path, checkpoint: Checkpoint
) -> tuple[Adapter, dict[str, Any]]:
    """Train for all epochs and write the last adapter; see `pema.adapter.training.train`.

    Raises:
        ConfigError: dp_delta or batch_size is too large for the number of examples, or Opacus is not installed.
        AdapterError: the memory is empty, or a gradient is not finite.
    """
    if not memory.pairs:
        raise AdapterError(f"{memory.path} contains no pairs to train on: build it with more examples.")
    run = PrivateRun(memory, config, output, checkpoint)
    run.to_the_end()
    return run.finish(), run.state.figures


class PrivateRun:
    """One private training run. Its `State` stores the step; the checkpoint stores the secret until the run ends."""

    def __init__(self, memory: Memory, config: TrainConfig, output: Path, checkpoint: Checkpoint) -> None:
        assert config.dp_epsilon is not None
        assert config.dp_delta is not None
        _check_sizes(config, memory.examples)
        self.memory, self.config, self.output, self.checkpoint = memory, config, output, checkpoint
        self.rate = config.batch_size / memory.examples
        self.steps = math.ceil(config.epochs / self.rate)
        self.device = device_named(config.device)
        self.adapter = Adapter(adapter_config(memory, config), seed=config.seed).to(self.device)
        self.parameters = {"A": self.adapter.A, "B_pd": self.adapter.B_pd}
        self.optimizer = make_optimizer(self.parameters.values(), config)
        self.bfloat16 = uses_bfloat16(config, self.device)
        head = memory.head(torch.bfloat16 if self.bfloat16 else None).to(self.device)
        self.cross_entropy = CrossEntropy(head, bfloat16=self.bfloat16)
        if checkpoint.exists():
            shapes = {name: p.shape for name, p in self.parameters.items()}
            self.state, tensors = checkpoint.load(shapes | {"secret": (KEY_BYTES,)}, optimizer_shapes(self.parameters))
            if tensors["secret"].dtype != torch.uint8 or "noise_multiplier" not in self.state.figures:
                raise AdapterError(f"the checkpoint {checkpoint.folder} is not one of private training: remove it.")
            self.secret = Secret(bytes(tensors["secret"].tolist()))
            for name, parameter in self.parameters.items():
                parameter.data.copy_(tensors[name])
            restore_optimizer(self.optimizer, self.parameters, tensors)
        else:
            self.secret = Secret.draw()
            sigma = noise_multiplier(config.dp_epsilon, config.dp_delta, self.rate, self.steps)
            self.state = State(figures={"noise_multiplier": sigma})
            self.save()

    def to_the_end(self) -> None:
        """Take all remaining steps."""
        state = self.state
        every = self.config.checkpoint_every or math.ceil(1 / self.rate)
        with progress("private training", self.steps, "steps") as advance:
            advance(state.step, earlier=True)
            while state.step < self.steps:
                started = time.perf_counter()
                self.step()
                state.seconds += time.perf_counter() - started
                advance(1)
                if state.step % every == 0:
                    self.save()

    def step(self) -> None:
        """Take one step of DP-SGD; its random numbers depend only on the secret and the step."""
        config, state = self.config, self.state
        rate = learning_rate_at(state.step, self.steps, config)
        set_rate(self.optimizer, rate)
        total = self.clipped_sum(self.secret.poisson_sample(state.step, self.memory.examples, self.rate))
        deviation = state.figures["noise_multiplier"] * config.clip
        for name, parameter in self.parameters.items():
            if not bool(total[name].isfinite().all()):
                raise AdapterError(
                    where_not_finite(
                        self.memory.view(),
                        f"the gradient is not finite at step {state.step + 1}: training diverged. "
                        f"Lower the learning rate (now {rate:.3g}).",
                    )
                )
            noise = self.secret.normal(state.step, name, parameter.shape).to(self.device)
            parameter.grad = ((total[name].double() + deviation * noise) / config.batch_size).float()
        self.optimizer.step()
        state.step += 1

    def clipped_sum(self, examples: Integers) -> dict[str, Tensor]:
        """Return the sum of the clipped gradients of some examples (sorted indices), by parameter; zero without any."""
        total = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in self.parameters.items()}
        for start in range(0, len(examples), EXAMPLES_AT_ONCE):
            view = View(self.memory, examples[start : start + EXAMPLES_AT_ONCE])
            for batch in view.batches(max(view.pairs, 1), device=self.device):
                starts = (batch.steps == 0).nonzero()[:, 0].tolist()
                lengths = [stop - first for first, stop in itertools.pairwise([*starts, len(batch.steps)])]
                part = clipped_sum(
                    self.adapter,
                    self.cross_entropy,
                    batch.representations,
                    batch.targets,
                    torch.tensor(lengths, device=self.device),
                    self.config.clip,
                    bfloat16=self.bfloat16,
                )
                for name, gradient in part._asdict().items():
                    total[name] += gradient
        return total

    def save(self) -> None:
        """Replace the checkpoint with the current state."""
        secret = torch.tensor(list(self.secret.key), dtype=torch.uint8)
        tensors = {"secret": secret, **self.parameters, **optimizer_tensors(self.optimizer, self.parameters)}
        self.checkpoint.save(self.state, tensors)

    def finish(self) -> Adapter:
        """Write the adapter with its privacy figures, and remove the checkpoint with the secret.

        Neither the memory's digest, the number of its pairs nor the training time is written: they are
        functions of the data without noise.
        """
        state, config = self.state, self.config
        sigma = state.figures["noise_multiplier"]
        state.figures |= {
            "epsilon": epsilon_spent(sigma, config.dp_delta or 0.0, self.rate, self.steps),
            "delta": config.dp_delta,
            "clip_norm": config.clip,
            "sampling_rate": self.rate,
            "steps": state.step,
            "unit": "example",
            "accountant": accountant_name(),
            "examples": self.memory.examples,
            "parameters": sum(p.numel() for p in self.parameters.values()),
        }
        training = {
            "settings": config.to_dict(),
            "figures": dict(state.figures),
            "signature": signature(config.to_dict(), config.seed),
        }
        self.adapter.config = adapter_config(self.memory, config, training)
        self.adapter.cpu().eval().requires_grad_(False)
        self.adapter.save_pretrained(self.output)
        self.checkpoint.remove()
        state.figures["train_seconds"] = round(state.seconds, 2)
        return self.adapter


def _check_sizes(config: TrainConfig, examples: int) -> None:
    if config.dp_delta is not None and config.dp_delta >= 1 / examples:
        raise ConfigError(
            f"dp_delta={config.dp_delta} for {examples} examples: publishing one example as it is would be as private. "
            f"Use less than {1 / examples:.3g}."
        )
    if config.batch_size > examples:
        raise ConfigError(
            f"batch_size={config.batch_size} with dp_epsilon counts examples, and the memory has {examples}: "
            f"use at most {examples}."
        )
