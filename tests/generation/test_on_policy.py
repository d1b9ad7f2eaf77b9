import pytest
import torch
from test_copying_generation import FRAME, make, slow

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.errors import ConfigError, DataError, MismatchError
from pema.generation.on_policy import ROWS, OnPolicy
from pema.memory.build import FollowsPolicy

PROMPTS = [[1, 7, 40, 90, 91, 5], [1, 7, 60, 61, 62, 63, 64, 5], [1, 7, 40, 90, 91, 5], [1, 7, 33, 5]]
STEPS = [6, 3, 4, 8]


class Recorded:
    """A PLM that records the sequence of every context that it represents in a session."""

    def __init__(self, plm):
        self.plm, self.sequences, self.open = plm, [], 0

    def __getattr__(self, name):
        return getattr(self.plm, name)

    def open_session(self, prompts):
        self.open += 1
        return RecordedSession(self, self.plm.open_session(prompts), [tuple(prompt) for prompt in prompts])


class RecordedSession:
    def __init__(self, plm, session, rows):
        self.plm, self.session, self.rows = plm, session, rows
        plm.sequences += rows

    @property
    def representations(self):
        return self.session.representations

    def advance(self, tokens, parents=None):
        parents = range(len(self.rows)) if parents is None else parents
        self.session.advance(tokens, parents)
        self.rows = [(*self.rows[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        self.plm.sequences += self.rows

    def close(self):
        self.plm.open -= 1
        self.session.close()


def ended(tokens, ends):
    """The tokens up to the first end-of-sequence token, which is included."""
    cut = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: cut + 1]


@pytest.mark.parametrize("family", ["llama", "opt-projected", "gemma2", "cohere"])
def test_the_contexts_are_those_of_the_slow_loop(tiny_plm, family):
    plm, adapter = make(tiny_plm, family)
    ends = plm.description.eos_token_ids
    answers = {answer.index: answer for answer in OnPolicy(plm, adapter).predict(PROMPTS, STEPS)}
    assert sorted(answers) == [0, 1, 2, 3]
    copied = 0
    for i, (prompt, steps) in enumerate(zip(PROMPTS, STEPS, strict=True)):
        written = ended(slow(plm, adapter, Constant(1.0), prompt, steps)[0], ends)
        assert answers[i].generated.tolist() == written
        expected = next(iter(plm.represent([[*prompt, *written]], [len(prompt)]))).representations
        torch.testing.assert_close(answers[i].representations, expected, atol=1e-4, rtol=1e-3)
        copied += len(set(written) & set(prompt[FRAME[0] : -FRAME[1]]))
    assert copied


def test_a_text_ends_with_its_end_of_sequence(tiny_plm):
    plm, adapter = make(tiny_plm)
    written = slow(plm, adapter, Constant(1.0), PROMPTS[0], 6)[0]
    object.__setattr__(plm.description, "eos_token_ids", (written[2],))
    answer = next(iter(OnPolicy(plm, adapter).predict(PROMPTS[:1], [6])))
    assert answer.generated.tolist() == ended(written, [written[2]])
    assert len(answer.representations) == len(answer.generated) < 6


@pytest.mark.parametrize("tap", ["head_input", "norm_input"])
@pytest.mark.parametrize("vocabulary", ["full", "seen"])
def test_an_adapter_that_does_not_copy_chooses_its_most_probable_token(tiny_plm, tap, vocabulary):
    plm = tiny_plm("llama", tap=tap)
    head, seen = plm.head(), torch.tensor([2, 9, 40, 41, 90, 300])
    config = AdapterConfig(d=head.d, vocabulary_size=head.vocabulary_size, rank=8, vocabulary=vocabulary)
    adapter = Adapter(config, seen if vocabulary == "seen" else None, seed=3)
    for answer in OnPolicy(plm, adapter).predict(PROMPTS, STEPS):
        log_p = adapter.log_probs(head.normalise(answer.representations), head)
        assert answer.generated.tolist() == log_p.argmax(-1).tolist()


def test_equal_prompts_are_sent_once_and_skipped_ones_never(tiny_plm):
    plm, adapter = make(tiny_plm)
    recorded = Recorded(plm)
    policy = OnPolicy(recorded, adapter)
    whole = {answer.index: answer for answer in policy.predict(PROMPTS, STEPS)}
    assert recorded.open == 0
    assert len(recorded.sequences) == len(set(recorded.sequences))
    sent = {(*PROMPTS[i], *whole[i].generated[:n].tolist()) for i in whole for n in range(len(whole[i].generated))}
    assert set(recorded.sequences) == sent
    recorded.sequences.clear()
    part = {answer.index: answer for answer in policy.predict(PROMPTS, STEPS, batch_tokens=1, skip=frozenset([0, 3]))}
    assert sorted(part) == [1, 2]
    assert tuple(PROMPTS[3]) not in recorded.sequences
    assert all(torch.equal(part[i].generated, whole[i].generated) for i in part)


def test_many_prompts_are_decoded_in_several_sessions(tiny_plm):
    plm, adapter = make(tiny_plm)
    prompts = [[1, 7, 20 + i, 5] for i in range(ROWS + 1)]
    counts = []
    recorded = Recorded(plm)
    recorded.open_session = lambda prompts: counts.append(len(prompts)) or plm.open_session(prompts)
    assert len(list(OnPolicy(recorded, adapter).predict(prompts, [1] * len(prompts)))) == ROWS + 1
    assert counts == [ROWS, 1]


def test_what_it_is(tiny_plm):
    plm, adapter = make(tiny_plm)
    policy = OnPolicy(plm, adapter)
    assert isinstance(policy, FollowsPolicy)
    assert not isinstance(plm, FollowsPolicy)
    assert policy.policy == OnPolicy(plm, make(tiny_plm)[1]).policy
    assert policy.policy != OnPolicy(plm, make(tiny_plm, seed=2)[1]).policy
    with pytest.raises(ConfigError, match="contexts='teacher' with an adapter"):
        policy.represent([[1, 2, 3]], [1])
    with pytest.raises(DataError, match="prompt 0 has 0 steps"):
        next(policy.predict(PROMPTS, [0] * 4))
    with pytest.raises(MismatchError, match=r"\(d, V\)"):
        OnPolicy(tiny_plm("opt-projected"), adapter)


@pytest.mark.parametrize("vocabulary", ["seen", "own"])
def test_the_tokens_are_the_likeliest_of_the_adapters_vocabulary(tiny_plm, vocabulary):
    plm = tiny_plm("llama")
    head, tokens = plm.head(), torch.arange(5, 200, 3)
    config = AdapterConfig(d=head.d, vocabulary_size=head.vocabulary_size, rank=8, vocabulary=vocabulary)
    adapter, random = Adapter(config, tokens, seed=1).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    (answer,) = OnPolicy(plm, adapter).predict(PROMPTS[:1], [6])
    likeliest = adapter.log_probs(head.normalise(answer.representations.float()), head).argmax(-1)
    assert answer.generated.tolist() == likeliest.tolist()
    assert set(likeliest.tolist()) <= set(tokens.tolist())
