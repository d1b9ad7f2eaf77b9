"""Labels by likelihood with every method, against the method's own perplexity of each label as a target."""

import math

import pytest
import torch
from tests.methods.made_jobs import save_plm

from pema.errors import ConfigError, DataError
from pema.methods.contract import AdaptedModel, Budget, Job
from pema.methods.registry import get_method
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task

# peft passes the prefix under the name that transformers replaces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache`:FutureWarning"),
]

TASK = get_task("classification")
EXAMPLES = tuple(Example(f"the {thing} {i}", thing) for i in range(4) for thing in ("dog", "house", "house is small"))
SOURCES = ["the dog is here", "a house", "das Haus"]
LABELS = ["house", "house is small", "dog", "dog is", "h"]

METHODS = {
    "plm": {},
    "pema": {"preset": "residual", "rank": 16, "learning_rate": 0.01},
    "pema-copying": {"preset": "best", "rank": 16, "copy_width": 8, "copy_least": 0.0, "learning_rate": 0.01},
    "pema-seen": {"preset": "residual", "rank": 16, "vocabulary": "seen", "schedule": "unrolling"},
    "knn-lm": {"k": 4, "temperature": 10.0, "weight": 0.5},
    "few-shot": {"k": 2},
    "retrieved-few-shot": {"k": 2},
    "lora": {"rank": 2, "learning_rate": 0.01},
    "ia3": {},
    "prefix-tuning": {"prefix_length": 3},
    "full": {"learning_rate": 0.001},
    "offsite": {"adapters": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_plm(tmp_path_factory.mktemp("plm"), layers=3)


@pytest.fixture(scope="module")
def plm(folder):
    return LocalPLM.load(folder)


@pytest.mark.parametrize("name", METHODS)
def test_a_label_has_the_likelihood_of_the_target(folder, plm, tmp_path, name):
    method = get_method(name.removesuffix("-seen").removesuffix("-copying")).of(METHODS[name])
    job = Job(str(folder), None, TASK, EXAMPLES, EXAMPLES[:3], 0, Budget(epochs=1))
    for part in ("prepared", "trained"):
        (tmp_path / part).mkdir()
    method.prepare(plm, job, tmp_path / "prepared")
    method.train(job, tmp_path / "prepared", tmp_path / "trained")
    with method.open(plm, job, tmp_path / "prepared", tmp_path / "trained") as adapted:
        result = adapted.classify(SOURCES, LABELS)
        assert adapted.classify(SOURCES, LABELS, probabilities=False, batch_size=1).choices == result.choices
        expected = torch.empty(len(SOURCES), len(LABELS), dtype=torch.float64)
        for i, source in enumerate(SOURCES):
            for j, label in enumerate(LABELS):
                example = Example(source, label)
                template = getattr(adapted, "_task", TASK).template
                (encoded,) = template.encode(plm.tokenizer, [example])
                expected[i, j] = -len(encoded.target) * math.log(adapted.perplexity([example]))
    torch.testing.assert_close(result.log_probs, expected, rtol=1e-4, atol=1e-3)
    assert result.choices == [LABELS[i] for i in expected.argmax(1).tolist()]


def test_the_prefix_takes_its_part_of_the_window(folder, plm, tmp_path):
    method = get_method("prefix-tuning").of({"prefix_length": 3})
    job = Job(str(folder), None, TASK, EXAMPLES, EXAMPLES[:3], 0, Budget(epochs=1))
    method.train(job, tmp_path, tmp_path)
    with (
        method.open(plm, job, tmp_path, tmp_path) as adapted,
        pytest.raises(DataError, match=f"the PLM takes {plm.max_length - 3} together"),
    ):
        adapted.classify(["house " * 200], LABELS)


def test_a_method_of_the_users_own_may_lack_it():
    class Own(AdaptedModel):
        disk_bytes = 0

        def generate(self, sources, **settings):
            raise NotImplementedError

        def perplexity(self, examples):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Own does not score labels: define its method classify, or leave out"):
        Own().classify(SOURCES, LABELS)
