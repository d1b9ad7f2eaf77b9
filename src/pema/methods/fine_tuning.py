"""Training with gradients through the PLM: one loop for every method that does, so that they differ in nothing else."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema.adapter.config import LARGEST
from pema.adapter.optimisation import EarlyStopping, course, descend
from pema.console import progress
from pema.devices import device_named
from pema.errors import AdapterError
from pema.memory.encoding import Tokens
from pema.methods.contract import MOST, Job, Method, Needs, Trained
from pema.methods.targets import cross_entropy, encode, mean_cross_entropy
from pema.owner.local import LocalPLM
from pema.schema import option
from pema.tasks.held_out import Numbers, draw_held_out

CLIP = 1.0
"""Largest norm of a step's gradient."""

BATCHES_PER_BUCKET = 16
"""Batches whose examples are sorted by length together: enough to pad little, few enough to stay random."""


@dataclass(frozen=True)
class FineTuning(Method):
    """A method that minimises the cross-entropy of the target tokens, end-of-sequence included, with AdamW.

    Attributes:
        learning_rate: its highest value; it rises linearly over the warm-up and then falls to zero on a cosine.
        batch_size: examples in a step.
        epochs: most passes over the examples, and where the learning rate's course ends; the budget's if that is less.
        warmup: the share of the course that is warm-up.
        weight_decay: of AdamW.
        seconds: most seconds of training, measuring the held-out loss included; looked at after every step. The
            learning rate's course then ends with the time or with the last epoch, whichever comes first, and the same
            seed need not give the same weights.
    """

    learning_rate: float = option(1e-3, above=0.0, most=LARGEST)
    batch_size: int = option(16, least=1, most=1 << 24)
    epochs: int = option(8, least=1, most=MOST)
    warmup: float = option(0.1, least=0.0, below=1.0)
    weight_decay: float = option(0.0, least=0.0, most=1e3)
    seconds: float | None = option(None, above=0.0, most=1e9)

    @property
    def needs(self) -> Needs:
        """All weights; an owner who keeps them must train, and sees the targets."""
        return Needs("all", targets_at_owner=True, gradients=True)

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context window that the method takes for itself."""
        return 0

    @abstractmethod
    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """The model to train, and what writes its trained weights into a folder.

        Args:
            plm: a PLM of this training's own, whose weights are frozen.
            prepared: see `Method.train`.

        Returns:
            A model that is called as `plm.model` is, in which what is trained requires gradients, and the function.
        """

    def source(self, job: Job, prepared: Path) -> str | Path:
        """What to load and train."""
        return job.plm

    def train(self, job: Job, prepared: Path, output: Path) -> Trained:
        """See `Method.train`; the model is loaded in float32 unless the job says otherwise, and then seconds begin.

        Raises:
            AdapterError: a loss is not finite.
            ConfigError, DataError, OwnerError: a setting, an example or a PLM that cannot be used.
        """
        plm = LocalPLM.load(self.source(job, prepared), dtype=job.plm_dtype or "float32")
        plm.model.to(device_named("auto")).requires_grad_(False)
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            model, keep = self.trainable(plm, prepared)
            tokens = encode(plm, job.task.template, job.train, self.virtual_tokens)
            curve = fine_tune(model, tokens, self, job, lambda: keep(output))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Trained(parameters, round(time.perf_counter() - started, 3), tuple(curve))


def fine_tune(
    model: Any,  # noqa: ANN401
    tokens: Tokens,
    method: FineTuning,
    job: Job,
    keep: Callable[[], None],
) -> list[dict[str, float]]:
    """Train what requires gradients until the last epoch, or until the held-out loss has not fallen for a while.

    Args:
        model: called as a causal language model of transformers is.
        tokens: the training examples, of which `budget.dev_fraction` are held out.
        method: its settings.
        job: its seed and budget.
        keep: called before training and each time when the held-out loss is the lowest so far, to store the weights:
            the best ones are on the disk and not a second time in memory.

    Returns:
        The learning curve, see `Trained.curve`.

    Raises:
        AdapterError: a loss is not finite; the message names the step and the remedy.
    """
    started, budget = time.perf_counter(), job.budget
    train, held_out = draw_held_out(len(tokens.cuts), budget.dev_fraction, job.seed, "the training set")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=method.learning_rate, weight_decay=method.weight_decay, fused=True)
    epochs, step, over = min(method.epochs, budget.epochs), 0, False
    steps = epochs * math.ceil(len(train) / method.batch_size)

    def finite(loss: float, what: str) -> float:
        if not math.isfinite(loss) and step == 0:
            raise AdapterError(
                f"{method.name}: the {what} is {loss} before training, so it is the PLM's own: load it with "
                "plm_dtype='float32'."
            )
        if not math.isfinite(loss):
            raise AdapterError(
                f"{method.name}: the {what} is {loss} at step {step}: training diverged. Lower learning_rate (now "
                f"{method.learning_rate:g}), or lengthen the warm-up (now {method.warmup:g} of the steps)."
            )
        return loss

    def measure() -> float:
        return finite(mean_cross_entropy(model, tokens, held_out.tolist()), "held-out loss")

    stopping = EarlyStopping(budget.patience, lowest=measure())
    curve = [{"epoch": 0.0, "seconds": 0.0, "held_out_loss": stopping.lowest}]
    keep()
    with progress("training", steps, "steps") as advance:
        for epoch in range(1, epochs + 1):
            model.train()
            total, count = 0.0, 0
            for batch in batches(tokens, train, method.batch_size, np.random.default_rng((job.seed, epoch))):
                elapsed = 0.0 if method.seconds is None else (time.perf_counter() - started) / method.seconds
                rate = method.learning_rate * course(max((step + 0.5) / steps, elapsed), method.warmup)
                step += 1
                loss, n = cross_entropy(model, tokens, batch)
                total, count = total + finite(float(loss.detach()), "loss"), count + n
                descend(optimizer, loss / n, parameters, rate, CLIP)
                advance(1, note=f"epoch {epoch}/{epochs} loss {total / count:.3f}")
                over = method.seconds is not None and time.perf_counter() - started >= method.seconds
                if over:
                    break
            held_out_loss = measure()
            seconds = round(time.perf_counter() - started, 3)
            curve.append(
                {"epoch": epoch, "seconds": seconds, "train_loss": total / count, "held_out_loss": held_out_loss}
            )
            if stopping.is_lowest(held_out_loss):
                keep()
            if over or stopping.is_over:
                break
    model.eval()
    return curve


def batches(tokens: Tokens, which: Numbers, batch_size: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Every example once, in random batches of examples of nearly equal length."""
    order, bucket = random.permutation(which), batch_size * BATCHES_PER_BUCKET
    lengths = tokens.starts[1:] - tokens.starts[:-1]
    found: list[list[int]] = []
    for start in range(0, len(order), bucket):
        some = order[start : start + bucket]
        some = some[np.argsort(lengths[some], kind="stable")]
        found += [some[i : i + batch_size].tolist() for i in range(0, len(some), batch_size)]
    for i in random.permutation(len(found)):
        yield found[i]
