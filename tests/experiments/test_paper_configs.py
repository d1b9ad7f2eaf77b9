"""The nine configs of the paper's experiments: one form, valid settings, readable data."""

import gzip
import itertools
import json
import tomllib

import pytest

from pema.evaluation.evaluate import METRICS
from pema.evaluation.notation import is_style
from pema.methods.contract import Budget
from pema.methods.registry import METHODS, get_method
from pema.tasks.gyafc import DOMAINS, read_gyafc
from pema.tasks.readers import read_examples
from pema.tasks.registry import get_task
from reproduction.paths import CONFIGS

FOLDER = CONFIGS / "paper"
PLMS = {"opt-iml-max-1.3b": "float32", "llama-7b": "float16", "opt-iml-max-30b": "float16"}
NAMES = {f"{data}-{plm}" for data in ("wmt22", "gyafc-em", "gyafc-fr") for plm in PLMS}
BASELINES = ("kNN-LM", "LoRA", "Offsite-Tuning")
TYPES = {
    "name": str,
    "title": str,
    "task": str,
    "plm": str,
    "plm_dtype": str,
    "seeds": list,
    "reference": str,
    "template": str,
    "metrics": list,
    "data": dict,
    "budget": dict,
    "methods": list,
}


@pytest.fixture(params=sorted(NAMES))
def config(request):
    with (FOLDER / f"{request.param}.toml").open("rb") as file:
        found = tomllib.load(file)
    assert found["name"] == request.param
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with a few made examples in every file that the paper's data have."""
    root = tmp_path_factory.mktemp("data")
    for part in ("train", "dev", "test"):
        (root / "wmt22-en-de").mkdir(exist_ok=True)
        rows = [json.dumps({"en": f"{part} {i}", "du": f"{part} {i} de"}) for i in range(3)]
        (root / "wmt22-en-de" / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    for domain, part in itertools.product(DOMAINS, ("train", "tune", "test")):
        folder = root / "GYAFC_Corpus" / domain / part
        folder.mkdir(parents=True)
        for name in ("informal", "formal" if part == "train" else "formal.ref0"):
            (folder / name).write_text(f"{domain} {part} {name}\n" * 2, encoding="utf-8")
    return root


def test_there_is_one_for_every_data_set_and_plm():
    assert {path.stem for path in FOLDER.iterdir()} == NAMES


def test_the_form(config):
    assert {name: type(value) for name, value in config.items()} == TYPES
    plm = next(plm for plm in PLMS if config["name"].endswith(plm))
    assert config["plm"].endswith(plm)
    assert config["plm_dtype"] == PLMS[plm]
    get_task(config["task"], config["template"])
    assert all(name in METRICS or is_style(name) for name in config["metrics"])
    assert all(type(seed) is int for seed in config["seeds"])
    Budget(**config["budget"])


def test_the_methods(config):
    labels = [method["label"] for method in config["methods"]]
    assert len(set(labels)) == len(labels)
    assert config["reference"] in labels
    assert {"PLM alone", *BASELINES, "PEMA paper"} <= set(labels)
    for method in config["methods"]:
        assert set(method) <= {"label", "method", "settings", "grid"}
        grid = method.get("grid", {})
        candidates = list(itertools.product(*grid.values()))
        assert len(candidates) <= config["budget"]["trials"]
        if method["method"] in METHODS:
            for candidate in candidates:
                settings = method.get("settings", {}) | dict(zip(grid, candidate, strict=True))
                get_method(method["method"]).of(settings)


def test_pema_is_the_papers(config):
    (found,) = (method for method in config["methods"] if method["method"] == "pema")
    pema = get_method("pema").of(found["settings"])
    assert (pema.preset, pema.contexts, pema.targets, pema.schedule) == ("paper", "predicted", "position", "unrolling")
    assert pema.changes == {
        "rank": 512,
        "kappa": 0.2,
        "reconstruction": "sgd",
        "batch_size": 2048,
        "epochs": 200,
    }
    given = found["settings"].get("lambda_max")
    assert given == (0.9 if config["name"].startswith("wmt22") else None)
    assert ("grid" in found) == (given is None)


def test_the_data_can_be_read(config, root):
    data = dict(config["data"])
    assert config["name"].startswith(data.pop("name"))
    assert set(data) == {"train", "dev", "test"}
    found = {}
    for part, table in data.items():
        key = "gyafc" if "gyafc" in table else "data"
        read = read_gyafc if key == "gyafc" else read_examples
        found[part] = read(**table | {key: root / table[key]})
    assert not {e.source for e in found["train"]} & {e.source for e in found["test"]}
    if key == "gyafc":
        (domain,) = {table["domain"] for part, table in data.items() if part != "train"}
        assert len(found["train"]) == 4
        assert {e.target for e in found["test"]} == {f"{domain} test formal.ref0"}
        assert {e.source for e in found["dev"]} == {f"{domain} tune informal"}
    else:
        assert [(e.source, e.target) for e in found["dev"]] == [(f"dev {i}", f"dev {i} de") for i in range(3)]
