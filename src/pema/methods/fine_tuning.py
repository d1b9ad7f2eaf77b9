"""Training with gradients through the PLM: one loop for all such methods, so that there are no other differences."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pema.adapter.config import LARGEST
from pema.console import progress
from pema.errors import AdapterError
from pema.methods.contract import MOST, Job, Method, Needs, TrainingReport
from pema.schema import option
from pema.tasks.held_out import Numbers, draw_held_out

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pema.memory.encoding import Tokens
    from pema.owner.local import LocalPLM

CLIP = 1.0
"""Maximum gradient norm of a step."""

BATCHES_PER_BUCKET = 16
"""Number of batches whose examples are sorted by length together: enough for little padding, few enough for
randomness."""


@dataclass(frozen=True)
class FineTuning(Method):
    """Method that minimises the cross-entropy of the target tokens, end-of-sequence included, with AdamW.

    Attributes:
        learning_rate: peak learning rate; it rises linearly during the warm-up and then falls to zero on a cosine.
        batch_size: number of examples per step.
        epochs: maximum number of passes over the examples, and the end of the learning rate schedule; the budget's
            epochs if that is less.
        warmup: fraction of the schedule that is warm-up.
        weight_decay: weight decay of AdamW.
        seconds: maximum training time in seconds, including the measurement of the held-out loss; checked after each
            step. The learning rate schedule then ends with the time or with the last epoch, whichever comes first, and
            the same seed need not give the same weights.
    """

    learning_rate: float = option(1e-3, above=0.0, most=LARGEST)
    batch_size: int = option(16, least=1, most=1 << 24)
    epochs: int = option(8, least=1, most=MOST)
    warmup: float = option(0.1, least=0.0, below=1.0)
    weight_decay: float = option(0.0, least=0.0, most=1e3)
    seconds: float | None = option(None, above=0.0, most=1e9)

    @property
    def needs(self) -> Needs:
        """All weights; an owner that keeps its weights must run the training, and sees the targets."""
        return Needs("all", targets_at_owner=True, gradients=True)

    @property
    def virtual_tokens(self) -> int:
        """Number of positions of the context window that the method occupies."""
        return 0

    @abstractmethod
    def trainable(self, plm: LocalPLM, prepared: Path) -> tuple[Any, Callable[[Path], None]]:
        """Return the model to train, and a function that writes its trained weights to a folder.

        Args:
            plm: a PLM loaded for this training only, with frozen weights.
            prepared: see `Method.train`.

        Returns:
            A model that is called like `plm.model`, whose trained parameters require gradients, and the function.
        """

    def source(self, job: Job, prepared: Path) -> str | Path:
        """Return the name or folder of the model to load and train."""
        return job.plm

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """See `Method.train`; load the model in float32 unless the job says otherwise, then start measuring seconds.

        Trained weights are float32 in any case; a PLM in bfloat16 computes in mixed precision.

        Raises:
            AdapterError: a loss is not finite.
            ConfigError, DataError, OwnerError: a setting, an example or the PLM cannot be used.
        """
        import torch

        from pema.devices import device_named
        from pema.methods.targets import encode
        from pema.owner.local import LocalPLM

        plm = LocalPLM.load(self.source(job, prepared), dtype=job.plm_dtype or "float32")
        plm.model.to(device_named(job.device)).requires_grad_(False)
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            precision = plm.model.dtype
            model, keep = self.trainable(plm, prepared)
            widen_trained(model)
            tokens = encode(plm, job.task.template, job.train, self.virtual_tokens)
            with mixed_precision(plm.model.device, enabled=precision == torch.bfloat16):
                curve, diverged_at = fine_tune(model, tokens, self, job, lambda: keep(output))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return TrainingReport(parameters, round(time.perf_counter() - started, 3), tuple(curve), diverged_at)


def mixed_precision(device: torch.device, *, enabled: bool) -> torch.autocast:
    """Return the context in which float32 weights are multiplied in bfloat16.

    It does not keep converted weights: these would outlive the steps that change the weights.
    """
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def widen_trained(model: nn.Module) -> None:
    """Widen the trained parameters to float32, in place: small steps of bfloat16 weights round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fine_tune(
    model: Any,  # noqa: ANN401
    tokens: Tokens,
    method: FineTuning,
    job: Job,
    keep: Callable[[], None],
) -> tuple[list[dict[str, float]], int | None]:
    """Train the parameters that require gradients until the last epoch, or until the held-out loss stops falling.

    Training that diverges (a loss is not finite) stops, and the best weights so far are kept.

    Args:
        model: called like a causal language model of transformers.
        tokens: the training examples, of which the fraction `budget.dev_fraction` is held out.
        method: provides the settings.
        job: provides the seed and the budget.
        keep: called before training and whenever the held-out loss reaches a new minimum, to store the weights: the
            best weights are on disk, without a second copy in memory.

    Returns:
        The learning curve, and the step at which training diverged or None; see `TrainingReport`.

    Raises:
        AdapterError: the loss is not finite before training.
    """
    import torch

    from pema.adapter.optimisation import EarlyStopping, course, descend
    from pema.methods.targets import cross_entropy, mean_cross_entropy

    started, budget = time.perf_counter(), job.budget
    train, held_out = draw_held_out(len(tokens.cuts), budget.dev_fraction, job.seed, "the training set", tokens.sources)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=method.learning_rate, weight_decay=method.weight_decay, fused=True)
    epochs, step, over = min(method.epochs, budget.epochs), 0, False
    steps = epochs * math.ceil(len(train) / method.batch_size)

    def measure() -> float:
        return mean_cross_entropy(model, tokens, held_out.tolist())

    before = measure()
    if not math.isfinite(before):
        raise AdapterError(
            f"{method.name}: the held-out loss is {before} before training, so the PLM itself causes it: load the PLM "
            "with plm_dtype='float32'."
        )
    stopping = EarlyStopping(budget.patience, lowest=before)
    curve = [{"epoch": 0.0, "seconds": 0.0, "held_out_loss": stopping.lowest}]
    keep()
    diverged = False
    with progress("training", steps, "steps") as advance:
        for epoch in range(1, epochs + 1):
            model.train()
            total, count = 0.0, 0
            for batch in batches(tokens, train, method.batch_size, np.random.default_rng((job.seed, epoch))):
                elapsed = 0.0 if method.seconds is None else (time.perf_counter() - started) / method.seconds
                rate = method.learning_rate * course(max((step + 0.5) / steps, elapsed), method.warmup)
                step += 1
                loss, n = cross_entropy(model, tokens, batch)
                diverged = not math.isfinite(float(loss.detach()))
                if diverged:
                    break
                total, count = total + float(loss.detach()), count + n
                descend(optimizer, loss / n, parameters, rate, CLIP)
                advance(1, note=f"epoch {epoch}/{epochs} loss {total / count:.3f}")
                over = method.seconds is not None and time.perf_counter() - started >= method.seconds
                if over:
                    break
            held_out_loss = math.inf if diverged else measure()
            diverged = not math.isfinite(held_out_loss)
            if diverged:
                break
            seconds = round(time.perf_counter() - started, 3)
            curve.append(
                {"epoch": epoch, "seconds": seconds, "train_loss": total / count, "held_out_loss": held_out_loss}
            )
            if stopping.is_lowest(held_out_loss):
                keep()
            if over or stopping.is_over:
                break
    model.eval()
    return curve, step if diverged else None


def batches(tokens: Tokens, which: Numbers, batch_size: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Yield each example once, in random batches of examples of nearly equal length."""
    order, bucket = random.permutation(which), batch_size * BATCHES_PER_BUCKET
    lengths = tokens.starts[1:] - tokens.starts[:-1]
    grouped: list[list[int]] = []
    for start in range(0, len(order), bucket):
        some = order[start : start + bucket]
        some = some[np.argsort(lengths[some], kind="stable")]
        grouped += [some[i : i + batch_size].tolist() for i in range(0, len(some), batch_size)]
    for i in random.permutation(len(grouped)):
        yield grouped[i]
