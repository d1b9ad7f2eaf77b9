"""Texts of replicas on a Ray cluster: those of one process, whichever replica writes them, or dies."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ray_texts import open_fatal, open_mortal, open_refusing, open_tiny
from test_copying_generation import make as make_copying
from test_decoding import TASK, make_adapter

from pema.adapter.schedule import Constant, GradualUnrolling
from pema.cli import main
from pema.cluster.opening import replicas
from pema.errors import ConfigError, DataError, MismatchError, OwnerError, ProcessError
from pema.evaluation.tuning import tune
from pema.generation.classification import classify
from pema.generation.decoding import generate, generate_counted
from pema.generation.replicated import require_decoding
from pema.owner.opening import open_plm
from pema.tasks.example import Example

EXAMPLES = [Example(word, word) for word in ("the house", "a dog", "small")]
LABELS = ["a house", "a dog", "the small dog", "the house is here", "small"]
WORDS = ("the", "house", "is", "small", "a", "dog", "here", "and")
SOURCES = [" ".join(random.Random(i).choices(WORDS, k=1 + i % 9)) for i in range(20)]
SETTINGS = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "seed": 3, "temperature": 1.3, "top_p": 0.95},
    {"do_sample": True, "num_beams": 2},
    {"repetition_penalty": 1.5},
    {"stop": ("e", "!"), "max_new_tokens": 9, "min_new_tokens": 2},
]


def test_the_texts_are_those_of_one_process_though_a_replica_is_killed(ray, tiny_plm, tmp_path, capsys):
    alone = open_tiny()
    adapter, copying = make_adapter(alone), make_copying(tiny_plm)[1]
    with replicas(partial(open_mortal, str(tmp_path / "flag"), 6), workers=2) as plm:
        for settings in SETTINGS:
            arguments = SOURCES, TASK, Constant(0.5)
            expected = generate_counted(alone, adapter, *arguments, batch_size=4, **settings)
            assert generate_counted(plm, adapter, *arguments, batch_size=4, **settings) == expected
        assert (tmp_path / "flag").exists()
        assert "A worker has ended, its work is given to another" in capsys.readouterr().err
        for which, schedule in ((None, None), (copying, GradualUnrolling(0.9))):
            expected = generate(alone, which, SOURCES, TASK, schedule, batch_size=7)
            assert generate(plm, which, SOURCES, TASK, schedule, batch_size=7) == expected
        assert generate(plm, adapter, [], TASK, Constant(0.5)) == []
        assert generate(plm, adapter, SOURCES[:1], TASK) == generate(alone, adapter, SOURCES[:1], TASK)
        tunings = [tune(each, make_adapter(alone), EXAMPLES, metric="chrf", task=TASK) for each in (alone, plm)]
        assert tunings[0] == tunings[1]
        for every in (True, False):
            expected = classify(alone, adapter, SOURCES, LABELS, TASK, batch_size=4, probabilities=every)
            labels = classify(plm, adapter, SOURCES, LABELS, TASK, batch_size=4, probabilities=every)
            assert labels.choices == expected.choices
            assert (labels.log_probs is None) if not every else torch.equal(labels.log_probs, expected.log_probs)
        _refusals(plm, adapter)


def _refusals(plm, adapter):
    for settings, message in (
        ({"logits_processor": [print]}, "logits_processor is an object of this process, which replicas cannot have"),
        ({"num_return_sequences": 2}, "num_return_sequences is not a setting of pema.generate"),
        ({"temperature": 2.0}, "temperature has no effect without do_sample=True"),
        ({"do_sample": True, "temperature": -1.0}, "the model cannot generate with .*temperature=-1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(plm, adapter, SOURCES, TASK, Constant(0.5), **settings)

    class Own:
        def weights(self, step, input_length):
            return step * 0.0

    with pytest.raises(ConfigError, match=r"the schedule .* is an object of this process, which replicas cannot have"):
        generate(plm, adapter, SOURCES, TASK, Own())
    with pytest.raises(ConfigError, match=r"the schedule .* is an object of this process, which replicas cannot have"):
        classify(plm, adapter, SOURCES, LABELS, TASK, Own())
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        classify(plm, make_adapter(open_tiny("opt")), SOURCES, LABELS, TASK)
    with pytest.raises(DataError, match="source 2"):
        generate(plm, adapter, ["the house", " "], TASK)
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        generate(plm, make_adapter(open_tiny("opt")), SOURCES, TASK)


@pytest.mark.slow
def test_positions_that_depend_on_the_batch_are_decoded_as_in_one_process(ray):
    alone = open_tiny("phi3-longrope")
    adapter = make_adapter(alone)
    with replicas(partial(open_tiny, "phi3-longrope"), workers=2) as plm:
        expected = generate(alone, adapter, SOURCES, TASK, Constant(0.5), batch_size=8)
        assert generate(plm, adapter, SOURCES, TASK, Constant(0.5), batch_size=8) == expected


@pytest.mark.slow
def test_sources_that_end_every_replica_are_named(ray):
    message = r"3 workers ended at the sources \d+, \d+, \d+: .* If memory was short, give a smaller batch_size"
    with replicas(open_fatal, workers=1) as plm, pytest.raises(ProcessError, match=message):
        generate(plm, None, SOURCES, TASK, batch_size=3)


@pytest.mark.slow
def test_an_error_of_the_plm_arrives_and_the_replicas_go_on(ray):
    with replicas(open_refusing, workers=2) as plm:
        with pytest.raises(OwnerError, match=r"^429: over the quota of the day$"):
            generate(plm, None, SOURCES, TASK, batch_size=1)
        while plm._left:
            plm._step({})
        assert generate(plm, None, SOURCES[:3], TASK, batch_size=3) == generate(open_tiny(), None, SOURCES[:3], TASK)


def _run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["pema", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.slow
def test_the_commands_write_the_files_of_one_process(ray, tmp_path, monkeypatch):
    make_adapter(open_plm("embedded")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "in.txt").write_text("\n".join(SOURCES), encoding="utf-8")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    common = (tmp_path / "adapter", "--plm", "embedded", "--task", "translation", "--batch-size", 4)
    common += ("--input", tmp_path / "in.txt")
    for verb in (
        ("generate", *common, "--set", "do_sample=true", "--set", "temperature=0.7"),
        ("classify", *common, "--labels", tmp_path / "labels.txt"),
    ):
        assert _run(monkeypatch, *verb, "-o", tmp_path / "alone.jsonl") == 0
        assert _run(monkeypatch, *verb, "--engine", "ray", "--workers", 2, "-o", tmp_path / "ray.jsonl") == 0
        assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


@pytest.mark.parametrize("verb", [("generate",), ("classify", "--labels", "labels.txt")])
def test_an_api_is_refused_before_anything_starts(monkeypatch, capsys, verb):
    monkeypatch.setattr("pema.cli.options.require_library", lambda *_: None)
    assert _run(monkeypatch, *verb, "adapter", "--plm", "api.toml", "--engine", "ray", "-o", "out.txt") == 2
    assert "pema: api.toml describes an API: one process sends its requests side by side" in capsys.readouterr().err


def test_replicas_of_an_api_are_refused():
    class API:
        proposer = object()

    pool = SimpleNamespace(description=SimpleNamespace(name="gpt"), ask=lambda function: function(API()))
    with pytest.raises(ConfigError, match=r"gpt gives its likeliest tokens only: .* Generate without replicas"):
        require_decoding(pool)


def test_settings_of_ray_need_it_on_the_command_line(monkeypatch, capsys):
    assert _run(monkeypatch, "generate", "adapter", "--plm", "embedded", "--workers", 2, "-o", "out.txt") == 2
    assert "pema: --workers 2 is a setting of --engine ray: give that, or omit it" in capsys.readouterr().err
