"""Common parts of every training: the learning rate schedule, a step, and early stopping."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema.adapter.config import TrainConfig
from pema.adapter.optimisation import EarlyStopping, course, descend, learning_rate_at


def test_the_course_of_the_learning_rate():
    assert course(0.05, 0.1) == pytest.approx(0.5)
    assert course(0.1, 0.1) == course(0.0, 0.0) == course(1.0, 1.0) == 1.0
    assert course(0.55, 0.1) == pytest.approx(0.5)
    assert course(1.0, 0.1) == pytest.approx(0.0)
    assert course(3.0, 0.1) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate(decay, expected):
    config = TrainConfig(learning_rate=1.0, warmup=0.26, decay=decay)
    assert [learning_rate_at(step, 6, config) for step in range(6)] == pytest.approx(expected)


def test_the_learning_rate_never_leaves_its_range():
    for decay in ("none", "linear", "cosine"):
        for warmup in (0.0, 0.1, 0.99):
            config = TrainConfig(learning_rate=1.0, warmup=warmup, decay=decay)
            for steps in (1, 2, 100):
                assert all(0 < learning_rate_at(step, steps, config) <= 1 for step in range(steps))


@given(st.lists(st.floats(0.0, 9.0), max_size=20), st.integers(1, 4))
def test_training_stops_where_none_of_the_last_losses_is_a_new_lowest(losses, patience):
    stopping = EarlyStopping(patience)
    for k, loss in enumerate(losses):
        assert stopping.is_lowest(loss) == all(loss < other for other in losses[:k])
        assert stopping.lowest == min(losses[: k + 1])
        first = losses.index(min(losses[: k + 1]))
        assert stopping.since == k - first
        assert stopping.is_over == (k - first >= patience)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_is_down_the_clipped_gradient(clip):
    x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    x.grad = torch.full((2,), 1e9)  # of an earlier step
    descend(torch.optim.SGD([x], lr=1e9), x.square().sum() / 2, [x], 0.1, clip)
    gradient = torch.tensor([3.0, 4.0]) * (clip / 5 if clip else 1.0)
    assert torch.allclose(x.detach(), torch.tensor([3.0, 4.0]) - 0.1 * gradient)
