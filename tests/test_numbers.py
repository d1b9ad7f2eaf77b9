"""Every number that a user can set, in code, in a file or on the command line, is finite and in range, or refused."""

import math
import sys
from dataclasses import MISSING, fields
from types import UnionType
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.adapter.checkpoint import State
from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.schedule import SCHEDULES, get_schedule
from pema.errors import ConfigError
from pema.experiments.config import read_config
from pema.memory.sample import sample
from pema.methods.contract import Budget
from pema.methods.registry import METHODS, get_method
from pema.owner.bundle import NormSettings, Settings
from pema.owner.contract import PLMDescription
from pema.schema import from_json
from pema.serving.policy import EMPTY, Batching, Key, Limits, Policy

INSANE = [math.nan, math.inf, -math.inf, -1, -1.0, 10**30, -(10**30), 10**400, 1e300, True, False, "1", "nan", [], {}]

RECORDS = [TrainConfig, AdapterConfig, PLMDescription, Budget, *SCHEDULES.values(), *map(get_method, METHODS)]
OF_FILES = [State, Settings, NormSettings]
"""What only files say."""


def numeric(kind):
    """Names of a dataclass's numeric fields, and whether only whole numbers are meant."""
    for name, hint in get_type_hints(kind).items():
        inner = set(get_args(hint)) - {type(None)} if get_origin(hint) is UnionType else {hint}
        if name in {f.name for f in fields(kind)} and inner & {int, float}:
            yield name, int in inner


def required(kind):
    """Values for the fields that have no default."""
    given = {"d": 8, "d_tap": 8, "vocabulary_size": 9, "rank": 2, "scale": 1.0, "soft_cap": None, "norm": None}
    given |= {"max_length": 9, "parameters": 9, "eos_token_ids": [], "tap": "head_input", "kind": "rms", "eps": 1e-6}
    given |= {"values": [0.5], **dict.fromkeys(("name", "architecture"), "x")}
    given |= dict.fromkeys(("fingerprint", "tokenizer_fingerprint", "head_fingerprint"), "x")
    return {f.name: given[f.name] for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}


def outcome(make, name):
    """What a record has kept of a value, or the message with which it is refused."""
    try:
        return getattr(make(), name), ""
    except ConfigError as error:
        return None, str(error)


SETTINGS = [(kind, name, whole) for kind in RECORDS for name, whole in numeric(kind)]


def test_every_setting_is_tried():
    assert len(SETTINGS) > 60
    assert {"learning_rate", "lambda_max", "k", "alpha", "dev_fraction", "max_length"} <= {s[1] for s in SETTINGS}


@pytest.mark.parametrize(("kind", "name", "whole"), SETTINGS, ids=[f"{k.__name__}.{n}" for k, n, _ in SETTINGS])
def test_a_setting_is_finite_and_in_range_or_refused_by_name(kind, name, whole):
    """From Python and from a file alike."""
    refused = 0
    for value in INSANE:
        for make in (lambda values: kind(**values), lambda values: from_json(kind, values)):
            kept, message = outcome(lambda: make(required(kind) | {name: value}), name)  # noqa: B023
            refused += bool(message)
            assert name in message if message else type(kept) is (int if whole else float)
            assert message or (math.isfinite(kept) and abs(kept) <= 1e38)
    assert refused >= 2 * 10


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SETTINGS), st.floats() | st.integers() | st.text(max_size=3) | st.booleans() | st.none())
def test_any_value_is_kept_as_it_is_or_refused(setting, value):
    kind, name, whole = setting
    try:
        made = kind(**required(kind) | {name: value})
    except ConfigError:
        return
    kept = getattr(made, name)
    assert kept == value
    assert value is None or (type(kept) is (int if whole else float) and math.isfinite(kept))


@pytest.mark.parametrize("kind", OF_FILES)
def test_what_files_say_is_no_exception(kind):
    names = [name for name, _ in numeric(kind)]
    assert len(names) >= 2
    for name in names:
        for value in (math.nan, math.inf, True, "1", [], 10**300):
            with pytest.raises(ConfigError, match=name):
                from_json(kind, required(kind) | {name: value})


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.5, "0.5", True])
def test_lambda_max_is_refused_where_it_is_named(value):
    with pytest.raises(ConfigError, match="lambda_max="):
        get_schedule("constant", lambda_max=value)


@pytest.mark.parametrize("name", ["pairs", "seed"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, 10**30, math.nan])
def test_what_a_sample_is_drawn_with(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        sample(tmp_path, tmp_path / "s", **{"pairs": 5} | {name: value})


NUMBERS = [
    (table, name)
    for table, kind in (("limits", Limits), ("batching", Batching), ("keys", Key))
    for name, field in kind.model_fields.items()
    if {int, float} & {*get_args(field.annotation), field.annotation}
    or any({int, float} & {*get_args(inner)} for inner in get_args(field.annotation) if get_origin(inner) is Annotated)
]


@pytest.mark.parametrize(("table", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0.0", "1e300", "true", '"1"', "[]", "9" * 18])
def test_a_policys_numbers_are_finite_and_in_range(tmp_path, table, name, value):
    path = tmp_path / "policy.toml"
    head = f'[[keys]]\nname = "a"\nsha256 = "{"a" * 64}"\n' if table == "keys" else f"[{table}]\n"
    path.write_text(f"{head}{name} = {value}\n", encoding="utf-8")
    if (name, value) == ("window_ms", "0.0"):
        assert Policy.read(path).batching.window_ms == 0
        return
    with pytest.raises(ConfigError, match=name):
        Policy.read(path)


def test_every_number_of_a_policy_is_tried():
    assert len(NUMBERS) >= 14
    assert {"session_idle_seconds", "window_ms", "requests_per_second"} <= {name for _, name in NUMBERS}


def test_a_policy_that_lets_everybody_in_is_refused(tmp_path):
    (tmp_path / "policy.toml").write_text(f'[[keys]]\nname = "a"\nsha256 = "{EMPTY}"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"keys\[0\].sha256 \(key a\): it is the hash of the empty text"):
        Policy.read(tmp_path / "policy.toml")


EXPERIMENT = """
task = "translation"
seeds = {seeds}
[data]
name = "support"
[budget]
epochs = {epochs}
dev_fraction = {fraction}
[[methods]]
label = "PEMA"
method = "pema"
[methods.settings]
learning_rate = {rate}
examples = {examples}
"""
SANE = {"seeds": "[0]", "epochs": "2", "fraction": "0.1", "rate": "1e-3", "examples": "20"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seeds", "[-1]", r"seeds\[0\]=-1 is too small"),
        ("seeds", "[1.5]", r"seeds\[0\]=1.5 must be a whole number"),
        ("seeds", '["0"]', r"seeds\[0\]='0' must be a whole number"),
        ("seeds", "[true]", r"seeds\[0\]=True must be a whole number"),
        ("epochs", "0", r"budget\.epochs=0 is too small"),
        ("epochs", "true", r"budget\.epochs=True must be a whole number"),
        ("epochs", "9" * 18, r"budget\.epochs=9+ is too large"),
        ("fraction", "nan", r"budget\.dev_fraction=nan must be finite"),
        ("fraction", "inf", r"budget\.dev_fraction=inf must be finite"),
        ("fraction", "1", r"budget\.dev_fraction=1\.0 is too large"),
        ("rate", "nan", "learning_rate=nan must be finite"),
        ("rate", "inf", "learning_rate=inf must be finite"),
        ("rate", "-1.0", "learning_rate=-1.0 is too small"),
        ("rate", '"1"', "learning_rate='1' must be a number"),
        ("examples", "0", "examples=0 is too small"),
        ("examples", "1.5", "examples=1.5 must be a whole number"),
        ("examples", "nan", "examples=nan must be a whole number"),
    ],
)
def test_an_experiments_numbers_are_finite_and_in_range(tmp_path, name, value, words):
    path = tmp_path / "one.toml"
    path.write_text(EXPERIMENT.format(**SANE), encoding="utf-8")
    read_config(path, "compare")
    path.write_text(EXPERIMENT.format(**SANE | {name: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_config(path, "compare")


TRAIN = ["--rank", "--kappa", "--learning-rate", "--epochs", "--batch-size", "--clip", "--dp-epsilon", "--seed"]


@pytest.mark.parametrize("flag", TRAIN)
@pytest.mark.parametrize("value", ["nan", "inf", "-1", str(10**40), "x"])
def test_a_flag_ends_in_a_clear_error(flag, value, capsys, monkeypatch):
    import pema.cli

    monkeypatch.setattr(sys, "argv", ["pema", "train", "nowhere", "-o", "out", flag, value])
    with pytest.raises(SystemExit) as ended:
        pema.cli.main()
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "unexpected" not in said
    assert flag in said or flag.strip("-").replace("-", "_") in said


@pytest.mark.parametrize("value", ["nan", "inf", "-1", str(10**40), "x"])
@pytest.mark.parametrize("flag", ["--limit", "--batch-tokens"])
def test_a_flag_of_build_ends_in_a_clear_error(flag, value, capsys, monkeypatch):
    import pema.cli

    arguments = ["build", "--plm", "embedded", "--task", "translation", "-o", "out", "--data", "nowhere.tsv"]
    monkeypatch.setattr(sys, "argv", ["pema", *arguments, flag, value])
    with pytest.raises(SystemExit) as ended:
        pema.cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{flag}=" in said
    assert "unexpected" not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", math.nan),
        ("length_penalty", -math.inf),
        ("repetition_penalty", 1e300),
        ("num_beams", 10**12),
        ("num_beams", 0),
        ("max_new_tokens", 10**30),
        ("max_new_tokens", True),
        ("batch_size", 10**30),
        ("batch_size", 1.5),
        ("batch_size", "2"),
        ("seed", -1),
        ("seed", 10**30),
        ("seed", math.nan),
    ],
)
def test_what_is_generated_with_is_finite_and_in_range(name, value, tiny_plm):
    from pema.adapter.schedule import NoAdapter
    from pema.generation.decoding import generate
    from pema.tasks.registry import get_task

    settings = {"do_sample": name in ("temperature", "top_p"), name: value}
    with pytest.raises(ConfigError, match=name):
        generate(tiny_plm(), None, ["a b"], get_task("translation"), NoAdapter(), **settings)
