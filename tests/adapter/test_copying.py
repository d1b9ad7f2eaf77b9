import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memories import make_head, make_memory, rows
from torch.nn.functional import gelu, rms_norm

from pema.adapter import joint, training
from pema.adapter.card import card
from pema.adapter.config import MATCHES, USES, WINDOW, AdapterConfig
from pema.adapter.copying import NEVER, context_tokens, copyable, shifted
from pema.adapter.fitted import fit_schedule
from pema.adapter.likelihood import log_p_pema
from pema.adapter.loss import CrossEntropy, JointLoss
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.errors import AdapterError, ConfigError, ExternalMemoryError, MismatchError
from pema.evaluation.perplexity import perplexity
from pema.files import read_json, write_json
from pema.memory.prompts import BLANK
from pema.memory.shard import ShardFile
from pema.tasks.spelling import Spelling

V, D, K = 40, 12, 6
FRAME = (2, 1)


def speller(tokens):
    """Two tokens from one that 3 divides are spelled as the next but one; a token alone as the next."""
    found = []
    for i, token in enumerate(tokens):
        span = min(2, len(tokens) - i) if token % 3 == 0 else 0
        found.append(Spelling(token + span, span) if span else Spelling(BLANK, 0))
    return found


def make_adapter(seed=0, **changes):
    values = {"d": D, "vocabulary_size": V, "rank": 8, "residual": True, "activation": "gelu", "copy_width": K}
    adapter = Adapter(AdapterConfig(**values | {"frame": FRAME} | changes), seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    return adapter.eval()


def slow(adapter, head, f, prompt, written):
    """log P_PEMA of every token at one context, one candidate at a time, as the class says it."""
    copying, W = adapter.copying, head.weight
    norm = lambda x: rms_norm(x, (D,))  # noqa: E731
    spelled = speller(prompt)
    inner = prompt[FRAME[0] : len(prompt) - FRAME[1]]
    spelled = spelled[FRAME[0] : len(prompt) - FRAME[1]]
    spelled = [s if i + s.span <= len(inner) else Spelling(BLANK, 0) for i, s in enumerate(spelled)]
    e = W[written[-1]] if written else torch.zeros(D)
    q = copying.mix @ gelu(copying.query @ torch.cat((norm(f), norm(e))) + copying.query_bias)
    scores, tokens, matches = [], [], []
    for kind in (0, 1):
        for j, x in enumerate(inner):
            token = x if kind == 0 else spelled[j].token
            if token == BLANK:
                continue

            # The written tokens that precede j: the first of them may be a spelling that ends where the next begins.
            def agrees(n, j=j):
                exact = all(j - i >= 0 and inner[j - i] == written[-i] for i in range(1, n))
                start = j - n + 1
                first = start - 1 >= 0 and inner[start - 1] == written[-n]
                ends = any(i + s.span == start and s.token == written[-n] for i, s in enumerate(spelled) if s.span)
                return exact and (first or ends)

            match = 0
            while match < min(MATCHES - 1, len(written)) and agrees(match + 1):
                match += 1
            use = min(sum(w in (x, spelled[j].token) for w in written), USES - 1)
            key = torch.zeros(K)
            for o, offset in enumerate(WINDOW):
                if 0 <= j + offset < len(inner):
                    key = key + copying.keys_of[o] @ norm(W[inner[j + offset]])
            score = q @ (key / math.sqrt(K) + copying.match[match] + copying.use[use] + copying.kind[kind])
            score = (
                score + copying.alpha[kind] * (f @ W[token]) / 4 + copying.match_score[match] + copying.use_score[use]
            )
            scores.append(score)
            tokens.append(token)
            matches.append(match)
    log_vocabulary = head.logits(adapter(f[None]))[0].log_softmax(-1)
    if not scores:
        return log_vocabulary
    p = torch.stack(scores).softmax(0)
    gate = copying.gate @ q + copying.gate_match[max(matches)] + copying.gate_scores[0] * (p * p.log()).sum()
    g = torch.sigmoid(gate + copying.gate_scores[1] * max(scores) / 10)
    total = (1 - g) * log_vocabulary.exp()
    for token, share in zip(tokens, p, strict=True):
        total[token] += g * share
    return total.log()


CONTEXTS = [
    ([1, 8, 12, 13, 20, 30, 31, 9], []),
    ([1, 8, 12, 13, 20, 30, 31, 9], [14]),
    ([1, 8, 12, 13, 20, 30, 31, 9], [5, 14, 20]),
    ([1, 8, 20, 21, 22, 20, 21, 9], [20, 21, 22]),
    ([1, 8, 20, 21, 22, 23, 24, 9], [20, 21, 22, 23]),
    ([1, 8, 9], [4]),
    ([1, 8, 33, 9], [34, 34, 34]),
]


@torch.no_grad()
def test_the_distribution_is_that_of_the_slow_loop():
    head, adapter = make_head(D, V), make_adapter()
    f = torch.randn(len(CONTEXTS), D, generator=torch.Generator().manual_seed(3))
    prompts, written = zip(*CONTEXTS, strict=True)
    context = context_tokens(speller, prompts, written, FRAME)
    found = adapter.log_probs(f, head, context)
    expected = torch.stack([slow(adapter, head, f[i], *CONTEXTS[i]) for i in range(len(CONTEXTS))])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(CONTEXTS)))
    targets = torch.tensor([13, 20, 30, 20, 24, 5, 33])
    found = log_p_pema(adapter, head, f, targets, context).float()
    torch.testing.assert_close(found, expected.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(10, 16), min_size=0, max_size=7), min_size=1, max_size=4),
    written=st.lists(st.integers(10, 18), max_size=6),
    seed=st.integers(0, 9),
)
def test_a_context_does_not_depend_on_its_batch(prompts, written, seed):
    head, adapter = make_head(D, V), make_adapter(seed)
    prompts = [[1, 8, *prompt, 9] for prompt in prompts]
    texts = [written[: len(written) - i] for i in range(len(prompts))]
    f = torch.randn(len(prompts), D, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        together = adapter.log_probs(f, head, context_tokens(speller, prompts, texts, FRAME))
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            alone = adapter.log_probs(f[i : i + 1], head, context_tokens(speller, [prompt], [text], FRAME))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone[0], slow(adapter, head, f[i], prompt, text), atol=1e-3, rtol=1e-3)


def test_shifted():
    x = torch.tensor([[1, 2, 3]])
    assert shifted(x, 0, 9).tolist() == [[1, 2, 3]]
    assert shifted(x, 1, 9).tolist() == [[2, 3, 9]]
    assert shifted(x, -2, 9).tolist() == [[9, 9, 1]]
    assert shifted(x, 3, 9).tolist() == [[9, 9, 9]]


def test_forced_copies_do_not_teach_the_vocabulary():
    head, adapter = make_head(D, V), make_adapter()
    prompts, written = zip(*CONTEXTS, strict=True)
    context = context_tokens(speller, prompts, written, FRAME)
    f = torch.randn(len(CONTEXTS), D)
    loss = JointLoss(CrossEntropy(head), 0.0, head.weight)
    targets = torch.tensor([13, 20, 30, 20, 24, 5, 33])
    copied = adapter.copy(f, context, head.weight)
    expected = copied.log_p(targets)
    is_copy = expected > NEVER / 2
    assert is_copy.tolist() == [True, True, True, True, True, False, True]
    expected[5] = copied.log_rest[5] + head.logits(adapter(f[5:6])).log_softmax(-1)[0, 5]
    total = loss(adapter, f, targets, context=context, forced=True).total
    torch.testing.assert_close(total, -expected.mean(), atol=1e-5, rtol=1e-5)
    total = loss(adapter, f, targets, context=context).total
    torch.testing.assert_close(
        total, -log_p_pema(adapter, head, f, targets, context).float().mean(), atol=1e-5, rtol=1e-5
    )
    targets[5], adapter.A.grad = 33, None
    keep = [i for i in range(len(CONTEXTS)) if i != 5]
    context = context_tokens(speller, [prompts[i] for i in keep], [written[i] for i in keep], FRAME)
    loss(adapter, f[keep], targets[keep], context=context, forced=True).total.backward()
    assert adapter.B_pd.grad is None or not adapter.B_pd.grad.any()
    assert adapter.copying.query.grad.any()


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("copying") / "memory", examples=160, prompts=True)


SETTINGS = {"epochs": 12, "batch_size": 64, "learning_rate": 3e-3, "precision": "float32", "rank": 16, "dropout": 0.0}


def test_training_teaches_to_copy(memory, tmp_path):
    adapter, figures = train(memory, preset("best", copy_width=16, **SETTINGS), tmp_path / "copy")
    _, plain = train(memory, preset("residual", **SETTINGS), tmp_path / "plain")
    assert adapter.config.frame == (2, 1)
    # The targets follow from the prompt only: the representations are noise.
    assert figures["held_out_cross_entropy"] < 0.5 * plain["held_out_cross_entropy"]
    _, held_out = memory.split(0.1, 0)
    head = memory.head()
    loaded = Adapter.from_pretrained(tmp_path / "copy")
    assert perplexity(held_out, head, loaded) == pytest.approx(math.exp(figures["held_out_cross_entropy"]), rel=1e-4)
    assert loaded.config.fitted == adapter.config.fitted == fit_schedule(loaded, head, held_out)
    assert min(adapter.config.fitted.values) > 0.9


def test_the_tokens_of_a_memory_are_those_of_its_contexts(memory):
    prompts = memory.prompts
    assert prompts.frame == (2, 1)
    batch = next(memory.view().batches(10_000, shuffle_seed=1))
    found = prompts.at(batch.rows, (2, 1))
    _, targets = rows(memory.view())
    for i in range(0, len(batch.rows), 17):
        row, step = int(batch.rows[i]), int(batch.steps[i])
        assert targets[row] == batch.targets[i]
        written = found.written[i]
        assert written[written != BLANK].tolist() == targets[row - step : row].tolist()
        assert (written[-step:] if step else written[:0]).tolist() == targets[row - step : row].tolist()
        words = torch.where(found.spans[i] > 0, found.spellings[i], found.prompt[i])
        assert batch.targets[i] == words[step % 6]
    assert found.prompt.shape[1] == 6
    assert prompts.at(batch.rows[:3], (8, 8)).prompt.tolist() == [[BLANK]] * 3


def test_a_memory_without_prompts_cannot_teach_to_copy(tmp_path):
    memory = make_memory(tmp_path / "memory")
    with pytest.raises(ExternalMemoryError, match=r"does not contain its prompts.*or train with --preset residual"):
        train(memory, preset("best"), tmp_path / "adapter")
    train(memory, preset("residual", epochs=1), tmp_path / "adapter")


def test_a_copying_adapter_needs_the_tokens_of_the_contexts():
    head, adapter = make_head(D, V), make_adapter()
    with pytest.raises(AdapterError, match="copies tokens of the prompt: give the tokens of the contexts, and W_hd"):
        adapter.log_probs(torch.zeros(1, D), head)


def test_the_config_names_the_shapes_of_copying():
    adapter = make_adapter()
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter.copying.named_parameters()}
    assert adapter.config.copying_shapes == shapes
    plain = AdapterConfig(d=D, vocabulary_size=V, rank=4)
    assert not plain.copying_shapes
    assert not {"copy_width", "frame"} & plain.to_dict().keys()
    assert AdapterConfig.from_dict(adapter.config.to_dict()) == adapter.config
    with pytest.raises(ConfigError, match="frame"):
        AdapterConfig(d=D, vocabulary_size=V, rank=4, frame=(1,))


def test_a_resumed_training_is_an_unbroken_one(memory, tmp_path, monkeypatch):
    config = preset("best", copy_width=8, **SETTINGS | {"epochs": 3, "dropout": 0.2, "checkpoint_every": 2})
    train(memory, config, tmp_path / "whole")
    steps = joint.JointRun.step

    def step(run, *given):
        if run.state.step == 7:
            raise KeyboardInterrupt
        return steps(run, *given)

    monkeypatch.setattr(joint.JointRun, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(memory, config, tmp_path / "broken")
    monkeypatch.undo()
    train(memory, config, tmp_path / "broken", resume=True)
    names = "adapter_model.safetensors"
    assert (tmp_path / "broken" / names).read_bytes() == (tmp_path / "whole" / names).read_bytes()


def test_files_of_earlier_versions_do_not_copy(memory, tmp_path):
    """They lack the setting: such a run can be resumed, and such an adapter is returned as it is."""
    config = preset("residual", **SETTINGS | {"epochs": 1})
    adapter, _ = train(memory, config, tmp_path / "adapter")
    values = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert not {"copy_width", "frame"} & values["pema"].keys()
    del values["pema"]["training"]["settings"]["copy_width"]
    write_json(tmp_path / "adapter" / "adapter_config.json", values)
    again, _ = train(memory, config, tmp_path / "adapter", resume=True)
    assert torch.equal(again.A, adapter.A)
    with pytest.raises(MismatchError, match="was made with copy_width=0, this run has copy_width=16"):
        train(memory, preset("best", copy_width=16, **SETTINGS | {"epochs": 1}), tmp_path / "adapter", resume=True)


def test_the_share_of_targets_that_can_be_copied(tmp_path, monkeypatch):
    half = make_memory(tmp_path / "half", examples=40, prompts=True)
    tokens, (_, listed) = half.prompts.at(torch.arange(half.pairs), half.prompts.frame), rows(half.view())
    candidates = [{*a.tolist(), *b.tolist()} for a, b in zip(tokens.prompt, tokens.spellings, strict=True)]
    assert copyable(half) == sum(int(y) in c for y, c in zip(listed, candidates, strict=True)) / half.pairs
    # Every second target becomes one that no prompt holds.
    assert not any(V - 1 in c for c in candidates)
    before, read = copyable(half), ShardFile.targets

    def every_second(shard, start, stop):
        targets = read(shard, start, stop).copy()
        targets[::2] = V - 1
        return targets

    monkeypatch.setattr(ShardFile, "targets", every_second)
    assert copyable(half) == pytest.approx(before / 2, abs=0.02)


def test_nothing_is_copied_where_few_targets_can_be(memory, tmp_path, capsys, monkeypatch):
    config = preset("best", **SETTINGS | {"epochs": 1, "copy_width": 8})
    monkeypatch.setattr(training, "copyable", lambda of: config.copy_least)
    kept, _ = train(memory, config, tmp_path / "kept")
    assert kept.copying is not None
    assert "copying" not in capsys.readouterr().err
    monkeypatch.setattr(training, "copyable", lambda of: 0.19)
    left, _ = train(memory, config, tmp_path / "left")
    assert left.copying is None
    plain, _ = train(memory, preset("residual", **SETTINGS | {"epochs": 1}), tmp_path / "plain")
    assert torch.equal(left.A, plain.A)
    assert torch.equal(left.B_pd, plain.B_pd)
    said = "copying is left out: 19% of the target tokens occur in their prompts, below copy_least=0.2."
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_card_says_that_it_copies():
    adapter = make_adapter()
    assert "copies from the prompt (width 6)" in card(adapter.config)
    assert "copies" not in card(AdapterConfig(d=D, vocabulary_size=V, rank=4))
