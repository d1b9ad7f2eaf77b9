import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.evaluation.evaluate import evaluate, get_metric
from pema.evaluation.restaurants import LEVELS, NAMES, SLOTS, level
from pema.evaluation.slots import SlotErrors, errors, record
from pema.tasks.registry import get_task

EAGLE = (
    "name[The Eagle], eatType[coffee shop], food[Chinese], priceRange[less than £20], customer rating[5 out of 5], "
    "area[city centre], familyFriendly[no], near[Café Sicilia]"
)


def judged(text, source=EAGLE):
    return {kind: count for kind, count in errors(text, record(source)).items() if count}


@pytest.mark.parametrize(
    "text",
    [
        "The Eagle is a Chinese coffee shop near Café Sicilia in the city centre. It is cheap, rated 5 out of 5 and is "
        "not family-friendly.",
        "Near Cafe Sicilia, in the centre of the city, you find EAGLE, a highly rated café for adults only with "
        "Chinese food under £20.",
        "Leave the kids at home: the Eagle coffee-shop in the city center, close to Café Sicilia, serves low-priced "
        "Chinese food and has five stars.",
        "The Eagle, rated 5 stars, has low prices. The Eagle is a coffee shop with Chinese food; the coffee shop is "
        "near Café Sicilia downtown. Children are not welcome.",
    ],
)
def test_a_text_with_every_value_has_no_errors(text):
    assert judged(text) == {}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", {"missing": 8}),
        ("The Eagle is a coffee shop near Café Sicilia.", {"missing": 5}),
        (
            "The Eagle is a Chinese pub near Café Sicilia in the city centre. It is cheap, rated 3 out of 5 and "
            "is family-friendly.",
            {"wrong": 3},
        ),
        (
            "The Punter is a Chinese coffee shop near Burger King in the city centre. It is cheap, rated 5 out of 5 "
            "and is not family-friendly. It is not family-friendly.",
            {"wrong": 2, "repeated": 1},
        ),
        (
            "The Eagle is a Chinese and Italian coffee shop near Café Sicilia and Burger King in the city centre. "
            "It is cheap, rated 5 out of 5 and is not family-friendly.",
            {"added": 2},
        ),
    ],
)
def test_errors_of_each_kind(text, kinds):
    assert judged(text) == kinds


def test_values_of_slots_that_the_record_lacks_are_added():
    source = "name[Cocum], eatType[pub]"
    assert judged("Cocum is a pub.", source) == {}
    assert judged("Cocum is a restaurant and pub.", source) == {}
    assert judged("Cocum is a cheap pub by the river with great ratings.", source) == {"added": 3}
    assert judged("Cocum is a pub north of the city centre.", source) == {}


@pytest.mark.parametrize(
    ("text", "slot", "value"),
    [
        ("an average rating of 5 out of 5", "customer rating", "high"),
        ("an average price of more than 30 pounds", "priceRange", "high"),
        ("prices are high and customers rate it low", "priceRange", "high"),
        ("a high price range and a low customer rating", "priceRange", "high"),
        ("a high price range and a low customer rating", "customer rating", "low"),
        ("it is rated low and priced high", "customer rating", "low"),
        ("it is rated low and priced high", "priceRange", "high"),
        ("it is not well rated", "customer rating", "low"),
        ("prices from £20 to £25", "priceRange", "middle"),
        ("moderately priced and well liked", "priceRange", "middle"),
        ("not a place for families with children", "familyFriendly", "no"),
        ("it is not cheap, but family friendly", "familyFriendly", "yes"),
        ("it is kid-unfriendly", "familyFriendly", "no"),
        ("kids are not allowed", "familyFriendly", "no"),
        ("for adults and children", "familyFriendly", "yes"),
        ("a non-family-friendly bar", "familyFriendly", "no"),
        ("burgers and fries", "food", "fast food"),
        ("British food", "food", "english"),
    ],
)
def test_ways_to_say_a_value(text, slot, value):
    by_level = {level(slot, name): name for name in LEVELS.get(slot, {})}
    said = by_level.get(value, value)
    assert judged(f"{text}", f"{slot}[{said}]").keys() <= {"added"}
    for values, _ in SLOTS[slot]:
        for other in values - {value, "another"}:
            assert judged(text, f"{slot}[{by_level.get(other, other)}]").get("wrong") == 1


def test_values_of_other_slots_must_occur_literally():
    source = "city[Jena], sights[Botanical  Garden]"
    assert judged("Jena has a botanical garden.", source) == {}
    assert judged("Jenas garden", source) == {"missing": 2}


@given(
    st.lists(st.sampled_from(["cheap", "pub", "not family-friendly", "the river", "five stars", "Cotto"]), max_size=6)
)
def test_totals_are_sums_over_texts(said):
    text = ", ".join(said)
    metric = SlotErrors([EAGLE, EAGLE])
    one, two = metric.statistics([text, "The Eagle"], ["", ""])
    assert one[4] == 8
    assert one[:2].sum() <= 8
    assert metric.value(one + two) == 100 * (one[:4].sum() + two[:4].sum()) / 16


def test_the_metric_reads_sources_and_signs_its_counts():
    score = evaluate(get_task("style"), ["The Eagle"], ["-"], sources=[EAGLE], metrics=["slot_errors"])["slot_errors"]
    assert score.value == 87.5
    assert score.signature == "SER|patterns:e2e|missing:7|wrong:0|added:0|repeated:0|slots:8|scale:100"
    metric = get_metric("slot_errors", sources=["name[The Mill]"])
    assert np.array_equal(metric.statistics(["the mill"], ["x"]), [[0, 0, 0, 0, 1]])


def test_records_are_read_and_other_sources_refused():
    assert record("name[The Eagle], customer rating[1 out of 5],near[A, B]") == {
        "name": "The Eagle",
        "customer rating": "1 out of 5",
        "near": "A, B",
    }
    for source in ("A house.", "name[The Eagle], and more", "", "name[The Eagle"):
        with pytest.raises(DataError, match=r"source 2: .* is no record|source 2: .* is not a record like"):
            SlotErrors(["name[x]", source])
    with pytest.raises(ConfigError, match="give the sources"):
        get_metric("slot_errors")
    with pytest.raises(DataError, match="not aligned: 1 hypotheses, 2 sources"):
        SlotErrors(["name[x]", "name[y]"]).statistics(["x"], ["x"])


def test_no_name_is_read_as_food_or_a_type_of_place():
    for name in NAMES:
        assert judged(name, f"name[{name}]") == {}
