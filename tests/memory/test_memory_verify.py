import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_plm import FakePLM, build, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ExternalMemoryError
from pema.memory.manifest import Manifest, ShardEntry
from pema.memory.shard import write_shard
from pema.memory.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "m"
    build(path, 24, plm=FakePLM(tap="norm_input"), dtype="int8")
    return path


FILES = (
    "manifest.json",
    "head/head.json",
    "head/head.safetensors",
    *(f"shard-{k:05d}.safetensors" for k in range(3)),
)


def test_the_files_are_all_there_are(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(FILES)


def test_a_whole_memory_is_reported(folder):
    report = verify(folder)
    assert report.files == len(FILES)
    assert report.bytes == sum((folder / file).stat().st_size for file in FILES)
    assert (report.examples, report.pairs) == (24, Manifest.read(folder).pairs)


def spoilt(path, data):
    """What verify says of the memory while `path` holds `data`; None when it finds nothing."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        verify(path.parent.parent if path.parent.name == "head" else path.parent)
    except ExternalMemoryError as error:
        return str(error)
    finally:
        path.write_bytes(before)
    return None


@settings(max_examples=200, deadline=None)
@given(file=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found(folder, file, where, flip):
    data = bytearray((folder / file).read_bytes())
    data[int(where * len(data))] ^= flip
    assert file in spoilt(folder / file, bytes(data))


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(FILES), kept=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(folder, file, kept):
    data = (folder / file).read_bytes()
    assert file in spoilt(folder / file, data[: int(kept * len(data))])


@pytest.mark.parametrize("file", FILES)
def test_bytes_added_are_found(folder, file):
    assert file in spoilt(folder / file, (folder / file).read_bytes() + b"\n")


def test_every_byte_of_the_manifest_counts(folder):
    """Also the blanks between its values, which JSON does not care for."""
    data = (folder / "manifest.json").read_bytes()
    for k in range(0, len(data), 7):
        changed = data[:k] + bytes([data[k] ^ 0x2A]) + data[k + 1 :]  # turns " " into "\n" and back
        assert "manifest.json" in spoilt(folder / "manifest.json", changed)


def test_all_faults_are_named_at_once(folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / "shard-00000.safetensors").unlink()
    (copy / "shard-00001.safetensors").write_bytes(b"short")
    data = bytearray((copy / "shard-00002.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "shard-00002.safetensors").write_bytes(bytes(data))
    with pytest.raises(
        ExternalMemoryError,
        match=r"m is damaged: shard-00000.safetensors is missing; shard-00001.safetensors has 5 bytes, expected "
        r"[\d,]+; shard-00002.safetensors has changed since it was written \(its SHA-256 differs\). To fix it, restore",
    ):
        verify(copy)


def test_an_incomplete_memory_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    rewrite(tmp_path / "m", complete=False)
    with pytest.raises(ExternalMemoryError, match=r"is incomplete"):
        verify(tmp_path / "m")
    with pytest.raises(ExternalMemoryError, match=r"nowhere is not a memory"):
        verify(tmp_path / "nowhere")


def rebuilt(folder, copy, **changes):
    """A copy whose first shard is written anew with other contents, and a manifest that agrees."""
    from pema.memory.reader import Memory

    shutil.copytree(folder, copy)
    memory = Memory.open(copy)
    entry = write_shard(copy, 0, replace(memory.shards[0].contents(), **changes))
    rewrite(copy, shards=(entry, *memory.manifest.shards[1:]))


def test_what_no_build_writes_is_found(folder, tmp_path):
    n = Manifest.read(folder).shards[0].pairs
    rebuilt(folder, tmp_path / "t", targets=torch.full((n,), 101, dtype=torch.int32))
    with pytest.raises(
        ExternalMemoryError,
        match=r"t is damaged: shard-00000.safetensors has implausible content \(a target is outside",
    ):
        verify(tmp_path / "t")
    rebuilt(folder, tmp_path / "o", example_offsets=torch.tensor([0, 3, 2, 4, 5, 6, 7, 8, n]))
    with pytest.raises(
        ExternalMemoryError,
        match=r"shard-00000.safetensors has implausible content \(its example offsets do not increase",
    ):
        verify(tmp_path / "o")
    rebuilt(folder, tmp_path / "s", scales=torch.full((n,), float("nan")))
    with pytest.raises(
        ExternalMemoryError, match=r"shard-00000.safetensors has implausible content \(it contains NaN or infinity\)"
    ):
        verify(tmp_path / "s")
    shutil.copytree(folder, tmp_path / "h")
    rewrite(tmp_path / "h", plm=replace(Manifest.read(folder).plm, head_fingerprint="0" * 64))
    with pytest.raises(ExternalMemoryError, match=r"head is not the head of fake"):
        verify(tmp_path / "h")


def test_a_manifest_whose_counts_do_not_add_up_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    manifest = Manifest.read(folder)
    first: ShardEntry = manifest.shards[0]
    rewrite(tmp_path / "m", shards=(replace(first, pairs=first.pairs + 1), *manifest.shards[1:]))
    with pytest.raises(ExternalMemoryError, match=r"implausible content \(its tensors do not match the manifest\)"):
        verify(tmp_path / "m")
    rewrite(tmp_path / "m", shards=manifest.shards[:-1])
    with pytest.raises(ExternalMemoryError, match=r"m is incomplete \(16 of 24 examples\)"):
        verify(tmp_path / "m")


def test_the_manifest_is_json_that_reads_back(folder):
    manifest = Manifest.read(folder)
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert np.isfinite(manifest.bytes)
