"""Memories, adapters and head bundles on an S3 server, whose answers and connections break in the middle."""

import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_plm import build, files, some_examples

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.ray import train_on_ray
from pema.adapter.training import train
from pema.errors import ExternalMemoryError, StorageError
from pema.memory.places import MEMORY
from pema.memory.reader import Memory
from pema.memory.verify import verify
from pema.owner.head import Head
from pema.storage import remote
from pema.storage.publishing import publish

if not (find_spec("moto") and find_spec("s3fs") and find_spec("flask_cors")):
    pytest.skip("the extra s3 and moto are not installed", allow_module_level=True)

from s3_server import s3_server

ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # our own attempts are tested
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
SECONDS = 120


@pytest.fixture(scope="session")
def _server():
    with s3_server() as (address, breakable):
        yield address, breakable


@pytest.fixture
def s3(_server, monkeypatch):
    """The server, with an empty bucket `bucket`."""
    import s3fs

    address, breakable = _server
    for name, value in (ACCOUNT | {"AWS_ENDPOINT_URL": address}).items():
        monkeypatch.setenv(name, value)
    breakable.plan.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):
        request = urllib.request.Request(f"{address}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert answer.status == 200
    breakable.requests.clear()
    return breakable


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("made") / "memory", some_examples(12), examples_per_shard=4).path


AT = "s3://bucket/a/memory"


def test_a_memory_makes_the_round_trip(tmp_path, s3, memory):
    publish(memory, AT, MEMORY)
    shutil.rmtree(tmp_path / "cache")
    assert files(Memory.open(AT).path) == files(memory)
    assert s3.count("PUT") == len(files(memory))
    assert verify(AT) == verify(memory)


def test_head_bundles_and_adapters_make_the_round_trip(tmp_path, s3, memory):
    head = Memory.open(memory).head()
    head.save("s3://bucket/head")
    adapter = Adapter(AdapterConfig(rank=2, d=8, vocabulary_size=101))
    adapter.save_pretrained("s3://bucket/adapter")
    shutil.rmtree(tmp_path / "cache")
    assert Head.load("s3://bucket/head").fingerprint == head.fingerprint
    again = Adapter.from_pretrained("s3://bucket/adapter")
    assert again.A.equal(adapter.A)
    assert again.name == "adapter"


@pytest.mark.parametrize("fault", ["503", "drop", "cut"])
def test_passing_faults_change_nothing(tmp_path, s3, memory, fault):
    s3.plan += [["PUT", r"shard-00001", fault, 2], ["PUT", "manifest", fault, 1], ["HEAD", "shard-00000", fault, 1]]
    s3.plan += [
        ["GET", r"shard-00002", fault, 2],
        ["GET", "manifest", fault, 1],
        ["GET", r"head\.safetensors", fault, 1],
    ]
    publish(memory, AT, MEMORY)
    shutil.rmtree(tmp_path / "cache")
    for entry in s3.plan:
        entry[3] = 2
    assert files(Memory.open(AT).path) == files(memory)


def test_a_lasting_503_is_named_and_leaves_no_memory(tmp_path, s3, memory):
    s3.plan.append(["PUT", "shard-00002", "503", 1000])
    with pytest.raises(StorageError, match=r"s3://bucket/a/memory/shard-00002.safetensors cannot be written .*tried 5"):
        publish(memory, AT, MEMORY)
    with pytest.raises(ExternalMemoryError, match="contains no memory"):
        Memory.open(AT)
    s3.plan.clear()
    s3.requests.clear()
    publish(memory, AT, MEMORY)
    assert s3.count("PUT") == 2  # the third shard and the manifest
    verify(AT)


@pytest.mark.parametrize("file", ["shard-00000", "shard-00002", "manifest"])
def test_a_process_that_is_killed_while_it_uploads_leaves_no_memory(tmp_path, s3, memory, file):
    arrived, go_on = threading.Event(), threading.Event()

    def wait():
        arrived.set()
        go_on.wait(SECONDS)
        raise ConnectionResetError  # the connection of the killed process

    s3.plan.append(["PUT", file, wait, 1])
    here = Path(__file__).parent
    paths = os.pathsep.join([*(path for path in sys.path if path), str(here)])
    command = [sys.executable, str(here / "publishing_process.py"), str(memory), AT]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE) as process:
        assert arrived.wait(SECONDS)
        process.kill()
        output, _ = process.communicate(timeout=SECONDS)
    go_on.set()
    assert output == b""
    with pytest.raises(ExternalMemoryError, match="contains no memory"):
        Memory.open(AT)
    s3.plan.clear()
    s3.requests.clear()
    publish(memory, AT, MEMORY)
    names = [*sorted(files(memory).keys() - {"manifest.json"}), "manifest.json"]
    missing = names[[name.startswith(file) for name in names].index(True) :]
    assert [path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"] == [
        name.rpartition("/")[2] for name in missing
    ]
    shutil.rmtree(tmp_path / "cache")
    assert files(Memory.open(AT).path) == files(memory)


def test_an_upload_in_parts_that_breaks_is_no_file(s3, tmp_path, memory, monkeypatch):
    """s3fs uploads large files in parts, here from 5 MiB on; parts alone are no file."""
    import s3fs

    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    head = Head(torch.randn(180_000, 16))
    s3.plan.append(["PUT", "head.safetensors", "503", 1000])
    with pytest.raises(StorageError, match=r"head.safetensors cannot be written"):
        head.save("s3://bucket/head")
    assert s3fs.S3FileSystem().find("bucket/head") == []
    s3.plan.clear()
    head.save("s3://bucket/head")
    shutil.rmtree(tmp_path / "cache")
    assert Head.load("s3://bucket/head").fingerprint == head.fingerprint


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(StorageError, match=r"s3://nowhere/memory/manifest.json cannot be read .*bucket does not exist"):
        Memory.open("s3://nowhere/memory")


def test_missing_credentials_are_named(s3, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        StorageError, match=r"\(NoCredentialsError: .*\): give credentials that allow it in the environ"
    ):
        Memory.open(AT)


@pytest.mark.slow
def test_workers_on_a_cluster_train_from_an_address_to_an_address(s3, memory, cluster, tmp_path):
    publish(memory, AT, MEMORY)
    shutil.rmtree(tmp_path / "cache")
    s3.requests.clear()
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    config = preset("residual", rank=4, epochs=1, batch_size=16, precision="float32")
    adapter, _ = train_on_ray(AT, config, "s3://bucket/trained", workers=2, address=cluster.address)
    expected, _ = train(Memory.open(memory), config, tmp_path / "expected")
    assert s3.count("GET", "shard-00001") == 1  # both workers have one cache here
    assert adapter.name == "trained"
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(adapter.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
