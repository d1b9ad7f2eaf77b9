# ruff: noqa: RUF009
"""Fields are checked against their types and limits, in code and in files."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError
from pema.schema import (
    DEEPEST,
    MANY,
    among,
    check,
    documented,
    fields_of,
    from_json,
    option,
    parse,
    require,
    same,
    short,
    unknown,
)


@dataclass(frozen=True)
class Inner:
    count: int = option(least=1, most=9)


@dataclass(frozen=True)
class Record:
    name: str = option(line=True, longest=5)
    share: float = option(0.5, least=0.0, below=1.0)
    scale: float = option(1.0, above=0.0)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: int | None = option(None, least=1)
    numbers: tuple[int, ...] = option((), least=0, longest=3)
    names: str | Sequence[str] | None = None
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    code: str = option("ab", pattern="[a-c]+")
    free: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check(self)


def test_what_is_meant_is_kept():
    values = {
        "name": "é b",
        "share": 0,
        "numbers": [1, 2],
        "names": ["x"],
        "inner": {"count": 3},
        "many": [{"count": 1}, {"count": 9}],
        "free": {"a": [1, {"b": None}]},
        "limit": 7,
    }
    made = from_json(Record, values)
    assert made == Record(
        "é b",
        0.0,
        numbers=(1, 2),
        names=("x",),
        inner=Inner(3),
        many=(Inner(1), Inner(9)),
        free={"a": [1, {"b": None}]},
        limit=7,
    )
    assert type(made.share) is float
    assert Record("x", names="all").names == "all"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "it is a list of 0 items, not an object"),
        ({}, "'name' is missing"),
        ({"nmae": "x"}, "unknown setting 'nmae' of Record: .*did you mean 'name'"),
        ({"name": ""}, "name='' must be one line of printable characters"),
        ({"name": "a\nb"}, "name='a.nb' must be one line"),
        ({"name": "abcdef"}, "name='abcdef' has 6 characters, at most 5"),
        ({"share": 1.0}, "share=1.0 is too large: it must be less than 1"),
        ({"share": "0"}, "share='0' must be a number"),
        ({"share": True}, "share=True must be a number"),
        ({"share": math.nan}, "share=nan must be finite"),
        ({"scale": 0.0}, "scale=0.0 is too small: it must be more than 0"),
        ({"kind": "c"}, "unknown kind 'c': use a or b"),
        ({"kind": ["a"]}, "unknown kind a list of 1 items"),
        ({"flag": 1}, "flag=1 must be true or false"),
        ({"limit": 0}, "limit=0 is too small"),
        ({"limit": 10**400}, "limit=a number of hundreds of digits is too large"),
        ({"numbers": 3}, "numbers=3 must be a list"),
        ({"numbers": [1, -1]}, r"numbers\[1\]=-1 is too small"),
        ({"numbers": [1, 2, 3, 4]}, "numbers has 4 items, at most 3"),
        ({"names": 3}, "names=3 must be a list"),
        ({"names": ["a", 3]}, r"names\[1\]=3 must be a text"),
        ({"inner": {"count": 0}}, "inner.count=0 is too small"),
        ({"inner": [1]}, "inner is a list of 1 items, not an object"),
        ({"many": [{"count": 1}, {}]}, r"'many\[1\].count' is missing"),
        ({"many": [{"count": 1, "x": 1}]}, r"unknown setting 'many\[0\].x' of Inner"),
        ({"code": "abd"}, r"code='abd' does not match the pattern \[a-c\]\+"),
        ({"code": "ab\x07"}, "code='ab.x07' contains control characters"),
        ({"free": [1]}, "free=a list of 1 items must be an object"),
        ({"free": {"a": "\ud800"}}, "free contains '.ud800', which is not valid Unicode"),
    ],
)
def test_what_cannot_be_meant_is_named(values, words):
    given = values if not isinstance(values, dict) or values == {} else {"name": "x"} | values
    with pytest.raises(ConfigError, match=words) as caught:
        from_json(Record, given)
    assert str(caught.value).isprintable()


def test_free_values_may_be_nested_so_far():
    value: Any = 1
    for _ in range(DEEPEST - 2):
        value = [value]
    from_json(Record, {"name": "x", "free": {"a": value}})
    with pytest.raises(ConfigError, match=f"free is nested more than {DEEPEST} levels deep"):
        from_json(Record, {"name": "x", "free": {"a": [[value]]}})


def test_a_record_in_code_is_no_dictionary():
    with pytest.raises(ConfigError, match="inner=an object of 1 items must be a Inner"):
        Record("x", inner={"count": 3})


@given(st.integers(-20, 20), st.integers(-10, 0), st.integers(0, 10))
def test_limits_are_the_least_and_the_most(value, least, most):
    inside = least <= value <= most
    try:
        assert require("n", value, int, least=least, most=most) == value
        assert inside
    except ConfigError:
        assert not inside


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_json_is_a_record_or_refused(value):
    for values in (value, {"name": value}, {"name": "x", "free": value}, {"name": "x", "many": value}):
        made = None
        try:
            made = from_json(Record, values)
        except ConfigError as error:
            assert "\x1b" not in str(error)  # noqa: PT017
        assert made is None or isinstance(made, Record)


@given(st.text() | st.integers() | st.lists(st.text()))
def test_a_value_in_a_message_is_short_and_printable(value):
    assert short(value).isprintable()
    assert len(short(value)) < 500


@documented
@dataclass(frozen=True)
class Documented:
    """What it is.

    Raises:
        ConfigError: something.
    """

    count: int = option(3, "How many.", least=1, most=9)
    share: float = option(0.5, "How much.", above=0.0, below=1.0)
    kind: Literal["a", "b"] | None = option(None, "Which.")
    place: Path | None = option(None, "Where.")
    many: int = option(4, "Most.", least=1, most=1 << 40)
    on: bool = option(True, "Whether.")
    borrowed: float = same(Record, "share")

    def __post_init__(self):
        check(self)


def test_a_dataclass_is_documented_by_its_fields():
    assert Documented.__doc__.startswith("What it is.\n\nRaises:\n    ConfigError: something.\n\nAttributes:\n")
    for line in (
        "    count: How many. (1 to 9; default 3)",
        "    share: How much. (above 0 to below 1; default 0.5)",
        "    kind: Which.",
        "    many: Most. (at least 1; default 4)",
        "    on: Whether. (default true)",
    ):
        assert f"{line}\n" in Documented.__doc__
    fields = {each.name: each for each in fields_of(Documented)}
    assert fields["many"].range(math.inf) == "1 to 1099511627776"
    assert [fields[name].form() for name in ("count", "share", "kind", "place", "on")] == [
        *("INTEGER", "NUMBER", "a|b", "PATH", "true|false"),
    ]


def test_a_field_may_be_anothers():
    assert Documented().borrowed == 0.5
    with pytest.raises(ConfigError, match=r"borrowed=1\.0 is too large: it must be less than 1"):
        Documented(borrowed=1)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "7", 7),
        ("share", "0.25", 0.25),
        ("kind", "b", "b"),
        ("kind", "none", None),
        ("place", "a/b", Path("a/b")),
        ("on", "False", False),
    ],
)
def test_what_is_typed_is_read(name, text, value):
    field = {each.name: each for each in fields_of(Documented)}[name]
    assert parse(f"--{name}", text, field.hint, **field.limits) == value
    assert getattr(Documented(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("count", "x", "--count='x' must be a whole number"),
        ("count", "10", "--count=10 is too large: it must be at most 9"),
        ("count", "none", "--count='none' must be a whole number"),
        ("share", "nan", "--share=nan must be finite"),
        ("kind", "c", "unknown --kind 'c': use a or b"),
        ("on", "yes", "--on='yes' must be true or false"),
        ("place", "a\x1b", r"--place='a\\x1b' contains control characters"),
    ],
)
def test_what_cannot_be_read_is_refused_as_it_was_typed(name, text, words):
    field = {each.name: each for each in fields_of(Documented)}[name]
    with pytest.raises(ConfigError, match=words):
        parse(f"--{name}", text, field.hint, **field.limits)


def test_a_path_is_a_path():
    assert Documented(place="a/b").place == Path("a/b")
    with pytest.raises(ConfigError, match="place=3 must be a path"):
        Documented(place=3)


@given(st.integers(1, 9))
def test_numbers_are_read_back(number):
    assert parse("count", str(number), int, least=1, most=9) == number


@pytest.mark.parametrize(
    ("value", "names", "words"),
    [
        ("cuont", ["count"], "unknown setting 'cuont' of this: use count (did you mean 'count'?)."),
        ("x", ["count", "kind"], "unknown setting 'x' of this: use count or kind."),
        ("b c", ["a", "b", "b d"], "unknown setting 'b c' of this: use a, b or b d (did you mean 'b d'?)."),
        ("x", [], "unknown setting 'x' of this: it has none."),
        (None, ["a", "b"], "unknown setting None of this: use a or b."),
        (["a"], ["a", "b"], "unknown setting a list of 1 items of this: use a or b."),
        ("n1x", [f"n{i}" for i in range(MANY)], "(did you mean 'n1'?)."),
        ("n1x", [f"n{i}" for i in range(MANY + 1)], "unknown setting 'n1x' of this: did you mean 'n1'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices_and_the_most_similar_one(value, names, words):
    with pytest.raises(ConfigError, match=f"{re.escape(words)}$"):
        among("setting", [*names, value], names, "this")


def test_the_location_is_part_of_an_unknown_name():
    assert unknown("setting", "x", ["y"], "this", "part[0]") == "unknown setting 'part[0].x' of this: use y."
