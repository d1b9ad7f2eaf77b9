"""Experiments: one setting in, one result with its signature out."""

import json

import pytest

from pema.errors import ConfigError
from pema.experiments import adaptation
from pema.experiments.data import Data
from pema.experiments.setting import Setting
from pema.files import read_json
from pema.tasks.example import Example

WORDS = ["Haus", "Hund", "Tag", "Ist", "Klein", "Hier", "Der", "Das"]
EXAMPLES = tuple(Example(f"the {word.lower()} is here", f"{word} ist hier") for word in WORDS)


@pytest.fixture(scope="module")
def data():
    marks = (["[F]Sie[/F] hier"] * 2, ["[F]du[/F] hier"] * 2)
    return Data("tiny", "translation", EXAMPLES, EXAMPLES[:2], EXAMPLES[:2], {"test": marks})


def small(preset="paper", **changes):
    return Setting(preset, changes={"rank": 4, "epochs": 1} | changes, schedule="constant", lambda_max=0.5)


def test_a_result_carries_scores_and_signature_and_is_not_made_twice(tiny_plm, data, tmp_path, monkeypatch):
    plm = tiny_plm("llama")
    result = adaptation.adapt(plm, data, small(), tmp_path)
    assert {"bleu", "chrf", "formality_accuracy", "memory_bytes", "train_seconds", "build_seconds"} <= result.keys()
    assert result["signature"]["config"]["data_sha256"] == data.digest()
    assert result["signature"]["config"]["plm"]["fingerprint"] == plm.description.fingerprint
    stored = tmp_path / "results" / f"{small().key}.test.json"
    assert read_json(stored) == json.loads(json.dumps(result))
    assert len(stored.with_suffix(".txt").read_text(encoding="utf-8").splitlines()) == 2
    monkeypatch.setattr(adaptation, "generate", lambda *_: pytest.fail("a finished result was made again"))
    assert adaptation.adapt(plm, data, small(), tmp_path) == read_json(stored)


def test_settings_share_memories_and_adapters(tiny_plm, data, tmp_path, monkeypatch):
    plm = tiny_plm("llama")
    adaptation.adapt(plm, data, small(), tmp_path)
    monkeypatch.setattr(adaptation, "train", lambda *_, **__: pytest.fail("a finished adapter was trained again"))
    adaptation.adapt(plm, data, Setting(**{**small().to_dict(), "schedule": "fitted"}), tmp_path)
    assert len(list((tmp_path / "memories").glob("*.json"))) == 1


def test_the_plm_alone_needs_no_memory(tiny_plm, data, tmp_path):
    result = adaptation.adapt(tiny_plm("llama"), data, Setting(), tmp_path)
    assert (result["memory_bytes"], result["train_seconds"]) == (0, 0)
    assert not (tmp_path / "memories").exists()


def test_keys_tell_settings_apart():
    settings = [
        Setting(),
        Setting("paper"),
        Setting("best"),
        Setting("best", seed=1),
        Setting("best", "predicted"),
        Setting("best", "predicted", "aligned"),
        Setting("best", changes={"kappa": 0.1}),
        Setting("best", schedule="linear"),
        Setting("best", schedule="linear", lambda_max=0.5),
    ]
    assert len({setting.key for setting in settings}) == len(settings)


def test_aligned_targets_are_for_predicted_contexts():
    with pytest.raises(ConfigError, match="contexts='predicted'"):
        Setting("best", "teacher", "aligned")


def test_the_digest_changes_with_one_character(data):
    changed = Data("tiny", "translation", (Example("x", "y"), *data.train[1:]), data.dev, data.test)
    assert changed.digest() != data.digest()
