"""Adapters and head bundles in object storage."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from fake_plm import FakePLM, FakeTask, build, files, some_examples
from faulty_files import Fault

from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.adapter.store import ADAPTER, read_config
from pema.adapter.training import train
from pema.errors import AdapterError, MismatchError, OwnerError, StorageError
from pema.generation.rounds import adapt
from pema.memory.config import BuildConfig
from pema.owner.head import Head
from pema.owner.places import HEAD_BUNDLE
from pema.storage.publishing import destination, publish

AT = "faulty://bucket/adapter"
QUICK = TrainConfig(rank=2, epochs=1, batch_size=32)


class Killed(BaseException):
    """The end of the process, which no code handles."""


def made(seed=0):
    adapter = Adapter(AdapterConfig(rank=2, d=8, vocabulary_size=101), seed=seed)
    return adapter


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("made") / "memory", some_examples(24), examples_per_shard=12)


def same(first, second):
    return all(tensor.equal(second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_an_adapter_makes_the_round_trip(tmp_path, faulty):
    adapter = made()
    adapter.save_pretrained(AT)
    adapter.save_pretrained(tmp_path / "adapter")
    assert faulty.content("bucket/adapter") == files(tmp_path / "adapter")
    assert faulty.requests("write") == ["README.md", "adapter_model.safetensors", "adapter_config.json"]
    shutil.rmtree(tmp_path / "cache")
    again = Adapter.from_pretrained(AT)
    assert same(adapter, again)
    assert again.name == adapter.name == "adapter"
    assert read_config(AT) == adapter.config


def test_another_schedule_may_replace_an_adapter_and_other_weights_may_not(faulty):
    adapter = made()
    adapter.save_pretrained(AT)
    adapter.config = replace(adapter.config, schedule=Constant(0.3))
    adapter.save_pretrained(AT)
    assert Adapter.from_pretrained(AT).config.schedule == Constant(0.3)
    with pytest.raises(StorageError, match="faulty://bucket/adapter already contains another adapter"):
        made(seed=1).save_pretrained(AT)
    assert same(Adapter.from_pretrained(AT), adapter)


def test_a_training_at_an_address_is_the_same_as_on_the_disk(tmp_path, faulty, memory):
    adapter, figures = train(memory, QUICK, AT)
    here, _ = train(memory, QUICK, tmp_path / "adapter")
    assert same(adapter, here)
    names = set(files(tmp_path / "adapter"))
    assert names == set(faulty.content("bucket/adapter"))
    assert "training.jsonl" in names
    assert same(Adapter.from_pretrained(AT), here)
    with pytest.raises(AdapterError, match="already contains an adapter"):
        train(memory, QUICK, AT)
    again, figures_again = train(memory, QUICK, AT, resume=True)
    assert same(again, here)
    assert figures_again == figures


def test_a_killed_upload_of_a_trained_adapter_is_resumed_without_training(faulty, memory, monkeypatch):
    faulty.faults.append(Fault("write", "adapter_model*", Killed(), after=0.5))
    with pytest.raises(Killed):
        train(memory, QUICK, AT)
    with pytest.raises(AdapterError, match="contains no adapter"):
        Adapter.from_pretrained(AT)
    monkeypatch.setattr("pema.adapter.training.JointRun", None)
    adapter, figures = train(memory, QUICK, AT, resume=True)
    assert figures
    assert same(adapter, Adapter.from_pretrained(AT))


def test_rounds_at_an_address_are_the_same_as_on_the_disk(tmp_path, faulty):
    arguments = (some_examples(12), FakeTask(), QUICK, BuildConfig())
    examples, task, training, building = arguments
    for place in (tmp_path / "adapted", "faulty://bucket/adapted"):
        adapt(FakePLM(), examples, task, place, training, building)
    there, here = faulty.content("bucket/adapted"), files(tmp_path / "adapted")
    assert there.keys() == here.keys()
    assert all(there[name] == here[name] for name in here if name.startswith("memory/") or "model" in name)
    plm = FakePLM()
    adapt(plm, examples, task, "faulty://bucket/adapted", training, building)
    assert plm.calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "contains an adapter of type 'LORA', not PEMA"),
        ({"format": 99}, "has format 99, this version reads 2"),
        ({"format": 1}, "contains an adapter of format 1, which has no checksums: load it from a local folder"),
        ({"model_sha256": "../../etc"}, r"model_sha256='../../etc' is not a SHA-256"),
        (None, "contains no adapter: it cannot be read as JSON"),
    ],
)
def test_a_damaged_config_is_refused_before_anything_is_fetched(faulty, changes, message):
    made().save_pretrained(AT)
    path = f"{AT}/adapter_config.json"
    content = json.loads(faulty().cat_file(path))
    faulty().pipe_file(path, b"{" if changes is None else json.dumps(content | changes).encode())
    faulty.calls.clear()
    with pytest.raises(AdapterError, match=message):
        Adapter.from_pretrained(AT)
    assert faulty.requests("read") == ["adapter_config.json"]
    if changes is not None:  # `{` is the beginning of a config: what a broken upload leaves
        with pytest.raises(StorageError, match="already contains another adapter"):
            made().save_pretrained(AT)


def test_a_head_bundle_makes_the_round_trip(tmp_path, faulty):
    head = FakePLM(tap="norm_input").head()
    head.save("faulty://bucket/head")
    assert faulty.requests("write") == ["head.safetensors", "head.json"]
    head.save("faulty://bucket/head")  # the same one
    assert faulty.requests("write") == []
    shutil.rmtree(tmp_path / "cache")
    again = Head.load("faulty://bucket/head")
    assert again.fingerprint == head.fingerprint
    assert again.weight.equal(head.weight)
    with pytest.raises(StorageError, match="already contains another head bundle"):
        Head(torch.zeros(3, 2)).save("faulty://bucket/head")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda content: b"[]", OwnerError, "faulty://bucket/head contains no readable head bundle"),
        (
            lambda content: content.replace(b'"format": 1', b'"format": 7'),
            OwnerError,
            "has format 7, this version reads 1",
        ),
        (
            lambda content: content.replace(b'"scale": 1.0', b'"scale": 2.0'),
            MismatchError,
            "its checksum does not match",
        ),
        (lambda content: content.replace(b'"scale": 1.0', b'"scale": -1.0'), OwnerError, "cannot be used: "),
    ],
)
def test_a_damaged_head_bundle_is_refused(faulty, change, kind, message):
    FakePLM().head().save("faulty://bucket/head")
    path = "faulty://bucket/head/head.json"
    faulty().pipe_file(path, change(faulty().cat_file(path)))
    with pytest.raises(kind, match=message):
        Head.load("faulty://bucket/head")


def test_a_folder_without_an_adapter_is_not_published(tmp_path, faulty):
    with destination(AT, ADAPTER) as folder:
        folder.mkdir(parents=True)
        (folder / "notes").write_text("")
    assert faulty.content("bucket/adapter") == {}
    FakePLM().head().save(tmp_path / "head")
    (tmp_path / "head" / "head.safetensors").write_bytes(b"")
    with pytest.raises(OwnerError, match=r"head.safetensors is missing or damaged"):
        publish(tmp_path / "head", "faulty://bucket/head", HEAD_BUNDLE)


def test_a_checkpoint_in_the_work_folder_is_kept_when_an_adapter_is_saved(faulty, memory, monkeypatch):
    def die(run, digest):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pema.adapter.joint.JointRun.finish", die)
        with pytest.raises(Killed):
            train(memory, QUICK, AT)
    made().save_pretrained(AT)
    faulty.store.clear()
    with pytest.raises(AdapterError, match="contains the checkpoint of a training that has not ended"):
        train(memory, QUICK, AT)
