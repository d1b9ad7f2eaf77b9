import math
from dataclasses import dataclass

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, GradualUnrolling, NoAdapter
from pema.errors import ConfigError
from pema.evaluation.perplexity import perplexity, target_log_probs
from pema.memory.buffer import Batch
from pema.memory.build import build_memory
from pema.owner.head import Head
from pema.tasks.example import Example
from pema.tasks.registry import get_task

D, V, N = 6, 11, 40


@dataclass
class Pairs:
    """A view of pairs that lie in RAM."""

    f: torch.Tensor
    y: torch.Tensor
    steps: torch.Tensor
    lengths: torch.Tensor
    memory: None = None

    def batches(self, batch_size):
        for start in range(0, len(self.f), batch_size):
            rows = slice(start, start + batch_size)
            places = torch.arange(len(self.f))[rows]
            yield Batch(self.f[rows], self.y[rows], self.steps[rows], self.lengths[rows], places)


@pytest.fixture
def pairs():
    random = torch.Generator().manual_seed(0)
    f, y = torch.randn(N, D, generator=random), torch.randint(0, V - 1, (N,), generator=random)
    return Pairs(f, y, torch.arange(N) % 8, torch.randint(1, 9, (N,), generator=random))


@pytest.fixture
def head():
    random = torch.Generator().manual_seed(1)
    return Head(torch.randn(V, D, generator=random), torch.randn(V, generator=random), scale=0.7, soft_cap=5.0)


def adapter_of(vocabulary="full"):
    tokens = torch.arange(V - 1) if vocabulary == "seen" else None
    return Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=3, vocabulary=vocabulary), tokens, seed=2)


def slowly(pairs, head, adapter, schedule):
    """The definition, one pair at a time, with probabilities in place of logarithms."""
    total = 0.0
    for f, y, step, length in zip(pairs.f, pairs.y, pairs.steps, pairs.lengths, strict=True):
        p = torch.softmax(head.logits(f[None]).double(), -1)[0, y]
        if adapter is not None:
            p_pema = adapter.log_probs(f[None], head).double().exp()[0, y]
            weight = 1.0 if schedule is None else float(schedule.weights(step[None], length[None]))
            p = weight * p_pema + (1 - weight) * p
        total += math.log(p)
    return math.exp(-total / len(pairs.f))


@pytest.mark.parametrize("vocabulary", [None, "full", "seen"])
@pytest.mark.parametrize("schedule", [None, GradualUnrolling(0.9), Constant(0.4), NoAdapter()])
@pytest.mark.parametrize("rows", [16, 1000])
def test_equals_the_definition(pairs, head, vocabulary, schedule, rows, monkeypatch):
    monkeypatch.setattr("pema.evaluation.perplexity.LOGITS_BYTES", rows * 4 * V)
    adapter = None if vocabulary is None else adapter_of(vocabulary)
    if adapter is None and schedule is not None:
        with pytest.raises(ConfigError, match="give the adapter too"):
            perplexity(pairs, head, adapter, schedule)
        return
    with torch.no_grad():
        expected = slowly(pairs, head, adapter, schedule)
    assert perplexity(pairs, head, adapter, schedule) == pytest.approx(expected, rel=1e-5)


def test_known_answers(pairs, head):
    flat = Head(torch.zeros(V, D))
    assert perplexity(pairs, flat) == pytest.approx(V)
    assert perplexity(pairs, head, adapter_of(), NoAdapter()) == pytest.approx(perplexity(pairs, head))
    assert perplexity(pairs, head, adapter_of(), Constant(1.0)) == pytest.approx(perplexity(pairs, head, adapter_of()))


def test_a_token_that_the_adapter_never_saw_is_infinitely_surprising_to_it_alone(pairs, head):
    pairs.y[3] = V - 1
    assert perplexity(pairs, head, adapter_of("seen")) == math.inf
    assert math.isfinite(perplexity(pairs, head, adapter_of("seen"), Constant(0.9)))


def test_the_adapter_is_unchanged(pairs, head):
    adapter = adapter_of().train()
    perplexity(pairs, head, adapter)
    assert adapter.training
    perplexity(pairs, head, adapter.eval())
    assert not adapter.training
    assert not next(target_log_probs(pairs, head, adapter)).requires_grad


def test_no_pairs(pairs, head):
    none = Pairs(pairs.f[:0], pairs.y[:0], pairs.steps[:0], pairs.lengths[:0])
    with pytest.raises(ConfigError, match="needs pairs, and this view has none"):
        perplexity(none, head)


def test_of_a_memory_it_is_the_plms_own(tmp_path, tiny_plm):
    plm, task = tiny_plm(), get_task("translation")
    examples = [Example("the house", "das Haus"), Example("the dog is here", "der Hund ist hier")]
    memory = build_memory(plm, examples, task, tmp_path / "memory", dtype="float32")
    total = count = 0.0
    for encoded in task.template.encode(plm.tokenizer, examples):
        ids = torch.tensor([encoded.prompt + encoded.target])
        labels = torch.tensor([[-100] * len(encoded.prompt) + list(encoded.target)])
        with torch.no_grad():
            total += float(plm.model(input_ids=ids, labels=labels).loss) * len(encoded.target)
        count += len(encoded.target)
    assert perplexity(memory.view(), memory.head()) == pytest.approx(math.exp(total / count), rel=1e-4)
