"""The synthetic tasks: equal to the recipe's output, split without leakage, and without shortcuts."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from pema.experiments.config import read_config
from pema.owner.local import LocalPLM
from pema.tasks.readers import read_examples
from pema.tasks.registry import get_task
from reproduction.data.made_tasks import (
    DATA,
    PARTS,
    SIZES,
    SLOT,
    TASKS,
    data_name,
    draw_examples,
    file_of,
    grammar,
    written,
)
from reproduction.paths import CONFIGS

EVERY = [(task, part) for task in TASKS for part in PARTS]
PAIRS = [("dev", "train"), ("test", "train"), ("test", "dev")]


def examples(task: str, part: str) -> list[tuple[str, str]]:
    return [(example.source, example.target) for example in read_examples(data=file_of(task, part))]


def templates(task: str, part: str) -> list[str]:
    """Every sentence of the part's grammar, its slots open."""
    given = grammar(task)[part]
    if task == "qa":
        return [text for each in given for text in (each["context"], *each["questions"])]
    asides = given["asides"]
    some = asides if task == "summarisation" else [text for texts in asides.values() for text in texts]
    frames = [*given["wishes"], *given["refusals"]] if task == "classification" else []
    return [*given["openings"], *frames, *some, *(text for texts in given["requests"].values() for text in texts)]


@cache
def fillers(slot: str) -> str:
    """What may stand in a slot, of whatever part; in a phrase's, anything but the end of a sentence."""
    if slot == "phrase":
        return "[^.?!]+"
    return "|".join(
        re.escape(english) for words in grammar("words").values() for english, _ in words[slot.rstrip("12")]
    )


def pattern(template: str) -> re.Pattern[str]:
    """The template as a sentence of its own, whatever fills it."""
    text = re.escape(re.sub(r"\b([Aa]) (?=\{)", r"\1#", template)).replace(r"\#", "n? ")
    text = re.sub(r"\\\{([a-z]+[12]?)\\\}", lambda slot: f"(?:{fillers(slot[1])})", text)
    return re.compile(r"(?:^|(?<=[.?!] )|(?<=\n))" + text + "(?= |\n|$)", re.IGNORECASE)


@pytest.mark.parametrize(("task", "part"), EVERY)
def test_the_recipe_makes_the_committed_bytes(task, part):
    assert file_of(task, part).read_bytes() == written(task, draw_examples(task, part)).encode()


@pytest.mark.parametrize(("task", "part"), EVERY)
def test_the_files_hold_what_was_made(task, part):
    assert examples(task, part) == draw_examples(task, part)
    assert len(examples(task, part)) == SIZES[task][part]
    assert len({source for source, _ in examples(task, part)}) == SIZES[task][part]


def test_the_files_are_small():
    assert sum(file.stat().st_size for file in DATA.rglob("*.*")) < 300_000


@pytest.mark.parametrize(("task", "part"), EVERY)
def test_no_slot_stays_open_and_articles_fit(task, part):
    for source, target in examples(task, part):
        assert not set("{}") & set(source + target)
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", source), source


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("held_out", "other"), PAIRS)
def test_no_text_is_of_another_parts_template(task, held_out, other):
    for template in templates(task, other):
        found = [source for source, _ in examples(task, held_out) if pattern(template).search(source)]
        assert not found, (template, found)


@pytest.mark.parametrize(("task", "part"), EVERY)
def test_every_text_is_of_its_own_parts_templates(task, part):
    own = [pattern(template) for template in templates(task, part)]
    for source, _ in examples(task, part):
        rest = source
        for each in own:
            rest = each.sub(".", rest)
        assert not rest.strip(". \n"), (source, rest)


@pytest.mark.parametrize(("held_out", "other"), PAIRS)
def test_no_word_that_fills_a_slot_is_of_two_parts(held_out, other):
    words = grammar("words")
    for slot, some in words[held_out].items():
        assert not {english for english, _ in some} & {english for english, _ in words[other][slot]}


@pytest.mark.parametrize("part", PARTS)
def test_labels_are_balanced(part):
    counts = Counter(target for _, target in examples("classification", part))
    assert set(counts) == set(grammar("classification")["labels"].values())
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("part", PARTS)
def test_kinds_of_request_are_balanced(part):
    ends = [SLOT.sub("", summary) for summary in grammar("summarisation")["summaries"].values()]
    counts = [sum(target.endswith(end) for _, target in examples("summarisation", part)) for end in ends]
    assert len(set(counts)) == 1
    assert sum(counts) == SIZES["summarisation"][part]


@pytest.mark.parametrize("part", PARTS)
def test_the_matter_of_every_department_is_mentioned_to_others(part):
    given = grammar("classification")
    for label, asides in given[part]["asides"].items():
        told = {
            target
            for aside in asides
            for source, target in examples("classification", part)
            if pattern(aside).search(source)
        }
        assert len(told) >= 2
        assert given["labels"][label] not in told


@pytest.mark.parametrize("part", PARTS)
def test_a_context_alone_does_not_answer(part):
    for each in grammar("qa")[part]:
        assert len(set(each["questions"].values())) >= 3


@pytest.mark.parametrize(("task", "most"), [("qa", 0.15), ("summarisation", 0.08)])
@pytest.mark.parametrize("part", PARTS)
def test_no_answer_serves_for_many(task, most, part):
    counts = Counter(target for _, target in examples(task, part))
    assert counts.most_common(1)[0][1] <= most * SIZES[task][part]


@pytest.mark.parametrize("task", TASKS)
def test_the_config_reads_them(task):
    experiment = read_config(CONFIGS / "studies" / f"{task}.toml", "compare")
    for part in PARTS:
        assert [(e.source, e.target) for e in getattr(experiment.data, part)] == examples(task, part)
    assert experiment.task.name == task
    assert experiment.data.name == data_name(task)
    assert experiment.references == ("PLM alone",)


@pytest.mark.parametrize("task", TASKS)
def test_they_fit_the_plm_and_answers_fit_the_limit(task):
    plm = LocalPLM.load("embedded")
    for part in PARTS:
        for encoded in get_task(task).template.encode(plm.tokenizer, read_examples(data=file_of(task, part))):
            assert len(encoded.target) <= 2 * encoded.source_length + 16  # the longest output of `generate`
            assert len(encoded.prompt) + 2 * encoded.source_length + 16 <= plm.description.max_length
