"""Jobs on tiny PLMs in a folder, for methods that load the PLM by its name."""

from tests.tiny import build_model, build_tokenizer

from pema.methods.contract import Budget, Job
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TASK = get_task("translation")
EXAMPLES = tuple(Example(f"the house {i}" + " is small" * (i % 4), f"das Haus {i} ist klein") for i in range(12))
SOURCES = [example.source for example in EXAMPLES[:5]]


def save_plm(folder, family="llama", **changes):
    """A tiny PLM on the disk; returns its folder."""
    build_model(family, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def job(folder, *, seed=0, examples=EXAMPLES, **budget):
    return Job(str(folder), None, TASK, examples, EXAMPLES[:3], seed, Budget(**{"epochs": 3, **budget}))


def run(method, given, folder):
    """Train below `folder`; returns what `train` reports and the folder that it filled."""
    output = folder / "trained"
    output.mkdir(parents=True)
    return method.train(given, folder / "prepared", output), output
