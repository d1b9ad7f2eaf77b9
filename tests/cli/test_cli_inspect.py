"""`pema inspect`, as a user calls it."""

import json
import re
import sys

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Fitted
from pema.cli import main
from pema.owner.local import LocalPLM
from pema.owner.mask import Mask, MaskedPLM

TEXT = "The house is small & here."
FITTED = Fitted((0.9, 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Two PLMs, a mask's secret, and an adapter each of the first PLM, plain and masked, of either contexts."""
    folder = tmp_path_factory.mktemp("inspect")
    for name, seed in (("plm", 0), ("other", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    plm = LocalPLM.load(folder / "plm")
    Mask.create(folder / "mask.key")
    masked = MaskedPLM(plm, Mask.read(folder / "mask.key"))
    for name, owner, contexts in (
        ("adapter", plm, "teacher"),
        ("far", plm, "predicted"),
        ("masked", masked, "teacher"),
    ):
        config = AdapterConfig(
            d=32,
            vocabulary_size=plm.head().vocabulary_size,
            rank=8,
            plm=owner.description,
            contexts=contexts,
            fitted=FITTED,
        )
        adapter = Adapter(config, seed=1)
        torch.nn.init.normal_(adapter.B_pd, std=0.5, generator=torch.Generator().manual_seed(1))
        adapter.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(adapter, *more, plm="plm", text=TEXT, output="page.html"):
        arguments = ("inspect", adapter, "--plm", plm, "--task", "translation", "--text", text, "-o", output, *more)
        monkeypatch.setattr(sys, "argv", ["pema", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def generated(monkeypatch, folder, *more):
    """What `pema generate` makes of the same text."""
    (folder / "in.txt").write_text(TEXT + "\n", encoding="utf-8")
    arguments = ["generate", "adapter", "--plm", "plm", "--task", "translation", "--input", "in.txt", "-o", "out.txt"]
    monkeypatch.setattr(sys, "argv", ["pema", *arguments, *map(str, more)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return (folder / "out.txt").read_text(encoding="utf-8").rstrip("\n")


def test_the_page_shows_what_generate_writes(run, folder, monkeypatch):
    settings = ("--schedule", "linear", "--lambda-max", 0.6, "--max-new-tokens", 9, "--template", "say {source}")
    code, out, err = run("adapter", *settings, "--reference", "Das <Haus>", "--json")
    assert code == 0, err
    result, data = json.loads(out), data_of(folder / "page.html")
    assert result == {"output": "page.html", "text": data["output"], "tokens": 9}
    assert data["output"] == generated(monkeypatch, folder, *settings)
    assert (data["source"], data["prompt"]) == (TEXT, f"<s>say {TEXT}")
    assert data["schedule"] == {"schedule": "linear", "lambda_max": 0.6}
    assert data["fitted"] == FITTED.to_dict()
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "Das &lt;Haus&gt;" in page
    assert "linear schedule with λ<sub>max</sub> = 0.6" in page


@pytest.mark.parametrize(
    ("adapter", "schedule"),
    [
        ("adapter", {"schedule": "constant", "value": 0.7}),
        ("far", {"schedule": "unrolling", "lambda_max": 0.9}),
    ],
)
def test_the_schedule_that_suits_the_contexts_is_the_default(run, folder, adapter, schedule):
    code, out, err = run(adapter, "--max-new-tokens", 2)
    assert code == 0, err
    assert "page.html" in out
    assert data_of(folder / "page.html")["schedule"] == schedule


def test_a_masked_head(run, folder):
    code, _, err = run("masked", "--mask-secret", "mask.key", "--max-new-tokens", 2)
    assert code == 0, err
    assert len(data_of(folder / "page.html")["steps"]) == 2
    code, _, err = run("masked", output="never.html")
    assert code == 1
    assert "belongs to another" in err


@pytest.mark.parametrize(
    ("more", "changes", "code", "words"),
    [
        ((), {"plm": "other"}, 1, "belongs to another PLM"),
        ((), {"text": "  "}, 1, "the source is blank"),
        (("--lambda-max", 2), {}, 2, "--lambda-max"),
        (("--max-new-tokens", 0), {}, 2, "--max-new-tokens"),
        ((), {"output": "page.html/never.html"}, 1, "cannot write"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(run, folder, more, changes, code, words):
    (folder / "page.html").write_text("before", encoding="utf-8")
    found, _, err = run("adapter", *more, **{"output": "never.html"} | changes)
    assert found == code
    assert words in re.sub(r"[│╭╮╰╯─]", " ", err)
    assert not (folder / "never.html").exists()
    assert (folder / "page.html").read_text(encoding="utf-8") == "before"


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pema", "inspect", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "Example: pema inspect adapter --plm embedded" in shown
