"""One training run: reconstruction, then joint retraining of A and B_pd (steps 2 and 3 of the method)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pema.adapter.captured import Captured
from pema.adapter.checkpoint import Checkpoint, State, optimizer_shapes, optimizer_tensors, restore_optimizer
from pema.adapter.config import TrainConfig
from pema.adapter.dropout import Dropout
from pema.adapter.fitted import fit_schedule
from pema.adapter.log import Log, NoLog
from pema.adapter.loss import CrossEntropy, JointLoss, OwnCrossEntropy
from pema.adapter.module import Adapter
from pema.adapter.optimisation import (
    EarlyStopping,
    adapter_config,
    learning_rate_at,
    make_optimizer,
    set_rate,
    step_down,
    uses_bfloat16,
)
from pema.adapter.reconstruction import (
    closed_form,
    fit_reconstruction_sgd,
    reconstruction_error,
    where_not_finite,
)
from pema.adapter.sampled import SampledCrossEntropy, frequent
from pema.console import progress
from pema.devices import device_named, is_asynchronous
from pema.errors import AdapterError
from pema.memory.buffer import Part
from pema.memory.prefetch import prefetch
from pema.memory.prompts import ContextTokens
from pema.memory.reader import Memory, View
from pema.processes import ALONE, Processes
from pema.schema import from_json
from pema.signature import signature

MEASURED = 1 << 14
"""Number of held-out pairs, if there are more, on which losses are measured and the schedule is fitted."""

READ_EVERY = 32
"""Number of steps between two readings of the losses of an accelerator, which wait for it."""


class JointRun:
    """One training run: its memory, adapter and optimizer, and the `State` that a checkpoint stores.

    Of several processes each has the same weights and state. A step adds up the gradients of their parts of a batch.
    """

    def __init__(
        self,
        memory: Memory,
        config: TrainConfig,
        output: Path,
        checkpoint: Checkpoint,
        tensorboard: bool,
        processes: Processes = ALONE,
    ) -> None:
        self.memory, self.config, self.output, self.checkpoint = memory, config, output, checkpoint
        self.processes = processes
        self.train_view, self.held_out = _split(memory, config)
        own = processes.device if config.device == "auto" else None
        # With its number: a GPU without one is the current one of a thread, and that of another thread is the first.
        self.device = torch.empty(0, device=own or device_named(config.device)).device
        self.runs_ahead = is_asynchronous(self.device)
        tokens = memory.view().targets_seen() if config.vocabulary in ("seen", "own") else None
        self.adapter = Adapter(adapter_config(memory, config), tokens, seed=config.seed)
        self.parameters = dict(self.adapter.named_parameters())
        stored = self.load()
        self.state = stored[0] if stored else State()
        state = self.state
        self.log = Log(output, state.log_bytes, tensorboard, state.step) if processes.is_writer else NoLog()
        if stored:
            self.adapter.B_rct = stored[1].get("B_rct")
        elif config.reconstructs:
            self.reconstruct()
        if self.adapter.U is not None:
            self.adapter.U.data.copy_(memory.head().weight[tokens])
        self.agree()
        self.adapter.to(self.device)
        self.parameters = dict(self.adapter.named_parameters())
        # The work of a step depends on the shapes of its batch alone, unless prompts are read or processes wait, and
        # these shapes are the same but for contexts without targets.
        captures = (
            self.device.type == "cuda"
            and processes.count == 1
            and self.adapter.copying is None
            and memory.manifest.targets != "matched"
        )
        self.optimizer = make_optimizer(self.adapter.groups(), config, captured=captures)
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        if stored:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(stored[1][name])
                self.best[name].copy_(stored[1][f"best.{name}"])
            restore_optimizer(self.optimizer, self.parameters, stored[1])
        bfloat16 = uses_bfloat16(config, self.device)
        head = memory.head(torch.bfloat16 if bfloat16 else None).to(self.device)
        self.joint = functools.partial(JointLoss, kappa=config.kappa, W_hd=head.weight)
        if self.adapter.U is None:
            self.loss = self.joint(CrossEntropy(head, self.adapter.tokens, bfloat16=bfloat16))
        else:
            self.loss = self.joint(OwnCrossEntropy(head, self.adapter, bfloat16=bfloat16))
        self.sampled = None
        if config.vocabulary == "sampled":
            counts = memory.view().target_counts()
            core = frequent(counts).to(self.device)
            complete = len(core) == int(counts.count_nonzero())
            self.sampled = SampledCrossEntropy(head, core, config.seed, bfloat16=bfloat16, complete=complete)
        self.trained = self.loss if self.sampled is None else self.joint(self.sampled)
        self.dropout = Dropout(config.dropout, config.seed, self.device)
        self.captured = Captured(self.update, [self.dropout.random]) if captures else None
        self.resident = memory.resident(self.device) if processes.count == 1 else None
        self.steps_per_epoch = math.ceil(self.train_view.pairs / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        if not stored:
            self.start()

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """Return the state and the tensors of the writer's checkpoint, if there is one."""
        values: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if self.processes.is_writer and self.checkpoint.exists():
            shapes = {name: p.shape for name, p in self.parameters.items()}
            best = {f"best.{name}": shape for name, shape in shapes.items()}
            optional = optimizer_shapes(self.parameters) | {"B_rct": self.adapter.B_pd.shape}
            state, tensors = self.checkpoint.load(shapes | best, optional)
            values = asdict(state)
        values, tensors = self.processes.same(values, tensors)
        return (from_json(State, values), tensors) if values else None

    def agree(self) -> None:
        """Take the writer's initial weights and B_rct: other processors may round differently."""
        state = self.adapter.state_dict()
        _, tensors = self.processes.same({}, state)
        for name, tensor in tensors.items():
            state[name].copy_(tensor)

    def reconstruct(self) -> None:
        """Fit B_rct; with init="pca" the adapter starts from it."""
        config, view, d = self.config, self.train_view, self.memory.d
        started = time.perf_counter()
        if config.reconstruction == "closed_form":
            A, B_rct, error = closed_form(view, config.rank, d, self.processes, self.device)
        else:
            A, B_rct, error = fit_reconstruction_sgd(
                view,
                config.rank,
                d,
                held_out=self.held_out,
                learning_rate=config.reconstruction_learning_rate,
                epochs=config.reconstruction_epochs,
                batch_size=config.batch_size,
                patience=config.patience,
                seed=config.seed,
                processes=self.processes,
            )
        figures = {"reconstruction_error": error, "reconstruction_seconds": time.perf_counter() - started}
        if self.held_out is not None:
            figures["held_out_reconstruction_error"] = reconstruction_error(self.held_out, A, B_rct, self.processes)
        self.state.figures |= figures
        self.log.write("reconstruction", 0, {"procedure": config.reconstruction} | figures)
        if config.activation == "none":
            self.adapter.B_rct = B_rct
        if config.init == "pca":
            self.adapter.A.data.copy_(A)
            if not config.residual:
                self.adapter.B_pd.data.copy_(B_rct)

    def start(self) -> None:
        """Measure the losses before training; with `residual` the adapter is then equal to the PLM."""
        if self.held_out is not None:
            total, reconstruction, prediction = self.measure(self.held_out)
            self.state.lowest = total
            self.state.figures |= {"start_loss": total, "start_cross_entropy": prediction}
            self.note_lowest(total, reconstruction, prediction)
            self.log.write("start", 0, {"held_out": _parts(total, reconstruction, prediction)})
        self.save()

    def to_the_end(self) -> None:
        """Train until the last epoch, or until the held-out loss has not fallen for `patience` epochs."""
        config, state = self.config, self.state
        pairs = self.train_view.pairs
        done = min(state.epoch * pairs + state.batch * config.batch_size, config.epochs * pairs)
        with progress("training", config.epochs * pairs, "pairs") as advance:
            advance(done, earlier=True)
            while not state.stopped:
                started, before = time.perf_counter(), state.sums[0]
                self.epoch(advance)
                self.end_epoch(time.perf_counter() - started, state.sums[0] - before)
        self.log.close()

    def epoch(self, advance: Any) -> None:  # noqa: ANN401
        """Train on the remaining batches of the current epoch."""
        config, state = self.config, self.state
        started, pairs, note = time.perf_counter(), 0, ""
        sums = torch.tensor(state.sums, dtype=torch.float64, device=self.device)
        for k, (part, context) in enumerate(self.parts()):
            if k < state.batch:
                continue
            losses, rate = self.step(part, context)
            n = len(part.rows)
            sums[0] += n
            sums[1:].add_(losses, alpha=n)
            state.batch = k + 1
            pairs += n
            logs = config.log_every and state.step % config.log_every == 0
            saves = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if not self.runs_ahead or logs or saves or state.step % READ_EVERY == 0:
                total, reconstruction, prediction = losses.tolist()
                self.read(sums)
                note = f"epoch {state.epoch + 1}/{config.epochs} loss {total:.3f}"
            advance(n, note=note)
            if logs:
                seconds = time.perf_counter() - started
                values = _parts(total, reconstruction, prediction)
                values |= {"learning_rate": rate, "pairs_per_second": pairs / seconds}
                self.log.write("step", state.step, {"epoch": state.epoch + 1} | values)
            if saves:
                self.save()
        self.read(sums)

    def parts(self) -> Iterator[tuple[Part, ContextTokens | None]]:
        """Yield this process's part of each batch of the epoch, on its device, with what copying reads."""
        config, processes = self.config, self.processes
        seed = config.seed * 1_000_003 + self.state.epoch

        def read() -> Iterator[tuple[Part, ContextTokens | None]]:
            parts = self.train_view.parts(
                config.batch_size, processes, shuffle_seed=seed, device=self.device, resident=self.resident
            )
            for part in parts:
                context = None
                if len(part.batch.rows):
                    # The masks of copying belong to the tokens of the whole batch.
                    context = self.adapter.context(self.memory, part.rows if self.dropout.cut else part.batch.rows)
                yield part, None if context is None else context.to(self.device)

        return prefetch(read()) if self.runs_ahead and self.adapter.copying is not None else read()

    def read(self, sums: Tensor) -> None:
        """Read the sums of the epoch from the device.

        Raises:
            AdapterError: a loss was not finite.
        """
        state, when = self.state, "by" if self.runs_ahead else "at"
        values = tuple(sums.tolist())
        if not math.isfinite(values[1]):
            rate = learning_rate_at(max(state.step - 1, 0), self.steps, self.config)
            raise AdapterError(
                where_not_finite(
                    self.train_view,
                    f"the loss is {values[1]} {when} step {state.step} (epoch {state.epoch + 1}): training diverged. "
                    f"Lower the learning rate (now {rate:.3g}) or set clip=1.",
                )
            )
        state.sums = values

    def step(self, part: Part, context: ContextTokens | None) -> tuple[Tensor, float]:
        """Take an optimizer step on a batch, of which `part` is this process's; return its losses and learning rate.

        The losses of the whole batch, (3,) float32, stay on the device: reading them would wait for it. The next step
        may overwrite them.
        """
        config, state, batch, pairs = self.config, self.state, part.batch, len(part.rows)
        rate = learning_rate_at(state.step, self.steps, config)
        set_rate(self.optimizer, rate)
        self.dropout.at(state.step, part.first, pairs if self.processes.count > 1 else 0)
        if self.sampled is not None:
            self.sampled.at(state.step)
        if self.captured is None:
            values = self.update(batch.representations, batch.targets, context, part.weight)
        else:
            values = self.captured(batch.representations, batch.targets)
        state.step += 1
        return values, rate

    def update(self, f: Tensor, targets: Tensor, context: ContextTokens | None = None, weight: float = 1.0) -> Tensor:
        """Take an optimizer step with these pairs, a share `weight` of the batch; return the losses of the batch."""
        if len(targets):
            dropout = self.dropout if self.dropout.cut else None
            losses = self.trained(self.adapter, f, targets, dropout, context=context, forced=True)
            values = torch.stack(losses).detach()
        else:
            losses, values = None, torch.zeros(3, device=self.device)
        if self.processes.count > 1:
            self.processes.add(values.mul_(weight))
        step_down(
            self.optimizer,
            None if losses is None else losses.total,
            self.parameters.values(),
            self.config.clip,
            share=weight,
            processes=self.processes,
        )
        return values

    def end_epoch(self, seconds: float, pairs: float) -> None:
        """Measure the held-out loss, keep the weights if it is the lowest, and decide whether to continue."""
        config, state = self.config, self.state
        state.epoch, state.batch = state.epoch + 1, 0
        state.seconds += seconds
        n, *sums = state.sums
        state.sums = (0.0,) * 4
        rate = learning_rate_at(state.step - 1, self.steps, config)
        values: dict[str, Any] = {
            "seconds": seconds,
            "pairs_per_second": pairs / max(seconds, 1e-9),
            "learning_rate": rate,
        }
        values |= {"train": _parts(*(s / n for s in sums))}
        if self.held_out is None:
            state.best_epoch = state.epoch
        else:
            total, reconstruction, prediction = self.measure(self.held_out)
            values |= {"held_out": _parts(total, reconstruction, prediction)}
            stopping = EarlyStopping(config.patience, math.inf if state.lowest is None else state.lowest, state.since)
            if stopping.is_lowest(total):
                state.best_epoch = state.epoch
                self.note_lowest(total, reconstruction, prediction)
            state.lowest, state.since, state.stopped = stopping.lowest, stopping.since, stopping.is_over
        if state.best_epoch == state.epoch:
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter.detach())
        state.stopped |= state.epoch == config.epochs
        self.log.write("epoch", state.step, {"epoch": state.epoch} | values)
        self.save()

    def note_lowest(self, total: float, reconstruction: float, prediction: float) -> None:
        """Record the held-out losses of the best weights for the model card."""
        figures = {"held_out_loss": total, "held_out_cross_entropy": prediction}
        if self.config.kappa > 0:
            figures["held_out_reconstruction"] = reconstruction
        self.state.figures |= figures

    @torch.no_grad()
    def measure(self, view: View) -> tuple[float, float, float]:
        """Return the mean losses (total, reconstruction, prediction) of the adapter over the pairs of `view`."""
        sums, pairs = torch.zeros(3, dtype=torch.float64, device=self.device), torch.zeros(1, dtype=torch.int64)
        size, share = max(self.config.batch_size, 1024), view.share(self.processes)
        for batch in share.batches(size, device=self.device, resident=self.resident):
            context, n = self.adapter.context(self.memory, batch.rows), len(batch.targets)
            loss = self.loss(self.adapter, batch.representations, batch.targets, context=context)
            sums += torch.stack(loss).double() * n
            pairs += n
        sums /= int(self.processes.add(pairs))
        total, reconstruction, prediction = self.processes.add(sums).tolist()
        if not math.isfinite(total):
            raise AdapterError(
                where_not_finite(
                    view,
                    f"the held-out loss is {total} after step {self.state.step}: training diverged. "
                    f"Lower the learning rate (now {self.config.learning_rate:.3g}) or set clip=1.",
                )
            )
        return total, reconstruction, prediction

    def save(self) -> None:
        """Replace the checkpoint with the current state, if this process is the writer."""
        if not self.processes.is_writer:
            return
        self.log.sync()
        self.state.log_bytes = self.log.bytes
        tensors: dict[str, Tensor] = dict(self.parameters)
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= optimizer_tensors(self.optimizer, self.parameters)
        if self.adapter.B_rct is not None:
            tensors["B_rct"] = self.adapter.B_rct
        self.checkpoint.save(self.state, tensors)

    def finish(self, digest: str) -> Adapter:
        """Write the best adapter with its figures and its fitted schedule, and remove the checkpoint."""
        state, config = self.state, self.config
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.best[name])
        state.figures |= {
            "best_epoch": state.best_epoch,
            "epochs": state.epoch,
            "steps": state.step,
            "pairs": self.train_view.pairs,
            "held_out_pairs": self.held_out.pairs if self.held_out is not None else 0,
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "train_seconds": round(state.seconds, 2),
            "pairs_per_second": round(state.epoch * self.train_view.pairs / max(state.seconds, 1e-9), 1),
        }
        training: dict[str, Any] = {
            "settings": config.to_dict(),
            "memory": digest,
            "figures": state.figures,
            "signature": signature(config.to_dict(), config.seed),
        }
        self.adapter.eval().requires_grad_(False)
        # A captured step refers to this run: without this, both would stay on the device after the training.
        self.captured = self.resident = None
        fitted = None
        if self.held_out is not None:
            head = self.memory.head().to(self.device)
            fitted = fit_schedule(self.adapter, head, self.held_out, processes=self.processes)
        self.adapter.cpu()
        training, _ = self.processes.same(training)  # with the writer's clock and machine
        state.figures = training["figures"]
        self.adapter.config = adapter_config(self.memory, config, training, fitted)
        if self.processes.is_writer:
            self.adapter.save_pretrained(self.output)
            self.checkpoint.remove()
        self.processes.same()  # the others return when the adapter is written
        self.adapter.name = self.output.name
        return self.adapter


def _split(memory: Memory, config: TrainConfig) -> tuple[View, View | None]:
    if not memory.pairs:
        raise AdapterError(f"{memory.path} contains no pairs to train on: build it with more examples.")
    if config.dev_fraction == 0:
        return memory.view(), None
    train_view, held_out = memory.split(config.dev_fraction, config.seed)
    return train_view, held_out.spread(MEASURED)


def _parts(total: float, reconstruction: float, prediction: float) -> dict[str, float]:
    return {"loss": total, "reconstruction": reconstruction, "cross_entropy": prediction}
