"""The bundled demo data: well-formed, consistent, and split without leakage."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from importlib.resources import files

import pytest

DATA = files("pema") / "demo_data"
MARKED = re.compile(r"\[F\](.*?)\[/F\]")
SPLITS = ("train", "dev", "test")

# What stays when a sentence is reduced to its frame; every other word becomes a slot.
FUNCTION_WORD_LIST = """
a all also although am an and another any are as at away back be because been before behind being between both but
by can cannot could did do does each even every far few for from had has have he her here him his how i if in
instead into is it its just let like many may me more most much must my near neither never next no nobody not
nothing now of off on once one only or our out over own perhaps please rather shall she should since so some
somebody something soon still such than that the their them then there these they this those though through to
too under unless until up us very was we were what when where which while who whose why will with without would
yes yet you your yours
"""
FUNCTION_WORDS = frozenset(FUNCTION_WORD_LIST.split())


def rows(name: str) -> list[list[str]]:
    text = (DATA / f"{name}.tsv").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    return [line.split("\t") for line in text.removesuffix("\n").split("\n")]


def split_rows(split: str) -> list[list[str]]:
    return rows(f"support_{split}")


def strip_marks(text: str) -> str:
    return MARKED.sub(r"\1", text)


def words(english: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", english.lower().replace("’", "'"))


def ngrams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def frame(english: str) -> tuple[str, ...]:
    """Return the sentence's function words, with a slot for every run of other words."""
    out: list[str] = []
    for word in words(english):
        item = word if word in FUNCTION_WORDS else "_"
        if item != "_" or not out or out[-1] != "_":
            out.append(item)
    return tuple(out)


def fold(text: str) -> str:
    """Lowercase and drop umlauts, so that Auftrag is found in Aufträge."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(ch for ch in decomposed if not unicodedata.combining(ch))


def stem(term: str) -> str:
    return fold(term).rstrip("aeio")


@pytest.mark.parametrize(("split", "fields", "least"), [("train", 2, 480), ("dev", 2, 58), ("test", 3, 118)])
def test_files_are_well_formed(split, fields, least):
    data = split_rows(split)
    assert len(data) >= least
    for row in data:
        assert len(row) == fields, row
        for field in row:
            assert field == " ".join(field.split()), row
            assert field, row
            assert field == unicodedata.normalize("NFC", field), row
            assert strip_marks(field)[-1] in ".?!", row


@pytest.mark.parametrize("split", SPLITS)
def test_english_sentences_are_short(split):
    assert [row[0] for row in split_rows(split) if not 5 <= len(words(row[0])) <= 14] == []


def test_no_english_sentence_occurs_twice():
    seen = Counter(" ".join(words(row[0])) for split in SPLITS for row in split_rows(split))
    assert [sentence for sentence, count in seen.items() if count > 1] == []


def test_no_german_sentence_occurs_twice():
    seen = Counter(strip_marks(row[1]).lower() for split in SPLITS for row in split_rows(split))
    assert [sentence for sentence, count in seen.items() if count > 1] == []


def test_marks_are_balanced_and_strip_to_text():
    for english, *german in split_rows("test"):
        assert "[" not in english
        for text in german:
            assert text.count("[F]") == text.count("[/F]") == len(MARKED.findall(text)), text
            assert all(phrase and phrase == phrase.strip() for phrase in MARKED.findall(text)), text
            assert not set("[]{}|") & set(strip_marks(text)), text
    for split in ("train", "dev"):
        assert not any(set("[]{}|") & set(field) for row in split_rows(split) for field in row)


def test_references_differ_only_inside_the_marks():
    for _, formal, informal in split_rows("test"):
        assert len(MARKED.findall(formal)) == len(MARKED.findall(informal)), formal
        assert MARKED.sub("[F]", formal) == MARKED.sub("[F]", informal)
        assert all(a != b for a, b in zip(MARKED.findall(formal), MARKED.findall(informal), strict=True)), formal


def test_forms_of_address_are_consistent():
    informal_word = re.compile(r"\b(du|dich|dir|dein\w*)\b", re.IGNORECASE)
    formal_word = re.compile(r"\b(Sie|Ihnen|Ihr|Ihre[mnrs]?)\b")
    formal_german = [row[1] for split in SPLITS for row in split_rows(split)]
    assert [text for text in formal_german if informal_word.search(strip_marks(text))] == []
    assert [row[2] for row in split_rows("test") if formal_word.search(strip_marks(row[2]))] == []
    # Every formal pronoun of the test lies inside a mark.
    assert [row[1] for row in split_rows("test") if formal_word.search(MARKED.sub("", row[1]))] == []


@pytest.mark.parametrize("split", SPLITS)
def test_most_sentences_address_the_customer(split):
    formal_word = re.compile(r"\b(Sie|Ihnen|Ihr|Ihre[mnrs]?)\b")
    data = split_rows(split)
    assert sum(bool(formal_word.search(row[1])) for row in data) >= 0.75 * len(data)


def test_terms_file():
    data = rows("terms")
    assert all(len(row) == 2 and all(row) for row in data)
    assert len({row[0] for row in data}) == len(data) >= 12
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for english, german in data:
        assert f"| {english} | {german} |" in readme


@pytest.mark.parametrize("split", SPLITS)
def test_terms_are_used_consistently(split):
    data = split_rows(split)
    for english_term, german_term in rows("terms"):
        pattern = re.compile(rf"\b{re.escape(english_term)}s?\b", re.IGNORECASE)
        having = [row for row in data if pattern.search(row[0])]
        assert having, f"{english_term!r} does not occur in {split}"
        for row in having:
            for german in row[1:]:
                assert stem(german_term) in fold(strip_marks(german)), row


@pytest.mark.parametrize(("split", "others"), [("dev", ("train",)), ("test", ("train", "dev"))])
def test_held_out_sentences_share_no_frame_with_the_others(split, others):
    other_rows = [row[0] for other in others for row in split_rows(other)]
    prepared = [(text, words(text), frame(text)) for text in other_rows]
    problems = []
    for english, *_ in split_rows(split):
        tokens, masked = words(english), frame(english)
        trigrams, runs = ngrams(tokens, 3), ngrams(tokens, 5)
        for text, other_tokens, other_masked in prepared:
            if masked == other_masked:
                problems.append(("same frame", english, text))
            if len(trigrams & ngrams(other_tokens, 3)) > 0.3 * len(trigrams):
                problems.append(("shared word trigrams", english, text))
            if runs & ngrams(other_tokens, 5):
                problems.append(("five words in a row", english, text))
    assert problems == []


def test_training_is_not_made_from_templates():
    data = [words(row[0]) for row in split_rows("train")]
    trigrams = [ngrams(tokens, 3) for tokens in data]
    problems = [
        (" ".join(data[i]), " ".join(data[j]))
        for i in range(len(data))
        for j in range(i)
        if len(trigrams[i] & trigrams[j]) > 0.5 * max(len(trigrams[i]), len(trigrams[j]))
    ]
    assert problems == []
