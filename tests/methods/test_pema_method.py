"""PEMA and the PLM alone on the methods' contract, on a tiny PLM."""

import math

import pytest
from tests.tiny import build_model, build_tokenizer

from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, NoAdapter
from pema.errors import ConfigError
from pema.generation.decoding import generate
from pema.methods.contract import Budget, Job
from pema.methods.pema import ADAPTER, PEMA
from pema.methods.plm_alone import PLMAlone
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TASK = get_task("translation")
EXAMPLES = tuple(Example(f"the house {i}", f"das Haus {i} ist klein") for i in range(12))
SOURCES = [example.source for example in EXAMPLES[:5]]


@pytest.fixture(scope="module")
def plm():
    return LocalPLM(build_model(), build_tokenizer(), name="tiny")


def job(**changes):
    return Job("tiny", None, TASK, EXAMPLES, EXAMPLES[:3], 0, Budget(**{"epochs": 2, **changes}))


@pytest.fixture(scope="module")
def trained(plm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pema")
    method = PEMA.of(
        {"preset": "residual", "rank": 32, "schedule": "constant", "lambda_max": 1.0, "learning_rate": 0.01}
    )
    (folder / "prepared").mkdir()
    (folder / "trained").mkdir()
    method.prepare(plm, job(), folder / "prepared")
    return method, method.train(job(), folder / "prepared", folder / "trained"), folder


def test_it_generates_what_the_adapter_generates(plm, trained):
    method, _, folder = trained
    adapter = Adapter.from_pretrained(folder / "trained" / ADAPTER)
    with method.open(plm, job(), folder / "prepared", folder / "trained") as adapted:
        found = adapted.generate(SOURCES)
    assert found.texts == generate(plm, adapter, SOURCES, TASK, Constant(1.0))
    assert found.tokens >= len(SOURCES)


def test_the_plm_alone_generates_what_the_plm_generates(plm, tmp_path):
    with PLMAlone().open(plm, job(), tmp_path, tmp_path) as adapted:
        assert adapted.generate(SOURCES).texts == generate(plm, None, SOURCES, TASK, NoAdapter())
        assert adapted.disk_bytes == 0
        assert math.isfinite(adapted.perplexity(EXAMPLES))
    assert PLMAlone().train(job(), tmp_path, tmp_path).trainable_parameters == 0


def test_a_plm_that_samples_by_default_is_decoded_greedily(tmp_path):
    sampling = LocalPLM(build_model(), build_tokenizer(), name="sampling")
    greedy = generate(sampling, None, SOURCES, TASK, NoAdapter())
    sampling.model.generation_config.do_sample = True
    sampling.model.generation_config.temperature = 5.0
    with PLMAlone().open(sampling, job(), tmp_path, tmp_path) as adapted:
        assert adapted.generate(SOURCES).texts == greedy


def test_rounds_are_settings_of_the_memory():
    rounds = {"contexts": "predicted", "targets": "aligned", "rounds": 2}
    method, plain = PEMA.of(rounds), PEMA.of({"contexts": "predicted", "targets": "aligned"})
    assert plain.shared
    assert not method.shared
    assert method.settings()["rounds"] == 2
    assert "rounds" not in plain.settings()
    assert plain.prepared_by == {"memory": {"contexts": "predicted", "targets": "aligned", "dtype": "float16"}}
    assert method.prepared_by["rounds"] == 2
    assert method.prepared_by["training"] == method.implied
    assert not method.needs.targets_at_owner
    assert PEMA.of({"rounds": 2}).needs.targets_at_owner
    with pytest.raises(ConfigError, match="targets='position' with rounds=2"):
        PEMA.of({"contexts": "predicted", "rounds": 2})


def test_training_lowers_the_perplexity_of_what_it_was_trained_on(plm, trained, tmp_path):
    method, figures, folder = trained
    with (
        PLMAlone().open(plm, job(), tmp_path, tmp_path) as alone,
        method.open(plm, job(), folder / "prepared", folder / "trained") as adapted,
    ):
        assert adapted.perplexity(EXAMPLES) < 0.9 * alone.perplexity(EXAMPLES)
    assert figures.trainable_parameters == 2 * 32 * 32
    assert figures.seconds > 0


def test_the_curve_is_that_of_the_training(trained):
    _, figures, _ = trained
    assert [point["epoch"] for point in figures.curve] == [0, 1, 2]
    assert figures.curve[2]["held_out_loss"] < figures.curve[0]["held_out_loss"]
    assert "train_loss" not in figures.curve[0]


def test_the_budget_bounds_the_training():
    config = PEMA.of({"preset": "paper"}).config(job(epochs=3, patience=1, dev_fraction=0.25))
    assert (config.epochs, config.patience, config.dev_fraction) == (3, 1, 0.25)
    assert PEMA.of({"preset": "paper", "epochs": 2}).config(job(epochs=9)).epochs == 2


def test_settings_are_those_of_the_method_and_of_its_training():
    method = PEMA.of({"preset": "paper", "rank": 8, "kappa": 0.5, "schedule": "linear"})
    assert method.changes == {"rank": 8, "kappa": 0.5}
    assert PEMA.of(method.settings()) == method
    assert method.trained_by == PEMA.of({"preset": "paper", "rank": 8, "kappa": 0.5}).trained_by
    assert method.trained_by != PEMA.of({"preset": "residual", "rank": 8}).trained_by
    assert method.implied["learning_rate"] == 1e-3
    assert method.prepared_by == PEMA().prepared_by


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": 8}, "rnak"),
        ({"preset": "fastest"}, "unknown preset 'fastest'"),
        ({"targets": "aligned"}, "targets='aligned' requires contexts='predicted'"),
        ({"seed": 3}, "seed belongs to the budget or to the run"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PEMA.of(settings)


def test_the_plm_alone_has_no_settings():
    with pytest.raises(ConfigError, match="unknown setting 'rank' of plm: it has none"):
        PLMAlone.of({"rank": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "budget: trials=0 is too small: it must be at least 1"),
        ({"dev_fraction": 1.0}, "dev_fraction=1.0 is too large"),
    ],
)
def test_a_budget_out_of_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**values)


def test_needs_follow_the_contexts():
    assert PEMA().needs.targets_at_owner
    assert not PEMA.of({"contexts": "predicted"}).needs.targets_at_owner
