from collections import Counter

from pema.evaluation.slots import PLACES, errors, errors_by_slot, record
from reproduction.experiments.slots import count, lines
from reproduction.tables import slots

RECORDS = [
    record("name[The Mill], food[English], familyFriendly[no], near[Raja Indian Cuisine]"),
    record("name[The Eagle], food[Chinese], area[riverside]"),
]
TEXTS = [
    "The Mill serves English food. It is family friendly.",  # near is left out, familyFriendly is false
    "The Mill is a Chinese place in the city centre by the river, by the river.",  # another name, two areas, one twice
]


def test_counts_by_slot():
    totals = count(TEXTS, RECORDS)
    assert totals[PLACES] == Counter(values=3, missing=1, wrong=1, added=0)
    assert totals["familyFriendly"]["wrong"] == 1
    assert totals["food"] == Counter(values=2)
    assert totals["area"]["added"] == 1
    assert +sum((errors(text, of) for text, of in zip(TEXTS, RECORDS, strict=True)), Counter()) == +sum(
        (each for text, of in zip(TEXTS, RECORDS, strict=True) for each in errors_by_slot(text, of).values()), Counter()
    )


def test_the_seeds_of_a_method_are_summed():
    runs = {f"run{seed}": {"label": "best", "texts": TEXTS} for seed in range(2)}
    (line,) = lines(runs, RECORDS)
    assert (line["run"], line["seeds"]) == ("best", 2)
    assert line["slots"][PLACES] == {"added": 0, "missing": 2, "values": 6, "wrong": 2}


def test_the_table_has_a_cell_for_each_slot():
    table = slots.slots()
    (best,) = [row for row in table.splitlines() if row.startswith("| PEMA best |")]
    assert len(best.split("|")) == len(next(row for row in table.splitlines() if "name, near" in row).split("|"))
    assert table.endswith("\n")
