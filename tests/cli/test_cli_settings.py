"""The command line's options are those that the settings declare, once."""

import dataclasses
import re
import sys

import pytest

from pema.adapter.config import TrainConfig
from pema.adapter.presets import PRESETS, preset
from pema.cli import main
from pema.cli.generate import GenerateConfig
from pema.cli.options import TaskName
from pema.cli.settings import Options, declared, respell
from pema.errors import ConfigError
from pema.memory.config import BuildConfig
from pema.schema import fields_of
from pema.tasks.registry import TASKS

CHANGED = {
    "rank": 7,
    "kappa": 0.5,
    "dropout": 0.3,
    "init": "pca",
    "residual": True,
    "activation": "gelu",
    "vocabulary": "seen",
    "copy_width": 16,
    "copy_least": 0.3,
    "least_steps": 3,
    "reconstruction": "sgd",
    "reconstruction_learning_rate": 0.5,
    "reconstruction_epochs": 9,
    "optimizer": "adamw",
    "learning_rate": 0.25,
    "weight_decay": 0.1,
    "warmup": 0.1,
    "decay": "linear",
    "clip": 2.0,
    "epochs": 3,
    "batch_size": 33,
    "dev_fraction": 0.2,
    "patience": 5,
    "seed": 4,
    "fit_rank": True,
    "precision": "bfloat16",
    "device": "cpu",
    "checkpoint_every": 8,
    "log_every": 6,
    "dp_epsilon": 8.0,
    "dp_delta": 0.001,
}
"""A value of every setting of training that is not its default."""


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pema", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def trained(monkeypatch):
    """The settings with which `pema train` would train."""
    import pema.adapter.training
    from pema.memory.manifest import Manifest
    from pema.memory.reader import Memory

    configs = []
    monkeypatch.setattr(
        pema.adapter.training, "train", lambda memory, config, *rest, **more: (configs.append(config), {})
    )
    for kind in (Memory, Manifest):
        monkeypatch.setattr(kind, "open", lambda path: None)
    return configs


def test_every_setting_of_training_is_reached(monkeypatch, trained):
    assert set(CHANGED) == {field.name for field in fields_of(TrainConfig)}
    assert len(CHANGED) == 31
    # Those that contradict each other go into runs of their own.
    alone = [{"activation", "residual"}, {"weight_decay", "optimizer"}, {"dp_epsilon", "dp_delta"}]
    alone += [{name} for name in CHANGED if not any(name in pair for pair in alone)]
    options = [f.name for f in fields_of(TrainConfig) if f.name in ("rank", "kappa", "learning_rate", "clip", "seed")]
    for names in alone:
        arguments = ["--set", "kappa=0"] if names & {"activation", "copy_width"} else []
        if "dp_epsilon" in names:
            arguments += ["--preset", "private"]
        else:
            arguments += ["--preset", "paper"]
        for name in sorted(names):
            if name in options or name.startswith("dp_"):
                arguments += [f"--{name.replace('_', '-')}", CHANGED[name]]
            else:
                arguments += ["--set", f"{name}={str(CHANGED[name]).lower()}"]
        assert run(monkeypatch, "train", "memory", "-o", "adapter", *arguments) == 0
        assert all(getattr(trained[-1], name) == CHANGED[name] for name in names)


def test_python_and_the_command_line_make_the_same_settings(monkeypatch, trained):
    for arguments, config in (
        ((), preset("best")),
        (("--preset", "paper", "--rank", 9), preset("paper", rank=9)),
        (("--dp-epsilon", 8, "--dp-delta", 0.001), preset("best", dp_epsilon=8, dp_delta=0.001)),
        (("--preset", "private", "--dp-epsilon", 8, "--dp-delta", 0.001), preset("best", dp_epsilon=8, dp_delta=0.001)),
    ):
        assert run(monkeypatch, "train", "memory", "-o", "adapter", *arguments) == 0
        assert trained[-1] == config
    assert dataclasses.replace(PRESETS["private"], dp_epsilon=8.0, dp_delta=0.001) == trained[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "m", "-o", "a", "--rank", 0), "--rank=0 is too small: it must be at least 1"),
        (("train", "m", "-o", "a", "--kappa", "much"), "--kappa='much' must be a number"),
        (("train", "m", "-o", "a", "--init", "pac"), "unknown --init 'pac': use random or pca (did you mean 'pca'?)"),
        (
            ("train", "m", "-o", "a", "--preset", "bset"),
            "unknown preset 'bset': use paper, best, residual or private (did you",
        ),
        (("train", "m", "-o", "a", "--set", "rnak=3"), "unknown setting 'rnak' of TrainConfig: did you mean 'rank'?"),
        (("train", "m", "-o", "a", "--set", "patience=0"), "patience=0 is too small: it must be at least 1"),
        (("train", "m", "-o", "a", "--set", "residual=yes"), "residual='yes' must be true or false"),
        (("train", "m", "-o", "a", "--set", "rank"), "--set 'rank' is not of the form key=value"),
        (("train", "m", "-o", "a", "--rank", 3, "--set", "rank=4"), "rank is given twice"),
        (("train", "m", "-o", "a", "--preset", "private"), "preset 'private' trains with DP-SGD"),
        (("build", "--plm", "p", "--task", "qa", "-o", "m", "--limit", 0), "--limit=0 is too small"),
        (("build", "--plm", "p", "--task", "qa", "-o", "m", "--dtype", "int4"), "unknown --dtype 'int4': use"),
        (
            ("build", "--plm", "p", "--task", "qa", "-o", "m", "--targets", "aligned"),
            "--targets aligned requires --contexts predicted",
        ),
        (("build", "--plm", "p", "--task", "qa", "-o", "m", "--plm-dtype", "int4"), "unknown --plm-dtype 'int4': use"),
        (("build", "--plm", "p", "--task", "qa", "-o", "m", "--set", "examples_per_shard=0"), "examples_per_shard=0"),
        (("generate", "a", "--plm", "p", "--input", "i", "-o", "o", "--num-beams", 0), "--num-beams=0 is too small"),
        (("generate", "a", "--plm", "p", "--input", "i", "-o", "o", "--set", "seed=-1"), "seed=-1 is too small"),
        (("memory", "sample", "m", "-o", "s", "--pairs", 0), "--pairs=0 is too small: it must be at least 1"),
        (("memory", "sample", "m", "-o", "s", "--pairs", 9, "--seed", -1), "--seed=-1 is too small"),
        (("audit", "a", "--members", "m", "--non-members", "n", "--references", -2), "--references=-2 is too small"),
        (("demo", "--seed", -1), "--seed=-1 is too small"),
        (("serve", "p", "--port", 65536), "--port=65536 is too large: it must be at most 65535"),
        (
            ("train", "m", "-o", "a", "--kappa", "0.2", "--set", "activation=gelu", "--set", "residual=true"),
            "--kappa 0.2 with --set activation=gelu: reconstruction is linear. Use --kappa 0 or --set activation=none",
        ),
        (
            ("train", "m", "-o", "a", "--preset", "paper", "--set", "weight_decay=0.1"),
            "--set weight_decay=0.1 with --set optimizer=adam",
        ),
        (("release", "p", "-o", "h", "--mask", "mirror"), "unknown --mask 'mirror': use none or rotation"),
    ],
)
def test_a_wrong_value_is_refused_in_the_users_words(monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_help_shows_limits_defaults_and_the_others(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    for verb, kind, common, rest in (
        ("train", TrainConfig, {"learning_rate": "(at least 0)", "kappa": "(0 to 1)"}, "reconstruction_epochs"),
        ("build", BuildConfig, {"batch_tokens": "(at least 1)"}, "examples_per_shard"),
        ("generate", GenerateConfig, {"num_beams": "(at least 1; default 1)"}, "do_sample, seed"),
    ):
        assert run(monkeypatch, verb, "--help") == 0
        help_text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        fields = {field.name: field for field in fields_of(kind)}
        for name, limits in common.items():
            assert f"--{name.replace('_', '-')} {fields[name].form()} {fields[name].help} {limits}" in help_text
        assert rest in help_text


def test_a_flag_that_is_given_is_handed_on():
    given = []

    @declared(one=Options(GenerateConfig, ("do_sample",)), two=Options(BuildConfig, ("dtype",)))
    def verb(one: dict, two: dict) -> None:
        given.append((one, two))

    verb(generateconfig_do_sample=True, buildconfig_dtype="int8")
    verb(generateconfig_do_sample=None, buildconfig_dtype=None)
    assert given == [({"do_sample": True}, {"dtype": "int8"}), ({}, {})]
    with pytest.raises(ConfigError, match="unknown --dtype 'int9'"):
        verb(generateconfig_do_sample=None, buildconfig_dtype="int9")


def test_a_message_about_settings_names_command_line_options():
    options = {"kappa": "--kappa", "on": "--set on="}

    def spell(name, value):
        return f"{options[name]} {value}" if name in options else None

    message = "kappa=0.2 with kind='a b', on=True and kappa=1e-05: --kappa=3, (kappa=None). Use x.kappa=3 or kappa=0."
    expected = (
        "--kappa 0.2 with kind='a b', --set on= true and --kappa 1e-05: --kappa=3, (--kappa none). "
        "Use x.kappa=3 or --kappa 0."
    )
    assert respell(message, spell) == expected


def test_the_help_of_task_names_all_tasks():
    """They are listed by hand there: the registry would slow down every command."""
    (option,) = TaskName.__metadata__
    assert all(name in option.help for name in TASKS)
