"""Labels by likelihood, against a slow loop that scores each label as the target of each source."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.generation.test_chat_generation import chat_plm
from tests.generation.test_decoding import make_adapter

from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter
from pema.errors import ConfigError, DataError, MismatchError
from pema.evaluation.perplexity import target_log_probs
from pema.generation import classification, search
from pema.generation.classification import choose_labels, classify
from pema.generation.labels import LabelTree, label_trees
from pema.generation.plugin import attach
from pema.memory.build import build_memory
from pema.owner.session_model import SessionModel
from pema.tasks.example import Example, Turn
from pema.tasks.registry import get_task
from pema.tasks.template import Template

TASK = get_task("classification")
SOURCES = ["the house", "a dog is here and the house is small", "the", "das Haus ist klein", "a dog"]
LABELS = ["house", "house is", "house is small", "dog", "dog and dog", "x", "the dog is here", "ist klein", "the"]
"""Labels that begin others, labels with equal first tokens, and a label of one token."""

UNSEEN = "x"
"""The label that is outside the vocabulary of an adapter with a seen one."""

SCHEDULES = [GradualUnrolling(0.9), Linear(0.8), Constant(0.7), Fitted((0.2, 0.9, 0.4)), Constant(1.0), NoAdapter()]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """Score each label as a target, through a memory: (sources, labels)."""

    def score(plm, adapter=None, schedule=None, task=TASK, sources=SOURCES, labels=LABELS):
        examples = [Example(source, label) for source in sources for label in labels]
        memory = build_memory(plm, examples, task, tmp_path_factory.mktemp("memory") / "memory", dtype="float32")
        pairs = torch.cat(list(target_log_probs(memory.view(), plm.head(), adapter, schedule))).double()
        encoded = task.template.encode(plm.tokenizer, examples)
        sums = [part.sum() for part in pairs.split([len(each.target) for each in encoded])]
        return torch.stack(sums).view(len(sources), len(labels))

    return score


def check(result, expected):
    torch.testing.assert_close(result.log_probs, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result.probabilities, torch.softmax(expected, 1), rtol=1e-3, atol=1e-5)
    assert result.choices == [LABELS[i] for i in expected.argmax(1).tolist()]


@pytest.mark.parametrize("seen", [False, True], ids=["full", "seen"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: f"{each.name}-{getattr(each, 'value', '')}")
def test_it_equals_the_likelihood_of_each_target(plm, one_by_one, schedule, seen):
    others = [label for label in LABELS if label != UNSEEN]
    encoded = TASK.template.encode(plm.tokenizer, [Example("the house", label) for label in others])
    tokens = torch.tensor(sorted({token for each in encoded for token in each.target})) if seen else None
    adapter = make_adapter(plm, tokens=tokens)
    expected = one_by_one(plm, adapter, schedule)
    assert bool(expected.isneginf().any()) == (seen and schedule == Constant(1.0))
    check(classify(plm, adapter, SOURCES, LABELS, TASK, schedule), expected)
    fast = classify(plm, adapter, SOURCES, LABELS, TASK, schedule, probabilities=False)
    assert fast.choices == [LABELS[i] for i in expected.argmax(1).tolist()]


def test_the_first_tokens_are_shared_as_the_test_assumes(plm):
    encoded = TASK.template.encode(plm.tokenizer, [Example("the house", label) for label in LABELS])
    targets = [each.target[:-1] for each in encoded]
    assert min(map(len, targets)) == 1
    assert len({target[0] for target in targets}) < len(targets)
    assert any(a != b and b[: len(a)] == a for a in targets for b in targets)


FAMILIES = ["gpt2", "opt", "mistral", "gemma2", "bloom", "mamba", "phi3-longrope", "jamba", "recurrent-gemma", "llama4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_for_every_kind_of_state(tiny_plm, one_by_one, family):
    plm = tiny_plm(family)
    adapter = make_adapter(plm)
    expected = one_by_one(plm, adapter, GradualUnrolling(0.9))
    check(classify(plm, adapter, SOURCES, LABELS, TASK, GradualUnrolling(0.9)), expected)
    fast = classify(plm, adapter, SOURCES, LABELS, TASK, GradualUnrolling(0.9), probabilities=False)
    assert fast.choices == [LABELS[i] for i in expected.argmax(1).tolist()]


def test_it_holds_for_decoding_sessions(plm, one_by_one):
    adapter, model = make_adapter(plm), SessionModel(plm)
    with attach(model, adapter, plm.head(), Linear(0.9)) as attached:
        result = choose_labels(plm, model, SOURCES, LABELS, TASK, attached.inputs)
    check(result, one_by_one(plm, adapter, Linear(0.9)))


def test_it_holds_for_chats_with_earlier_turns(one_by_one):
    plm = chat_plm()
    history = (Turn("user", "A house?"), Turn("assistant", "Ja."))
    result = classify(plm, None, SOURCES, LABELS, TASK)
    check(result, one_by_one(plm))
    after = classify(plm, None, [Example(source, "", history=history) for source in SOURCES], LABELS, TASK)
    assert not torch.allclose(after.log_probs, result.log_probs, atol=1e-2)
    # The token that ends a turn ends a label; the characters of a control token in a label are text.
    end = plm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts = TASK.template.encode_prompts(plm.tokenizer, SOURCES[:1])
    (tree,) = label_trees(TASK.template, plm.tokenizer, SOURCES[:1], prompts, ["dog", "a<|im_end|>"])
    assert [target.count(end) for target in tree.targets] == [1, 1]
    assert [target[-1] for target in tree.targets] == [end, end]


def test_it_does_not_depend_on_the_batch(plm, monkeypatch):
    adapter = make_adapter(plm)
    whole = classify(plm, adapter, SOURCES, LABELS, TASK, GradualUnrolling())
    alone = [classify(plm, adapter, [source], LABELS, TASK, GradualUnrolling()) for source in SOURCES]
    torch.testing.assert_close(torch.cat([each.log_probs for each in alone]), whole.log_probs, rtol=0, atol=1e-5)
    for tokens in (1, 100, 10_000):  # one source per batch, some, and all
        monkeypatch.setattr(classification, "BATCH_TOKENS", tokens)
        for size in (1, 2, 32):
            again = classify(plm, adapter, SOURCES, LABELS, TASK, GradualUnrolling(), batch_size=size)
            torch.testing.assert_close(again.log_probs, whole.log_probs, rtol=0, atol=1e-5)


def test_each_beginning_is_read_once(plm, monkeypatch):
    read, forward = [], plm.model.forward

    def reading(**given):
        read.append(given["input_ids"].shape)
        return forward(**given)

    monkeypatch.setattr(plm.model, "forward", reading)
    classify(plm, None, SOURCES[:1], LABELS, TASK)
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, SOURCES[:1])
    encoded = TASK.template.encode(plm.tokenizer, [Example(SOURCES[0], label) for label in LABELS])
    beginnings = {each.target[:n] for each in encoded for n in range(1, len(each.target))}
    assert read[0] == (1, len(prompt.prompt))
    assert all(columns == 1 for _, columns in read[1:])
    assert sum(rows for rows, _ in read[1:]) == len(beginnings)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_narrow_first_search_is_corrected(plm, one_by_one, monkeypatch, width):
    monkeypatch.setattr(classification, "WIDTH", width)
    searches, original = [], search.search

    def searching(*given, **named):
        searches.append(named["floor"])
        return original(*given, **named)

    monkeypatch.setattr(search, "search", searching)
    corrected = 0
    for strength in (0.0, 1.0, 3.0):
        adapter = make_adapter(plm, strength=strength)
        expected = one_by_one(plm, adapter, Constant(0.8)).argmax(1)
        searches.clear()
        result = classify(plm, adapter, SOURCES, LABELS, TASK, Constant(0.8), probabilities=False)
        assert result.choices == [LABELS[i] for i in expected.tolist()]
        corrected += any(floor is not None for floor in searches)
    assert corrected
    with pytest.raises(ConfigError, match="only the best labels were computed: leave out probabilities=False"):
        _ = result.probabilities


@given(st.lists(st.lists(st.integers(3, 6), max_size=5).map(tuple), min_size=1, max_size=12, unique=True))
@settings(max_examples=50, deadline=None)
def test_a_tree_has_every_beginning_and_every_next_token_once(beginnings):
    targets = [(*beginning, 2) for beginning in beginnings]
    tree = LabelTree(targets)
    nodes, steps = [()], [[] for _ in targets]
    for depth, level in enumerate(tree.levels):
        if depth:
            nodes = [
                (*nodes[parent], token)
                for parent, token in zip(level.parents.tolist(), level.tokens.tolist(), strict=True)
            ]
        assert len(set(nodes)) == len(nodes)
        for label, node, token in zip(level.labels.tolist(), level.nodes.tolist(), level.next.tolist(), strict=True):
            assert targets[label][:depth] == nodes[node]
            steps[label].append(token)
    assert [tuple(each) for each in steps] == targets


def test_examples_stand_for_their_source(plm):
    examples = [Example(source, "not read") for source in SOURCES]
    result = classify(plm, None, examples, LABELS, TASK)
    assert torch.equal(result.log_probs, classify(plm, None, SOURCES, LABELS, TASK).log_probs)
    empty = classify(plm, None, [], LABELS, TASK)
    assert (empty.choices, empty.log_probs.shape) == ([], (0, len(LABELS)))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "there are no labels to choose from: give at least one"),
        ("house", "labels must be a list of texts, not the text 'house'"),
        (["dog", " "], "label 2 is ' ': give a text that is not blank"),
        (["dog", 3], "label 2 is 3: give a text"),
        (["dog", "house", "dog"], "the label 'dog' is given 2 times: give each label once"),
    ],
)
def test_labels_that_cannot_be_chosen_are_refused(plm, labels, words):
    with pytest.raises(ConfigError, match=words):
        classify(plm, None, SOURCES, labels, TASK)


def test_labels_with_the_same_tokens_are_refused(plm, monkeypatch):
    encode = type(TASK.template).encode
    monkeypatch.setattr(
        type(TASK.template), "encode", lambda *given, **named: [encode(*given, **named)[0]] * len(given[2])
    )
    with pytest.raises(ConfigError, match="the labels 'dog' and 'Dog' have the same tokens"):
        classify(plm, None, SOURCES, ["dog", "Dog"], TASK)


def test_sources_and_settings_that_cannot_be_are_refused(plm):
    with pytest.raises(DataError, match="source 2: the source is blank"):
        classify(plm, None, ["a", " "], LABELS, TASK)
    with pytest.raises(DataError, match=r"source 2: its prompt has \d+ tokens and the longest label \d+, and the PLM"):
        classify(plm, None, ["a", "house " * 100], LABELS, TASK)
    with pytest.raises(ConfigError, match="batch_size"):
        classify(plm, None, SOURCES, LABELS, TASK, batch_size=0)
    with pytest.raises(ConfigError, match="without an adapter the task is unknown"):
        classify(plm, None, SOURCES, LABELS)
    adapter = make_adapter(plm, tokens=torch.tensor([5, 6]))
    with pytest.raises(DataError, match="source 1: every label has probability 0, because the adapter's vocabulary"):
        classify(plm, adapter, SOURCES, LABELS, TASK, Constant(1.0))
    other = make_adapter(plm)
    object.__setattr__(other.config, "task", "translation")
    with pytest.raises(MismatchError, match="was trained with the task 'translation', not with 'classification'"):
        classify(plm, other, SOURCES, LABELS, TASK, Constant(0.5))


@pytest.mark.parametrize("text", ["Classify this text: \n{source}\nLabel:", "{source}", "Label of {source}: "])
def test_sources_share_the_tokens_of_labels(plm, text):
    template = Template(text)
    prompts = template.encode_prompts(plm.tokenizer, SOURCES)
    trees = label_trees(template, plm.tokenizer, SOURCES, prompts, LABELS)
    for source, prompt, tree in zip(SOURCES, prompts, trees, strict=True):
        encoded = template.encode(plm.tokenizer, [Example(source, label) for label in LABELS], apart=True)
        assert {each.prompt for each in encoded} == {prompt.prompt}
        assert tree.targets == tuple(each.target for each in encoded)
    assert len(set(map(id, trees))) == 1
