"""The inspector's data: the library's own generation, and both exact distributions."""

import math
from dataclasses import replace

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter
from pema.errors import ConfigError, DataError, MismatchError
from pema.generation.decoding import generate
from pema.generation.mixture import mix
from pema.generation.plugin import attach
from pema.owner.mask import Mask, MaskedPLM
from pema.pages.inspector.inspection import inspect_generation
from pema.tasks.registry import Task
from pema.tasks.template import Template

TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCE = "a dog is here and the house is small"
SCHEDULES = [GradualUnrolling(0.9), Linear(0.7), Constant(0.5), Constant(1.0), Fitted((0.9, 0.1, 0.6)), NoAdapter()]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


def make_adapter(plm, kind, strength=0.5):
    tokens = torch.arange(2, 300, 3) if kind == "seen" else None
    config = AdapterConfig(
        d=plm.head().d,
        vocabulary_size=plm.head().vocabulary_size,
        rank=8,
        residual=kind == "gelu",
        activation="gelu" if kind == "gelu" else "none",
        vocabulary="full" if tokens is None else "seen",
        plm=plm.description,
    )
    adapter = Adapter(config, tokens, seed=1)
    torch.nn.init.normal_(adapter.B_pd, std=strength, generator=torch.Generator().manual_seed(1))
    return adapter


def generated_tokens(plm, adapter, schedule, limit):
    """The tokens of the model's own `generate` with the adapter plugged in."""
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, [SOURCE])
    ids = torch.tensor([prompt.prompt])
    with (
        attach(plm.model, adapter, plm.head(), schedule) as attached,
        attached.inputs(source_lengths=[prompt.source_length]),
    ):
        out = plm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, pad_token_id=0)
    return out[0, len(prompt.prompt) :].tolist()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.to_dict().get('value', '')}")
@pytest.mark.parametrize("kind", ["linear", "gelu", "seen"])
def test_the_tokens_are_those_of_generate(plm, kind, schedule):
    adapter = make_adapter(plm, kind)
    found = inspect_generation(plm, adapter, SOURCE, TASK, schedule, max_new_tokens=24)
    assert [step.token for step in found.steps] == generated_tokens(plm, adapter, schedule, 24)
    assert [found.output] == generate(plm, adapter, [SOURCE], TASK, schedule, max_new_tokens=24)
    length = torch.tensor([found.source_length])
    weights = [float(schedule.weights(torch.tensor([t]), length)) for t in range(len(found.steps))]
    assert [step.weight for step in found.steps] == pytest.approx(weights)


def test_schedules_and_adapters_matter_here(plm):
    texts = {
        inspect_generation(plm, make_adapter(plm, kind), SOURCE, TASK, schedule, max_new_tokens=24).output
        for kind in ("linear", "gelu", "seen")
        for schedule in SCHEDULES
    }
    assert len(texts) > 9


@pytest.mark.parametrize("tap", ["head_input", "norm_input"])
@pytest.mark.parametrize("family", ["gemma2", "opt-projected"])
def test_every_tap_and_head(tiny_plm, family, tap):
    plm = tiny_plm(family, tap=tap)
    adapter = make_adapter(plm, "linear")
    found = inspect_generation(plm, adapter, SOURCE, TASK, Constant(0.6), max_new_tokens=12)
    assert [step.token for step in found.steps] == generated_tokens(plm, adapter, Constant(0.6), 12)


def test_a_masked_plm(plm):
    masked = MaskedPLM(plm, Mask(bytes(range(32))))
    adapter = make_adapter(masked, "linear")
    found = inspect_generation(masked, adapter, SOURCE, TASK, Constant(0.6))
    assert [found.output] == generate(masked, adapter, [SOURCE], TASK, Constant(0.6))


def test_without_a_limit_it_is_the_default_one(plm):
    found = inspect_generation(plm, make_adapter(plm, "linear"), SOURCE, TASK, Constant(0.5))
    assert len(found.steps) == 2 * found.source_length + 16 or found.ended


def test_it_ends_after_the_end_of_sequence_token(tiny_plm):
    plm = tiny_plm("llama")
    adapter = make_adapter(plm, "seen")
    adapter.tokens = torch.tensor([2])
    adapter.config = replace(adapter.config, plm=plm.description)
    found = inspect_generation(plm, adapter, SOURCE, TASK, Constant(1.0))
    assert (len(found.steps), found.ended, found.output) == (1, True, "")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "seen"])
def test_both_distributions_as_they_are(plm, kind):
    """Against one forward pass over the whole text: what is kept, and what is said of everything else."""
    adapter = make_adapter(plm, kind)
    found = inspect_generation(plm, adapter, SOURCE, TASK, GradualUnrolling(0.9), max_new_tokens=8, candidates=20)
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, [SOURCE])
    tokens = [*prompt.prompt, *(step.token for step in found.steps)]
    ((_, represented),) = [(r.index, r.representations) for r in plm.represent([tokens], [len(prompt.prompt)])]
    f = represented.float()
    expected = {"plm": plm.head().logits(f).log_softmax(-1), "pema": adapter.log_probs(f, plm.head())}
    for t, step in enumerate(found.steps):
        kept = list(step.candidates)
        assert kept == sorted(set(kept))
        assert step.token in kept
        others = [token for token in range(plm.description.vocabulary_size) if token not in kept]
        for name, row in ((name, log_p[t]) for name, log_p in expected.items()):
            distribution = getattr(step, name)
            assert set(row.topk(20).indices.tolist()) <= set(kept) or row.topk(20).values.isinf().any()
            torch.testing.assert_close(torch.tensor(distribution.log_p), row[kept], atol=1e-4, rtol=0)
            assert distribution.rest_mass == pytest.approx(float(row[others].exp().sum()), abs=1e-5)
            assert distribution.rest_log_p == pytest.approx(float(row[others].max()), abs=1e-4)
        mixed = mix(expected["plm"][t], expected["pema"][t], torch.tensor(step.weight))
        assert set(mixed.topk(20).indices.tolist()) <= set(kept)


def test_candidates_that_are_the_whole_vocabulary_leave_nothing(plm):
    found = inspect_generation(
        plm, make_adapter(plm, "seen"), SOURCE, TASK, Constant(0.5), max_new_tokens=1, candidates=10**6
    )
    (step,) = found.steps
    assert len(step.candidates) == plm.description.vocabulary_size
    assert (step.plm.rest_mass, step.plm.rest_log_p) == (0, -math.inf)
    values = step.to_json()["pema"]
    assert values["rest_log_p"] is None
    assert sum(value is None for value in values["log_p"]) == len(step.candidates) - len(range(2, 300, 3))


class Failing:
    """A PLM whose session breaks at the second step."""

    def __init__(self, plm):
        self.description, self.tokenizer, self.head = plm.description, plm.tokenizer, plm.head
        self.plm, self.closed = plm, 0

    def open_session(self, prompts):
        session, outer = self.plm.open_session(prompts), self

        class Session:
            representations = session.representations

            def advance(self, tokens, parents=None):
                raise DataError("gone")

            def close(self):
                outer.closed += 1
                session.close()

        return Session()


def test_a_failure_closes_the_session(plm):
    failing = Failing(plm)
    with pytest.raises(DataError, match="gone"):
        inspect_generation(failing, make_adapter(plm, "linear"), SOURCE, TASK, Constant(0.5))
    assert failing.closed == 1


def test_bad_input_is_refused(plm, tiny_plm):
    adapter = make_adapter(plm, "linear")
    with pytest.raises(ConfigError, match="max_new_tokens=0 must be at least 1"):
        inspect_generation(plm, adapter, SOURCE, TASK, Constant(0.5), max_new_tokens=0)
    with pytest.raises(ConfigError, match="candidates=4 must be at least 5, the number that the page shows"):
        inspect_generation(plm, adapter, SOURCE, TASK, Constant(0.5), candidates=4)
    with pytest.raises(DataError, match="the source is blank"):
        inspect_generation(plm, adapter, " ", TASK, Constant(0.5))
    with pytest.raises(DataError, match="the PLM takes 128"):
        inspect_generation(plm, adapter, "a dog " * 200, TASK, Constant(0.5))
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        inspect_generation(tiny_plm("llama", seed=1), adapter, SOURCE, TASK, Constant(0.5))
