import pytest
from fake_plm import EOS, FakePLM, FakeTask, build, f, g, some_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, ExternalMemoryError, MismatchError
from pema.memory.merge import merge
from pema.memory.pairing import MATCH, NO_TARGET, agreeing, align, match, pair
from pema.memory.planning import steps_for
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.owner.contract import STEP_BUCKET

tokens = st.lists(st.integers(0, 3), max_size=9)


def distance(a, b):
    """Edit distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def table_distance(a, b):
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return table[len(a), len(b)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=4), st.lists(st.integers(0, 2), max_size=4))
def test_the_slow_distance_is_the_edit_distance(a, b):
    assert table_distance(a, b) == distance(a, b)


@settings(deadline=None)
@given(tokens.filter(bool), tokens.filter(bool))
def test_align_finds_the_nearest_gold_prefix_and_the_longest_of_them(generated, gold):
    import numpy as np

    found = align(np.array(generated), np.array(gold))
    for i, j in enumerate(found):
        distances = [table_distance(generated[:i], gold[:k]) for k in range(len(gold))]
        assert j == max(k for k in range(len(gold)) if distances[k] == min(distances))


def test_aligned_targets_of_worked_examples():
    gold = [5, 6, 7, 8, EOS]
    assert list(pair(gold, gold, "aligned")) == gold
    # 6 was left out: behind 5 7 the gold text goes on with 8.
    assert list(pair(gold, [5, 7, 8, EOS], "aligned")) == [5, 6, 8, EOS]
    # 9 was put in: nothing of the gold text is skipped for it.
    assert list(pair(gold, [5, 9, 6, 7], "aligned")) == [5, 6, 7, 7]
    # A text that runs on is to end.
    assert list(pair(gold, [5, 6, 7, 8, 8, 8], "aligned"))[4:] == [EOS, EOS]


@settings(deadline=None)
@given(tokens.filter(bool), tokens.filter(bool))
def test_position_stops_at_the_shorter_end(generated, gold):
    assert list(pair(gold, generated, "position")) == gold[: len(generated)]
    assert list(pair(gold, None, "position")) == gold


@pytest.mark.parametrize(
    ("contexts", "targets"), [("teacher", "position"), ("predicted", "position"), ("predicted", "aligned")]
)
def test_a_memory_holds_the_pairs_of_an_obvious_loop(tmp_path, contexts, targets):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, contexts=contexts, targets=targets, dtype="float32")
    expected = []
    for encoded in FakeTask().template.encode(None, examples):
        context, t, generated = list(encoded.prompt), 0, []
        longest = steps_for(len(encoded.target), targets)
        while True:
            if targets == "aligned":
                gold = range(len(encoded.target))
                nearest = min(gold, key=lambda j: (table_distance(generated, encoded.target[:j]), -j))
                y = encoded.target[nearest]
            else:
                y = encoded.target[t]
            expected.append((f(context), y, t, encoded.source_length))
            chosen = encoded.target[t] if contexts == "teacher" else g(context)
            context.append(chosen)
            generated.append(chosen)
            t += 1
            if (targets == "position" and t == len(encoded.target)) or t == longest or chosen == EOS:
                break
    (batch,) = memory.view().batches(10_000)
    assert memory.pairs == len(expected) == len(batch.targets)
    for k, (representation, y, t, source_length) in enumerate(expected):
        assert batch.representations[k].equal(representation)
        assert (batch.targets[k], batch.steps[k], batch.source_lengths[k]) == (y, t, source_length)


def test_only_prompts_cross_the_boundary_in_predicted_mode(tmp_path):
    plm = FakePLM()
    examples = some_examples(8)
    build(tmp_path / "m", examples, plm=plm, contexts="predicted")
    ((kind, prompts, steps),) = plm.calls
    encoded = FakeTask().template.encode(None, examples)
    assert kind == "predict"
    assert prompts == [one.prompt for one in encoded]
    assert all(asked % STEP_BUCKET == 0 and asked >= len(one.target) for asked, one in zip(steps, encoded, strict=True))


def lcs(a, b):
    """Length of the longest common subsequence by its definition."""
    if not a or not b:
        return 0
    return lcs(a[:-1], b[:-1]) + 1 if a[-1] == b[-1] else max(lcs(a[:-1], b), lcs(a, b[:-1]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_match_finds_the_best_prefix_that_ends_with_the_last_token(generated, gold):
    import numpy as np

    places = match(np.array(generated), np.array(gold))
    assert places[0] == 0
    for i in range(1, len(generated)):
        scores = [MATCH * lcs(generated[:i], gold[:j]) - j for j in range(len(gold))]
        pairs = {
            j: MATCH * (lcs(generated[: i - 1], gold[: j - 1]) + 1) - j
            for j in range(1, len(gold))
            if gold[j - 1] == generated[i - 1]
        }
        best = [j for j, score in pairs.items() if score == max(scores)]
        assert places[i] == min(best, default=-1)


def test_matched_targets_of_worked_examples():
    gold, none = [5, 6, 7, 8, EOS], NO_TARGET
    assert list(pair(gold, gold, "matched")) == gold
    # 6 was left out: after 5 7 the gold text goes on with 8.
    assert list(pair(gold, [5, 7, 8, EOS], "matched")) == [5, 6, 8, EOS]
    # 9 was put in: nothing of the gold text says how it goes on.
    assert list(pair(gold, [5, 9, 6, 7], "matched")) == [5, 6, none, 7]
    # A text that runs on was to end.
    assert list(pair(gold, [5, 6, 7, 8, 9, 9], "matched")) == [*gold, none]
    # A far token is not reached for one match alone.
    far = [5, *range(20, 30), 6, EOS]
    assert list(pair(far, [5, 6, 7], "matched")) == [5, 20, none]


def test_contexts_without_a_target_are_stored_and_not_read(tmp_path):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, contexts="predicted", targets="matched", dtype="float32")
    aligned = build(tmp_path / "aligned", examples, contexts="predicted", targets="aligned", dtype="float32")
    stored = [target for shard in memory.shards for target in shard.targets(0, shard.entry.pairs).tolist()]
    assert len(stored) == memory.pairs == aligned.pairs
    assert NO_TARGET in stored
    (whole,) = aligned.view().batches(10_000)
    rows = [k for k, target in enumerate(stored) if target != NO_TARGET]
    for size in (1, 7, 10_000):
        batches = list(memory.view().batches(size))
        assert [target for batch in batches for target in batch.targets.tolist()] == [stored[k] for k in rows]
        assert [row for batch in batches for row in batch.rows.tolist()] == rows
        found = [representation for batch in batches for representation in batch.representations]
        assert all(f.equal(whole.representations[k]) for f, k in zip(found, rows, strict=True))
    shuffled = sorted(row for batch in memory.view().batches(7, shuffle_seed=3) for row in batch.rows.tolist())
    assert shuffled == rows
    assert memory.view().targets_seen().tolist() == sorted({stored[k] for k in rows})
    for name, targets in (("other", "aligned"), ("teacher", "position")):
        contexts = "teacher" if name == "teacher" else "predicted"
        with pytest.raises(MismatchError, match=r"was built with (targets|contexts)"):
            build(tmp_path / "m", examples, contexts=contexts, targets=targets, dtype="float32", append=True)
    with pytest.raises(ConfigError, match="targets='matched' requires contexts='predicted'"):
        build(tmp_path / "t", targets="matched")


def test_aligned_targets_need_predicted_contexts(tmp_path):
    with pytest.raises(ConfigError, match="targets='aligned' requires contexts='predicted'"):
        build(tmp_path / "m", targets="aligned")
    assert not (tmp_path / "m").exists()


def test_agreement_of_worked_examples():
    gold = [5, 6, 7, 8, EOS]
    assert agreeing(gold, gold) == 5
    assert agreeing(gold, [1, 1, 1, 1]) == 0
    # The PLM leaves 6 out; behind it, it goes on as the gold text does.
    assert agreeing(gold, [5, 7, 8, EOS]) == 3
    # Behind 5 9 the nearest gold prefix is 5 6, whose 6 is over.
    assert agreeing(gold, [5, 9, 6, 7]) == 2


@settings(deadline=None)
@given(tokens.filter(bool), tokens.filter(bool))
def test_agreement_counts_the_aligned_pairs_whose_target_the_plm_generated(generated, gold):
    paired = pair(gold, generated, "aligned")
    assert agreeing(gold, generated) == sum(y == g for y, g in zip(paired, generated, strict=True))


def agreements(examples):
    """(pairs that agree, pairs) of aligned targets, by a loop over the examples."""
    counts = []
    for encoded in FakeTask().template.encode(None, examples):
        text = list(encoded.prompt)
        for _ in range(steps_for(len(encoded.target), "aligned")):
            text.append(g(text))
            if text[-1] == EOS:
                break
        generated = text[len(encoded.prompt) :]
        counts.append((agreeing(encoded.target, generated), len(pair(encoded.target, generated, "aligned"))))
    return tuple(sum(column) for column in zip(*counts, strict=True))


def test_a_memory_of_predicted_contexts_says_how_far_the_plm_agrees(tmp_path, capsys):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, contexts="predicted", targets="aligned")
    agree, pairs = agreements(examples)
    assert memory.pairs == pairs
    assert memory.manifest.agreement == agree / pairs < 0.15
    said = " ".join(capsys.readouterr().err.split())
    first = memory.manifest.shards[0]
    assert f"agree with the targets on {first.agreeing / first.pairs:.0%} of their tokens" in said
    assert "build with teacher contexts" in said
    other = build(tmp_path / "n", 5, contexts="predicted", targets="aligned")
    both = merge([memory.path, other.path], tmp_path / "b").manifest
    assert both.agreement == pytest.approx(
        (memory.manifest.agreement * memory.pairs + other.manifest.agreement * other.pairs) / both.pairs
    )
    assert sample(memory.path, tmp_path / "s", 30).manifest.agreement is None


def test_teacher_contexts_have_no_agreement_and_no_warning(tmp_path, capsys):
    memory = build(tmp_path / "m", 20)
    assert memory.manifest.agreement is None
    assert "agreeing" not in (tmp_path / "m" / "manifest.json").read_text()
    assert "agree" not in capsys.readouterr().err


def test_a_plm_that_says_the_targets_itself_is_not_warned_of(tmp_path, capsys):
    class Copying(FakePLM):
        def predict(self, prompts, steps, **options):
            self.target = iter(encoded.target for encoded in FakeTask().template.encode(None, some_examples(8)))
            return super().predict(prompts, steps, **options)

        def _answers(self, answers):
            from dataclasses import replace

            import torch

            for (prompt, answer), target in zip(answers, self.target, strict=True):
                text = torch.tensor(target)
                rows = torch.stack([f([*prompt, *target[:k]]) for k in range(len(target))])
                yield replace(answer, representations=rows, generated=text)

    memory = build(tmp_path / "m", 8, plm=Copying(), contexts="predicted")
    assert memory.manifest.agreement == 1.0
    assert "agree" not in capsys.readouterr().err


@pytest.mark.parametrize(("contexts", "agreeing"), [("predicted", 10_000), ("teacher", 1)])
def test_an_impossible_agreement_is_refused(tmp_path, contexts, agreeing):
    from dataclasses import replace

    from fake_plm import rewrite

    memory = build(tmp_path / "m", 8, contexts=contexts)
    shard = replace(memory.manifest.shards[0], agreeing=agreeing)
    rewrite(tmp_path / "m", shards=(shard,))
    with pytest.raises(ExternalMemoryError, match=r"shards\[0\].agreeing=.* is impossible with .* pairs of"):
        Memory.open(tmp_path / "m")
