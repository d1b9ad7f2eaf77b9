"""The Python API: the same results as the step-by-step functions, the command line and the method of comparisons."""

import json
import re
import subprocess
import sys

import pytest
import torch

import pema
from pema.cli import main
from pema.evaluation.outputs import write_hypotheses
from pema.files import read_json
from pema.generation.texts import text_of
from pema.methods.contract import Budget, Job
from pema.methods.pema import PEMA
from pema.owner.local import LocalPLM

TEXTS = [
    ("The house is small.", "Das Haus ist klein."),
    ("The dog is here.", "Der Hund ist hier."),
    ("Where is the house?", "Wo ist das Haus?"),
    ("The dog is small.", "Der Hund ist klein."),
    ("Here is the dog.", "Hier ist der Hund."),
    ("The house is here.", "Das Haus ist hier."),
]
SOURCES = [source for source, _ in TEXTS]
CONFIG = pema.preset("paper", rank=8, epochs=2, dev_fraction=0.4, learning_rate=0.01, device="cpu")
TIMES = ("train_seconds", "pairs_per_second", "reconstruction_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("api")
    for name, seed in (("plm", 0), ("other", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for side, texts in (("en", SOURCES), ("de", [target for _, target in TEXTS])):
        (folder / f"train.{side}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def examples(folder):
    return pema.read_examples(source=folder / "train.en", target=folder / "train.de")


@pytest.fixture(scope="module")
def plm(folder):
    return pema.PLM.from_pretrained(folder / "plm")


@pytest.fixture(scope="module", params=["teacher", "predicted"])
def adapted(request, plm, folder, examples):
    """Contexts, folder and adapter."""
    output = folder / request.param
    return request.param, output, plm.adapt(examples, "translation", CONFIG, output, contexts=request.param)


def pema_runs(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pema", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


def config_of(folder):
    """`adapter_config.json` without what no two runs have in common."""
    values = read_json(folder / "adapter_config.json")
    training = values["pema"]["training"]
    training["figures"] = {name: value for name, value in training["figures"].items() if name not in TIMES}
    assert set(training.pop("signature")) >= {"seed", "versions"}
    return values


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_python_and_the_command_line_write_the_same_bytes(adapted, plm, folder, monkeypatch):
    contexts, output, adapter = adapted
    monkeypatch.chdir(folder)
    inputs = ("--plm", "plm", "--task", "translation", "--source", "train.en", "--target", "train.de")
    pema_runs(monkeypatch, "build", *inputs, "--contexts", contexts, "-o", f"cli-{contexts}-memory")
    settings = ("--preset", "paper", "--rank", 8, "--epochs", 2, "--learning-rate", 0.01)
    settings += ("--set", "dev_fraction=0.4", "--set", "device=cpu")
    pema_runs(monkeypatch, "train", f"cli-{contexts}-memory", "-o", f"cli-{contexts}", *settings)
    assert contents(folder / f"cli-{contexts}-memory") == contents(output / "memory")
    mine, theirs = output / "adapter", folder / f"cli-{contexts}"
    weights = "adapter_model.safetensors"
    assert (mine / weights).read_bytes() == (theirs / weights).read_bytes()
    assert config_of(mine) == config_of(theirs)
    assert config_of(mine)["pema"]["fitted"]["schedule"] == "fitted"
    for more, given in (((), {}), (("--schedule", "fitted"), {"schedule": "fitted"})):
        pema_runs(monkeypatch, "generate", f"cli-{contexts}", *inputs[:2], "--input", "train.en", "-o", "out.de", *more)
        write_hypotheses(folder / "expected.de", plm.generate(SOURCES, adapter, **given))
        assert (folder / "out.de").read_bytes() == (folder / "expected.de").read_bytes()


def test_step_by_step_is_the_same(adapted, plm, examples, tmp_path):
    contexts, output, adapter = adapted
    task = pema.get_task("translation")
    memory = pema.build_memory(plm, examples, task, tmp_path / "memory", contexts=contexts)
    stepwise, _ = pema.train(memory, CONFIG, tmp_path / "adapter")
    assert contents(tmp_path / "memory") == contents(output / "memory")
    assert config_of(tmp_path / "adapter") == config_of(output / "adapter")
    assert stepwise.config.schedule == adapter.config.schedule
    assert stepwise.config.fitted == adapter.config.fitted
    assert plm.generate(SOURCES, adapter) == pema.generate(plm, stepwise, SOURCES)
    assert plm.generate(SOURCES, adapter) == pema.generate(plm, stepwise, SOURCES, task, adapter.config.schedule)


def test_the_method_of_comparisons_is_the_same(adapted, folder, examples, tmp_path):
    contexts, output, _ = adapted
    changes = {"rank": 8, "learning_rate": 0.01, "device": "cpu"}
    method = PEMA.of({"preset": "paper", "contexts": contexts, **changes})
    budget = Budget(epochs=2, patience=CONFIG.patience, dev_fraction=0.4)
    job = Job(str(folder / "plm"), None, pema.get_task("translation"), tuple(examples), tuple(examples), 0, budget)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "trained").mkdir()
    local = LocalPLM.load(folder / "plm")
    method.prepare(local, job, tmp_path / "prepared")
    method.train(job, tmp_path / "prepared", tmp_path / "trained")
    assert contents(tmp_path / "prepared" / "memory") == contents(output / "memory")
    assert config_of(tmp_path / "trained" / "adapter") == config_of(output / "adapter")


def test_rounds_are_the_same_from_everywhere(plm, folder, examples, tmp_path, monkeypatch):
    adapter = plm.adapt(
        examples, "translation", CONFIG, tmp_path / "api", contexts="predicted", targets="aligned", rounds=1
    )
    assert adapter.config.schedule == pema.Constant(0.7)
    inputs = ("--plm", folder / "plm", "--task", "translation")
    inputs += ("--source", folder / "train.en", "--target", folder / "train.de")
    contexts = ("--contexts", "predicted", "--targets", "aligned")
    settings = ("--preset", "paper", "--rank", 8, "--epochs", 2, "--learning-rate", 0.01)
    settings += ("--set", "dev_fraction=0.4", "--set", "device=cpu")
    monkeypatch.chdir(tmp_path)
    pema_runs(monkeypatch, "adapt", *inputs, *contexts, *settings, "--rounds", 1, "-o", "cli")
    pema_runs(monkeypatch, "build", *inputs, *contexts, "-o", "memory")
    pema_runs(monkeypatch, "train", "memory", *settings, "-o", "adapter-1")
    pema_runs(monkeypatch, "build", *inputs, *contexts, "--append", "--adapter", "adapter-1", "-o", "memory")
    pema_runs(monkeypatch, "train", "memory", *settings, "-o", "adapter")
    method = PEMA.of(
        {"preset": "paper", "contexts": "predicted", "targets": "aligned", "rounds": 1, "rank": 8}
        | {"learning_rate": 0.01, "device": "cpu"}
    )
    budget = Budget(epochs=2, patience=CONFIG.patience, dev_fraction=0.4)
    job = Job(str(folder / "plm"), None, pema.get_task("translation"), tuple(examples), tuple(examples), 0, budget)
    for name in ("prepared", "trained"):
        (tmp_path / name).mkdir()
    method.prepare(LocalPLM.load(folder / "plm"), job, tmp_path / "prepared")
    report = method.train(job, tmp_path / "prepared", tmp_path / "trained")
    assert report.seconds > max(point["seconds"] for point in report.curve)
    memories = [tmp_path / place / "memory" for place in ("api", "cli", "", "prepared")]
    adapters = [tmp_path / place / "adapter" for place in ("api", "cli", "", "trained")]
    for memory, each in zip(memories, adapters, strict=True):
        assert contents(memory) == contents(memories[0])
        assert config_of(each) == config_of(adapters[0])
        weights = "adapter_model.safetensors"
        assert (each / weights).read_bytes() == (adapters[0] / weights).read_bytes()


def test_an_adapter_knows_its_task_and_its_schedule(adapted, plm):
    contexts, output, adapter = adapted
    assert adapter.config.task == "translation"
    assert adapter.config.schedule == (pema.Constant(0.7) if contexts == "teacher" else pema.GradualUnrolling(0.9))
    read = pema.Adapter.from_pretrained(output / "adapter")
    assert read.config == adapter.config
    assert plm.generate(SOURCES, read) == plm.generate(SOURCES, adapter)
    ending = {"max_new_tokens": adapter.config.max_new_tokens, "stop": adapter.config.stop}
    assert ending["max_new_tokens"]
    assert ending["stop"] == ("\n",)
    assert plm.generate(SOURCES, adapter, schedule="none") == plm.generate(SOURCES, task="translation", **ending)
    assert plm.generate(SOURCES, adapter, schedule="constant", lambda_max=0.2) == plm.generate(
        SOURCES, adapter, schedule=pema.Constant(0.2)
    )


def test_an_adaptation_that_ended_is_returned_and_another_refused(adapted, plm, examples):
    contexts, output, adapter = adapted
    before = contents(output)
    again = plm.adapt(examples, "translation", CONFIG, output, contexts=contexts)
    assert contents(output) == before
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())
    with pytest.raises(pema.MismatchError, match="rank"):
        plm.adapt(examples, "translation", pema.preset("paper", rank=4), output, contexts=contexts)


def test_without_a_folder_nothing_stays(plm, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    adapter = plm.adapt(examples, pema.get_task("style"), CONFIG)
    assert not list(tmp_path.iterdir())
    assert adapter.config.task == "style"
    adapter.save_pretrained(tmp_path / "kept")
    assert plm.generate(SOURCES, pema.Adapter.from_pretrained(tmp_path / "kept")) == plm.generate(SOURCES, adapter)


def test_the_model_itself_mixes_inside_use(adapted, plm):
    _, _, adapter = adapted
    prompt = pema.get_task("translation").template.fill(SOURCES[0])[0]
    inputs = plm.tokenizer(prompt, return_tensors="pt")
    (expected,) = plm.generate(SOURCES[:1], adapter, max_new_tokens=8)
    (alone,) = plm.generate(SOURCES[:1], task="translation", max_new_tokens=8)

    def generated():
        tokens = plm.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return text_of(plm.tokenizer, tokens.tolist(), cut=tokens[-1] not in plm.description.eos_token_ids)

    with plm.use(adapter):
        assert generated() == expected
        assert plm.generate(SOURCES[:1], max_new_tokens=8) == [expected]
        assert plm.generate(SOURCES[:1], adapter, max_new_tokens=8) == [expected]
        with pytest.raises(pema.ConfigError, match="inside `use` the schedule is the one that `use` was given"):
            plm.generate(SOURCES, schedule="none")
        with pytest.raises(pema.ConfigError, match="has an adapter attached already"), plm.use(adapter):
            pass
    assert generated() == alone
    with plm.use(adapter, "none"):
        assert generated() == alone


def test_a_masked_plm_is_used_the_same_way(folder, examples, tmp_path):
    from pema.owner.mask import Mask

    Mask.create(tmp_path / "mask.key")
    masked = pema.PLM.from_pretrained(folder / "plm", mask_secret=tmp_path / "mask.key")
    adapter = masked.adapt(examples, config=CONFIG)
    texts = masked.generate(SOURCES, adapter)
    with masked.use(adapter):
        assert masked.generate(SOURCES) == texts


LABELS = ["Haus", "Haus ist klein", "Hund", "Hund ist hier"]


def test_labels_are_the_same_from_python_and_the_command_line(adapted, plm, folder, monkeypatch):
    contexts, _, adapter = adapted
    monkeypatch.chdir(folder)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS), encoding="utf-8")
    result = plm.classify(SOURCES, LABELS, adapter)
    assert torch.equal(result.log_probs, pema.classify(plm, adapter, SOURCES, LABELS).log_probs)
    assert plm.classify(SOURCES, LABELS, adapter, probabilities=False).choices == result.choices
    command = ("classify", f"{contexts}/adapter", "--plm", "plm", "--labels", "labels.txt", "--input", "train.en")
    pema_runs(monkeypatch, *command, "-o", "chosen.txt")
    pema_runs(monkeypatch, *command, "-o", "chosen.jsonl")
    assert (folder / "chosen.txt").read_text(encoding="utf-8").splitlines() == result.choices
    rows = [json.loads(line) for line in (folder / "chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["text"]) for row in rows] == list(zip(SOURCES, result.choices, strict=True))
    assert [row["probability"] for row in rows] == pytest.approx(result.probabilities.amax(1).tolist(), abs=1e-6)
    weighted = plm.classify(SOURCES, LABELS, adapter, schedule="linear", lambda_max=0.3)
    pema_runs(monkeypatch, *command, "--schedule", "linear", "--lambda-max", 0.3, "-o", "weighted.txt")
    assert (folder / "weighted.txt").read_text(encoding="utf-8").splitlines() == weighted.choices
    alone = plm.classify(SOURCES, LABELS, task="translation")
    pema_runs(monkeypatch, *command, "--no-adapter", "-o", "alone.txt")
    assert (folder / "alone.txt").read_text(encoding="utf-8").splitlines() == alone.choices
    assert not torch.equal(alone.log_probs, result.log_probs)


def test_labels_inside_use_are_those_of_its_adapter(adapted, plm):
    _, _, adapter = adapted
    expected = plm.classify(SOURCES, LABELS, adapter)
    with plm.use(adapter):
        assert torch.equal(plm.classify(SOURCES, LABELS).log_probs, expected.log_probs)
        assert torch.equal(plm.classify(SOURCES, LABELS, adapter, task="translation").log_probs, expected.log_probs)
        with pytest.raises(pema.ConfigError, match="inside `use` the schedule is the one that `use` was given"):
            plm.classify(SOURCES, LABELS, lambda_max=0.2)


def test_sampling_is_fixed_by_its_seed(adapted, plm):
    _, _, adapter = adapted
    settings = {"do_sample": True, "max_new_tokens": 12, "temperature": 2.0}
    first, other = (plm.generate(SOURCES, adapter, seed=seed, **settings) for seed in (1, 2))
    assert first == plm.generate(SOURCES, adapter, seed=1, **settings) != other


def test_what_cannot_be_is_refused(plm, folder, examples, adapted):
    _, _, adapter = adapted
    with pytest.raises(pema.ConfigError, match="without an adapter the task is unknown"):
        plm.generate(SOURCES)
    with pytest.raises(pema.ConfigError, match=r"unknown setting 'contxts' of BuildConfig: .*did you mean 'contexts'"):
        plm.adapt(examples, contxts="teacher")
    with pytest.raises(pema.ConfigError, match="config=3 must be a preset's name or a TrainConfig"):
        plm.adapt(examples, config=3)
    with pytest.raises(pema.ConfigError, match="unknown preset 'bset'"):
        plm.adapt(examples, config="bset")
    with pytest.raises(pema.ConfigError, match=r"unknown setting 'dtyp' of LoadConfig: .*did you mean 'dtype'"):
        pema.PLM.from_pretrained("embedded", dtyp="float32")
    with pytest.raises(pema.ConfigError, match=r"lambda_max=0\.5 has no effect with the schedule Constant"):
        plm.generate(SOURCES, adapter, schedule=pema.Constant(0.5), lambda_max=0.5)
    with pytest.raises(pema.ConfigError, match="unknown schedule 'square'"):
        plm.generate(SOURCES, adapter, schedule="square")
    other = pema.PLM.from_pretrained(folder / "other")
    with pytest.raises(pema.MismatchError, match="belongs to another PLM"):
        other.generate(SOURCES, adapter)
    with pytest.raises(pema.MismatchError, match="belongs to another PLM"), other.use(adapter):
        pass


def test_the_public_names_are_shown_and_there():
    assert dir(pema) == sorted([*pema.__all__, "__version__"])
    for name in pema.__all__:
        assert getattr(pema, name).__name__ == name
        assert getattr(pema, name).__doc__
    assert {"PLM", "Schedule", "Task", "Template", "perplexity", "PemaError", "ConfigError"} <= set(dir(pema))
    with pytest.raises(AttributeError, match="module 'pema' has no attribute 'nothing'"):
        pema.nothing  # noqa: B018


def test_importing_pema_is_quick():
    code = "import json, sys, pema; dir(pema); pema.preset, pema.ConfigError; print(json.dumps('torch' in sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(child.stdout) is False


@pytest.fixture(scope="module")
def arguments(plm, folder, examples):
    """Arguments that suit."""
    adapter = plm.adapt(examples, "translation", CONFIG, folder / "arguments")
    return {"plm": plm, "adapter": adapter, "memory": pema.Memory.open(folder / "arguments" / "memory")}


LISTS = "must be a list of texts, not the text 'The dog.'"
ADAPTER = r"adapter='x' must be of type Adapter: read one with pema\.Adapter\.from_pretrained"
NAME = r"plm='x' is a name: open the PLM with pema\.PLM\.from_pretrained\('x'\)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o["plm"].generate("The dog.", o["adapter"]), f"sources {LISTS}"),
        (lambda o: o["plm"].classify("The dog.", ["a", "b"], o["adapter"]), f"sources {LISTS}"),
        (lambda o: o["plm"].classify(["a"], "The dog.", o["adapter"]), f"labels {LISTS}"),
        (lambda o: pema.generate(o["plm"], o["adapter"], "The dog."), f"sources {LISTS}"),
        (lambda o: o["plm"].generate(["a", None], o["adapter"]), "source 2 is of type NoneType: give a text, or an"),
        (lambda o: o["plm"].generate(["a"], "x"), ADAPTER),
        (lambda o: o["plm"].generate(["a"], "x", task="translation"), ADAPTER),
        (lambda o: o["plm"].classify(["a"], ["b", "c"], "x"), ADAPTER),
        (lambda o: o["plm"].use("x").__enter__(), ADAPTER),
        (lambda o: pema.tune(o["plm"], "x", [pema.Example("a", "b")]), ADAPTER),
        (lambda o: pema.generate(o["adapter"], o["plm"], ["a"]), r"adapter=PLM\('plm'.*must be of type Adapter"),
        (lambda o: pema.generate("x", o["adapter"], ["a"]), NAME),
        (lambda o: pema.classify("x", o["adapter"], ["a"], ["b", "c"]), NAME),
        (lambda o: pema.build_memory("x", [pema.Example("a", "b")], "translation", "never"), NAME),
        (lambda o: pema.train("x", CONFIG, "never"), r"memory='x' must be of type Memory: .*pema\.Memory\.open"),
        (
            lambda o: pema.train(o["memory"], "best", "never"),
            r"config='best' must be of type TrainConfig: .*pema\.preset",
        ),
        (lambda o: pema.tune(o["plm"], o["adapter"], ["a"]), "example 1 is of type str, not an Example: read the data"),
        (lambda o: pema.demonstrate(["a"], [pema.Example("a", "b")], 1, "translation"), "example 1 is of type str"),
        (lambda o: pema.demonstrate([pema.Example("a", "b")], ["a"], 1, "translation"), "example 1 is of type str"),
        (lambda o: pema.evaluate(3, ["a"], ["b"]), r"task=3 is no task: give a name \(translation, "),
        (
            lambda o: o["plm"].adapt([], epochs=3),
            r"epochs is a setting of the training: give config=pema\.preset\('best', ep",
        ),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(arguments, call, message, tmp_path, monkeypatch):
    """A text is a sequence of characters: in the place of a list it gave one result per character."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((pema.ConfigError, pema.DataError), match=message):
        call(arguments)


def test_a_task_may_be_named_wherever_one_is_taken(arguments, examples, tmp_path):
    plm, adapter, task = arguments["plm"], arguments["adapter"], pema.get_task("translation")
    built = [pema.build_memory(plm, examples, each, tmp_path / str(n)) for n, each in enumerate((task, "translation"))]
    assert built[0].manifest == built[1].manifest
    for call in (
        lambda each: pema.generate(plm, adapter, SOURCES[:1], each),
        lambda each: pema.classify(plm, adapter, SOURCES[:1], ["a", "b"], each).choices,
        lambda each: pema.tune(plm, adapter, examples[:1], task=each, schedules=[]).to_dict(),
        lambda each: pema.evaluate(each, ["a b"], ["a c"]),
        lambda each: pema.demonstrate(examples[:1], examples, 1, each),
    ):
        assert call("translation") == call(task)


def test_what_a_notebook_shows(arguments):
    assert repr(arguments["plm"]).startswith("PLM('plm': LlamaForCausalLM, d=32, V=320")
    assert re.match(r"Adapter\(\s*d=32, rank=8, V=320, .*task='translation', plm='plm'", repr(arguments["adapter"]))
    assert re.match(r"Memory\('.*memory': 6 examples, [\d,]+ pairs, teacher, plm\)", repr(arguments["memory"]))
