"""Descriptions of another party's PLM are checked before they are used."""

import math

import pytest

from pema.errors import ConfigError
from pema.owner.contract import PLMDescription, padded


@pytest.fixture(scope="module")
def values(tiny_plm):
    return tiny_plm().description.to_dict()


def test_a_description_survives_its_dictionary(values, tiny_plm):
    assert PLMDescription.from_dict(values) == tiny_plm().description


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "\x1b[2Jllama"),
        ("name", ""),
        ("name", 3),
        ("name", "x" * 513),
        ("architecture", "a\nb"),
        ("fingerprint", None),
        ("tap", "logits"),
        ("tap", ["head_input"]),
        ("d", 0),
        ("d", True),
        ("d", 10**9),
        ("d_tap", 32.0),
        ("vocabulary_size", 10**13),
        ("max_length", -1),
        ("max_length", math.inf),
        ("parameters", "many"),
        ("eos_token_ids", 2),
        ("eos_token_ids", [2.0]),
        ("eos_token_ids", [-1]),
        ("eos_token_ids", [1] * 5000),
    ],
)
def test_what_no_plm_has_is_refused_by_name(values, name, value):
    with pytest.raises(ConfigError, match=rf"plm\.{name}") as caught:
        PLMDescription.from_dict(values | {name: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("d"), "'plm.d' is missing"),
        (lambda v: v.update(extra=1), "unknown setting 'plm.extra' of PLMDescription: use name, architecture"),
        (None, "plm is a list of 12 items, not an object"),
    ],
    ids=["less", "more", "list"],
)
def test_missing_and_unknown_fields_are_refused(values, change, words):
    values = dict(values)
    if change:
        change(values)
    with pytest.raises(ConfigError, match=words):
        PLMDescription.from_dict(values if change else list(values))


def test_steps_are_rounded_up_to_the_bucket():
    assert [padded(n) for n in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]
