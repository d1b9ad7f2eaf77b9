"""The format's page is complete: a memory is read by the page alone, without the package."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fake_plm import FakePLM, FakeTask, build, some_examples

from pema.memory import planning
from pema.memory.manifest import VERSION
from pema.owner.contract import STEP_BUCKET

PAGE = (Path(__file__).parents[2] / "docs" / "memory-format.md").read_text(encoding="utf-8")
NUMPY = {"F32": "<f4", "F16": "<f2", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}


def table(under):
    """First column of the first table below a heading."""
    section = PAGE.split(f"## {under}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")][2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def by_the_page(path):
    """The tensors of a shard."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(data[8 + size + first : 8 + size + last], NUMPY[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_shards_are_as_the_page_says(tmp_path, dtype):
    examples = some_examples(20)
    memory = build(tmp_path / "m", examples, dtype=dtype)
    (batch,) = memory.view().batches(10_000)
    found = []
    names = table("A shard")
    encoded = iter(FakeTask().template.encode(None, examples))
    for k in range(3):
        tensors = by_the_page(tmp_path / "m" / f"shard-{k:05d}.safetensors")
        scales = {"scales", "channel_scales"} if dtype == "int8" else set()
        sources = {"sources"} if memory.shards[k].entry.sources else set()
        optional = {"scales", "channel_scales", "sources", "written"}
        assert set(tensors) == set(names) - optional | scales | sources
        f = tensors["representations"].astype(np.float32)
        found.append(f * tensors["scales"][:, None] * tensors["channel_scales"] if dtype == "int8" else f)
        offsets = tensors["example_offsets"]
        for j, source_length in enumerate(tensors["source_lengths"]):
            one = next(encoded)
            assert tuple(tensors["targets"][offsets[j] : offsets[j + 1]]) == one.target
            assert source_length == one.source_length
            prompt = slice(*tensors["prompt_offsets"][j : j + 2])
            assert tuple(tensors["prompt_tokens"][prompt]) == one.prompt
            assert ((tensors["prompt_spellings"][prompt] >= 0) == (tensors["prompt_spans"][prompt] > 0)).all()
    assert np.array_equal(np.concatenate(found), batch.representations.numpy())


def test_the_manifest_is_as_the_page_says(tmp_path):
    examples = some_examples(20)
    build(tmp_path / "m", examples)
    text = (tmp_path / "m" / "manifest.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert list(values) == table("manifest.json")[: len(values)]
    assert text == json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    assert values["version"] == VERSION
    assert f"Format version {VERSION}." in PAGE
    rest = {name: value for name, value in values.items() if name != "digest"}
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert values["digest"] == hashlib.sha256(compact.encode()).hexdigest()
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.source.encode(), example.target.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    assert list(values["inputs"][0].pop("statistics")) == ["longest", "common", "line_breaks"]
    assert values["inputs"] == [{"sha256": digest.hexdigest(), "examples": 20, "examples_per_shard": 8}]
    for entry in (*values["head"], *values["shards"]):
        data = (tmp_path / "m" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert all(set(entry["prompts"]) == {"version", "tokens"} for entry in values["shards"])
    assert set(values["plm"]) == set(FakePLM().description.to_dict())
    assert all(f"`{name}`" in PAGE for name in values["plm"])


def test_the_pages_numbers_are_the_codes():
    assert STEP_BUCKET == 8
    assert planning.SHARD_BYTES == 128 * 2**20
    assert planning.steps_for(16, "aligned") == 24
