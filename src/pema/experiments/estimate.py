"""Estimates of a run's time and memory, from a short measurement of the PLM and a model of the costs.

The measurement covers a forward pass over some training examples, a step of generation and a product with the head.
In the model F, D and H are the seconds per token in a forward pass, per step of generation with a full batch, and per
vector in a product with the head:

- a memory of `teacher` contexts: tokens x F; of `predicted` contexts: prompt tokens x F + steps x D;
- training with gradients through the PLM: epochs x tokens x 3 F (a backward pass costs two forward passes); on a
  memory: epochs x pairs x 3 H, times the fraction of the vocabulary that is trained;
- a run: prompt tokens of test x F + steps x D, and tokens of dev x F; a candidate that generates for dev: prompt tokens
  of these dev examples x F + steps x D;
- memory: the weights, and while training with gradients their copy in the training process (four times for full
  fine-tuning: weights, gradients and two moments of AdamW), the activations and the logits of a batch.

Training times are upper bounds, because training stops early if the held-out loss no longer falls. Evaluation is not
included. A PLM that another engine runs is measured on two examples, once, because its owner may count what is asked;
the requests to an API that gives its likeliest tokens only are not included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pema.adapter.config import CORE, TrainConfig
from pema.adapter.config import SAMPLE as SAMPLED
from pema.experiments.requirements import provided_by
from pema.experiments.workplace import Stages
from pema.memory.encoding import Tokens
from pema.methods.full import FullFineTuning
from pema.methods.targets import encode
from pema.owner.contract import PLM
from pema.owner.local import LocalPLM
from pema.tasks.example import Example

START = 5.0
"""Seconds for a training process to load the libraries."""

SAMPLE, MEASURED_TOKENS, VECTORS = 16, 2048, 256
ASKED = 2
"""Number of examples that a PLM elsewhere is measured on."""

FLOAT = 4
ACTIVATIONS = 20
"""Numbers per token, layer and dimension that a backward pass needs."""


@dataclass(frozen=True)
class Speed:
    """Measured speed of a PLM: seconds per token, per step of generation, and per vector in a product with the head."""

    token: float
    step: float
    vector: float

    @classmethod
    @torch.no_grad()
    def of(cls, plm: PLM, stages: Stages, batch_size: int) -> Speed:
        """Measure a PLM on some training examples."""
        examples = stages.job.train[: SAMPLE if isinstance(plm, LocalPLM) else ASKED]
        tokens = encode(plm, stages.job.task.template, examples)
        head = plm.head()
        vectors = torch.zeros(VECTORS, head.d, device=head.weight.device)
        vector = _seconds(lambda: head.logits(vectors)) / VECTORS
        if not isinstance(plm, LocalPLM):
            return cls(*_asked(plm, tokens, batch_size), vector)
        width = max(1, int(np.mean(tokens.starts[1:] - tokens.starts[:-1])))
        rows = max(1, min(SAMPLE, MEASURED_TOKENS // width))
        ids = torch.from_numpy(tokens.ids[:width].astype(np.int64)).repeat(rows, 1).to(plm.model.device)
        return cls(
            _seconds(lambda: plm.model(input_ids=ids, use_cache=False).logits) / ids.numel(),
            _seconds(lambda: plm.model(input_ids=ids[:1, :1].repeat(batch_size, 1), use_cache=False).logits),
            vector,
        )


def _asked(plm: PLM, tokens: Tokens, batch_size: int) -> tuple[float, float]:
    """Measure a PLM elsewhere: seconds per token of contexts, and of a step of `batch_size` rows."""
    examples = range(len(tokens.cuts))
    sequences, prompts = [tokens.sequence(i) for i in examples], [tokens.prompt(i) for i in examples]
    starts, provided = [len(prompt) for prompt in prompts], provided_by(plm)
    times = [time.perf_counter()]
    if "teacher" in provided:
        list(plm.represent(sequences, starts))
        times.append(time.perf_counter())
    if "probabilities" in provided:
        with contextlib.closing(plm.open_session(prompts)) as session:
            times.append(time.perf_counter())
            session.advance([tokens.target(i)[0] for i in examples])
    else:  # an API's requests cost money, so only the reading of a context is measured
        list(plm.represent([tokens.sequence(i)[: starts[i] + 1] for i in examples], starts))
    times.append(time.perf_counter())
    count = sum(map(len, sequences if "teacher" in provided else prompts))
    return (times[1] - times[0]) / count, (times[-1] - times[-2]) * batch_size / len(examples)


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """Return the minimum of three measured calls, after one that is not measured."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        float(call().flatten()[-1])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times[1:])


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens of examples."""

    examples: int
    prompts: int
    targets: int
    kinds: int

    @classmethod
    def of(cls, plm: PLM, stages: Stages, examples: Sequence[Example]) -> Sizes:
        """Count the tokens of examples; `kinds` is the number of different target tokens."""
        tokens = encode(plm, stages.job.task.template, examples)
        targets = [tokens.target(i) for i in range(len(tokens.cuts))]
        total = sum(map(len, targets))
        return cls(len(tokens.cuts), len(tokens.ids) - total, total, len({each for one in targets for each in one}))


def prepare_seconds(stages: Stages, speed: Speed, sizes: Sizes, batch_size: int) -> float:
    """Estimate the time of the PLM owner's part."""
    settings = stages.method.settings()
    if settings.get("contexts") == "predicted":
        return (1 + int(settings.get("rounds", 0))) * (
            sizes.prompts * speed.token + _generation(sizes, speed, batch_size)
        )
    if "distil_steps" in settings:
        length = (sizes.prompts + sizes.targets) / sizes.examples
        return float(settings["distil_steps"]) * SAMPLE * length * 4 * speed.token
    return (sizes.prompts + sizes.targets) * speed.token


def train_seconds(stages: Stages, speed: Speed, sizes: Sizes, vocabulary: int) -> float:
    """Estimate the maximum time of one training."""
    settings = {**stages.method.implied, **stages.method.settings()}
    if "epochs" not in settings:
        return START
    epochs = min(settings["epochs"], stages.job.budget.epochs)
    if "vocabulary" not in settings:  # gradients through layers: the PLM's, or those of an LM that is hardly larger
        return START + float(epochs * (sizes.prompts + sizes.targets) * 3 * speed.token)
    kind = TrainConfig(vocabulary=settings["vocabulary"]).with_vocabulary(vocabulary, sizes.kinds).vocabulary
    trained = {"seen": sizes.kinds, "sampled": min(sizes.kinds, CORE) + SAMPLED}.get(kind, vocabulary)
    return START + float(epochs * sizes.targets * 3 * speed.vector * trained / vocabulary)


def run_seconds(speed: Speed, test: Sizes, dev: Sizes, batch_size: int) -> float:
    """Estimate the time to generate for the test examples and to compute the perplexity of the dev examples."""
    return text_seconds(speed, test, batch_size) + (dev.prompts + dev.targets) * speed.token


def text_seconds(speed: Speed, sizes: Sizes, batch_size: int) -> float:
    """Estimate the time to generate a text for each of the examples."""
    return sizes.prompts * speed.token + _generation(sizes, speed, batch_size)


def memory_bytes(stages: Stages, plm: PLM, sizes: Sizes) -> int:
    """Estimate the memory of both processes while training, without the libraries and an engine of its own."""
    head = plm.head()
    held = plm.model.parameters() if isinstance(plm, LocalPLM) else [head.weight]
    weights: int = sum(p.numel() * p.element_size() for p in held)
    settings = {**stages.method.implied, **stages.method.settings()}
    rows: int = settings.get("batch_size", 0)
    if not stages.method.needs.gradients:
        return weights + (head.vocabulary_size * (head.d + 3 * rows) * FLOAT if rows else 0)
    numbers: int = sum(p.numel() for p in plm.model.parameters())
    layers: int = plm.model.config.get_text_config().num_hidden_layers
    tokens = rows * (sizes.prompts + sizes.targets) / sizes.examples
    logits = rows * sizes.targets / sizes.examples * head.vocabulary_size * 3
    copies = 4 if isinstance(stages.method, FullFineTuning) else 1
    return weights + math.ceil((copies * numbers + tokens * layers * head.d * ACTIVATIONS + logits) * FLOAT)


def _generation(sizes: Sizes, speed: Speed, batch_size: int) -> float:
    batches = math.ceil(sizes.examples / batch_size)
    return batches * sizes.targets / sizes.examples * speed.step
