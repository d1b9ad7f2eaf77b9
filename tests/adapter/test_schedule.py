import json
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema.adapter.config import AdapterConfig
from pema.adapter.schedule import (
    SCHEDULES,
    Constant,
    Fitted,
    GradualUnrolling,
    Linear,
    NamedSchedule,
    NoAdapter,
    ScheduleName,
    get_schedule,
    relative_bin,
)
from pema.errors import ConfigError

ALL = [GradualUnrolling(0.8), Linear(0.7), Constant(0.4), NoAdapter(), Fitted((0.9, 0.5, 0.1), 1.5)]
NAMES = [schedule.name for schedule in ALL]


def weights(schedule, steps, length):
    return schedule.weights(torch.as_tensor(steps), torch.full((len(steps),), length))


def test_the_worked_schedule():
    # lambda_max 0.9, an input of 10 tokens: the step is 0.09.
    worked = [0.81, 0.6561, 0.5184, 0.3969, 0.2916, 0.2025, 0.1296, 0.0729, 0.0324, 0.0081, 0.0, 0.0, 0.0]
    found = weights(GradualUnrolling(0.9), range(13), 10)
    torch.testing.assert_close(found, torch.tensor(worked), atol=1e-7, rtol=0)
    assert found.dtype == torch.float32
    assert found[10:].tolist() == [0.0, 0.0, 0.0]


def test_linear_is_unrolling_without_the_square():
    steps = list(range(15))
    torch.testing.assert_close(weights(Linear(0.9), steps, 10)[:3], torch.tensor([0.9, 0.81, 0.72]))
    torch.testing.assert_close(weights(Linear(0.9), steps, 7).square(), weights(GradualUnrolling(0.9), steps, 7))


def test_constant_and_none():
    assert weights(Constant(0.25), [0, 5, 900], 3).tolist() == [0.25] * 3
    assert weights(NoAdapter(), [0, 5, 900], 3).tolist() == [0.0] * 3


def test_fitted_takes_the_weight_of_the_bin_and_the_last_is_open():
    schedule = Fitted((0.1, 0.2, 0.3, 0.4), span=2.0)
    found = weights(schedule, [0, 4, 5, 9, 10, 14, 15, 19, 20, 1000], 10)
    expected = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4]
    torch.testing.assert_close(found, torch.tensor(expected))


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 64))
def test_bins_are_exact(step, length, bins):
    found = relative_bin(torch.tensor([step]), torch.tensor([length]), bins, 2.0)
    assert found.item() == min(step * bins // (2 * length), bins - 1)


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
@given(step=st.integers(0, 10**6), length=st.integers(1, 10**6))
def test_weights_are_shares(schedule, step, length):
    (weight,) = weights(schedule, [step], length).tolist()
    assert 0 <= weight <= 1


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
def test_shapes_broadcast_and_rows_do_not_see_each_other(schedule):
    lengths, steps = torch.tensor([[3], [7], [20]]), torch.arange(30)[None]
    grid = schedule.weights(steps, lengths)
    assert grid.shape == (3, 30)
    for row, length in zip(grid, lengths, strict=True):
        assert torch.equal(row, schedule.weights(steps[0], length))


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
def test_json_there_and_back(schedule):
    assert NamedSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_get_schedule_by_name():
    assert get_schedule("unrolling") == GradualUnrolling(0.9)
    assert get_schedule("unrolling", lambda_max=0.5) == GradualUnrolling(0.5)
    assert get_schedule("linear", lambda_max=0.5) == Linear(0.5)
    assert get_schedule("constant") == Constant(0.7)
    assert get_schedule("constant", lambda_max=0) == Constant(0)
    assert get_schedule("none") == NoAdapter()
    assert get_schedule("fitted", fitted=Fitted((0.5,))) == Fitted((0.5,))
    assert set(SCHEDULES) == set(get_args(ScheduleName)) == {"unrolling", "constant", "linear", "fitted", "none"}


def config(**values):
    return AdapterConfig(d=6, vocabulary_size=11, rank=4, **values)


def test_the_fitted_schedule_is_a_part_of_the_adapter():
    fitted = Fitted((0.25, 0.75))
    assert config().choose_schedule("constant", 0.8) == Constant(0.8)
    assert config(fitted=fitted).choose_schedule("fitted") == fitted
    assert config(fitted=fitted).choose_schedule() == Constant(0.7)
    assert config(fitted=fitted, schedule=fitted).choose_schedule() == fitted
    with pytest.raises(ConfigError, match="'fitted' has no lambda_max"):
        config(fitted=fitted).choose_schedule("fitted", 0.9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no fitted schedule belongs to this adapter: train it again to have one: choose unrolling"),
        ({"dev_fraction": 0}, "trained with dev_fraction=0: nothing was held out"),
        ({"dev_fraction": 0, "dp_epsilon": 8.0}, "private training: it would be computed from examples without noise"),
    ],
)
def test_without_a_fitted_schedule_the_reason_is_given(settings, words):
    with pytest.raises(ConfigError, match=words):
        config(training={"settings": settings}).choose_schedule("fitted")


def test_the_schedule_suits_the_contexts():
    assert config().choose_schedule() == config(contexts="teacher").schedule == Constant(0.7)
    assert config().choose_schedule(lambda_max=0.5) == Constant(0.5)
    assert config(contexts="predicted").choose_schedule() == GradualUnrolling(0.9)
    assert config(contexts="predicted").choose_schedule(lambda_max=0.4) == GradualUnrolling(0.4)
    assert config(contexts="predicted").choose_schedule("linear") == Linear(0.9)


@pytest.mark.parametrize("kind", [GradualUnrolling, Linear, Constant])
@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_lambda_max_is_a_share(kind, value):
    with pytest.raises(ConfigError, match=r"(lambda_max|value)=.* (too small|too large|must be finite)"):
        kind(value)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="unknown schedule 'square': use unrolling"):
        get_schedule("square")
    with pytest.raises(ConfigError, match="'fitted' has no lambda_max"):
        get_schedule("fitted", lambda_max=0.5)
    with pytest.raises(ConfigError, match="no fitted schedule was given"):
        get_schedule("fitted")
    with pytest.raises(ConfigError, match="values is empty"):
        Fitted(())
    with pytest.raises(ConfigError, match=r"values\[1\]=1.5 is too large: it must be at most 1"):
        Fitted((0.5, 1.5))
    with pytest.raises(ConfigError, match=r"span=.* (is too small: it must be more than 0|must be finite)"):
        Fitted((0.5,), span=0)
    with pytest.raises(ConfigError, match="unknown schedule None"):
        NamedSchedule.from_dict({})
    with pytest.raises(ConfigError, match="unknown setting 'lambda_min' of GradualUnrolling"):
        NamedSchedule.from_dict({"schedule": "unrolling", "lambda_min": 0.1})
    with pytest.raises(ConfigError, match="expected a schedule 'fitted', got 'constant'"):
        Fitted.from_dict({"schedule": "constant"})
    with pytest.raises(ConfigError, match=r"a schedule must be an object, not 0\.5"):
        NamedSchedule.from_dict(0.5)
