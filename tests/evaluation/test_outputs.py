import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.errors import StorageError
from pema.evaluation.outputs import write_hypotheses
from pema.tasks.readers import read_lines

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff") | st.sampled_from("\n\r\u2028\x85")
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hypotheses=st.lists(texts, min_size=1, max_size=8))
def test_one_line_each_for_every_reader(tmp_path, hypotheses):
    path = tmp_path / "out.txt"
    write_hypotheses(path, hypotheses)
    expected = [" ".join(text.splitlines()) for text in hypotheses]
    assert read_lines(path) == expected
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(hypotheses)


def test_known_bytes(tmp_path):
    write_hypotheses(tmp_path / "new" / "out.txt", ["Grüße", "", "a\nb\r\nc"])
    assert (tmp_path / "new" / "out.txt").read_bytes() == "Grüße\n\na b c\n".encode()


def test_whole_or_absent(tmp_path):
    path = tmp_path / "out.txt"
    write_hypotheses(path, ["before"])

    def broken():
        yield "after"
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*out\.txt: No space left on device"):
        write_hypotheses(path, broken())
    assert read_lines(path) == ["before"]
    assert list(tmp_path.iterdir()) == [path]
