import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError
from pema.tasks.target_statistics import TargetStatistics

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=300)


@given(lengths)
def test_at_most_one_percent_exceed_common(values):
    result = TargetStatistics.of(values, [])
    assert result.longest == max(values)
    assert sum(value > result.common for value in values) <= len(values) / 100
    # No smaller length of a target does.
    smaller = max((value for value in values if value < result.common), default=None)
    assert smaller is None or sum(value > smaller for value in values) > (len(values) - 1) / 100


@given(st.lists(lengths, min_size=1, max_size=4))
def test_together(parts):
    each = [TargetStatistics.of(part, ["a"]) for part in parts]
    merged = TargetStatistics.merged(each)
    union = TargetStatistics.of([value for part in parts for value in part], ["a"])
    assert merged.longest == union.longest
    assert merged.common >= union.common
    assert sum(value > merged.common for part in parts for value in part) <= sum(map(len, parts)) / 100


@given(lengths)
def test_the_limit_covers_all_but_rare_lengths(values):
    result = TargetStatistics.of(values, [])
    assert result.max_new_tokens % 8 == 0
    assert result.max_new_tokens >= min(1.25 * result.longest, 2 * result.common)
    assert result.max_new_tokens - 8 < min(1.25 * result.longest + 1, 2 * result.common)
    assert sum(value > result.max_new_tokens for value in values) <= len(values) / 100


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ([2], 8),
        ([9] * 50, 16),
        ([24] * 50, 32),
        ([60, 70, 73], 96),
        ([20] * 199 + [2000], 40),
        ([20] * 20 + [2000], 2504),
    ],
)
def test_known_limits(values, limit):
    assert TargetStatistics.of(values, []).max_new_tokens == limit


@pytest.mark.parametrize(
    ("targets", "stop"),
    [
        (["Das Haus.", "Ein Hund."], ("\n",)),
        (["Das Haus.\n", "\n Ein Hund."], ("\n",)),
        (["Dear Ann,\n\nthank you."], ()),
        (["one", "two\r\nthree"], ("\n\n",)),
        (["one", "two\nthree\nfour"], ("\n\n",)),
        (["one", "two\r\n\r\nthree"], ()),
        ([], ("\n",)),
        (["one\u2028two"], ("\n",)),
    ],
)
def test_targets_of_one_line_end_at_a_line_break(targets, stop):
    assert TargetStatistics.of([3], targets).stop == stop


def test_several_lines_somewhere_are_several_lines():
    one, several = TargetStatistics(3, 3, 0), TargetStatistics(2, 2, 2)
    assert TargetStatistics.merged([one, several]) == TargetStatistics(3, 3, 2)
    assert TargetStatistics.merged([one, several]).stop == ()
    with pytest.raises(ConfigError, match="longest=0 is too small"):
        TargetStatistics(0, 1, 0)
