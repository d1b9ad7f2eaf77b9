"""Memories and heads with valid checksums and impossible contents: refused by name, or equivalent to the original."""

import shutil

import pytest
import torch
from fake_plm import FakePLM, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import hostile
from tests.hostile import BOTTOMLESS, change_header, change_tensors, edit, read, sign_head, sign_manifest, sign_memory

from pema.errors import PemaError
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.owner.head import Head

HUGE = 10**30
SHARD = "shard-00001.safetensors"
ODD = [None, True, -1, 0, 1.5, 10**9, 10**13, HUGE, "", "x", "\x1b[2J", "\ud800", [], {}, [1], {"a": 1}, float("nan")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Memories in float16 and int8, with a norm in the head."""
    folder = tmp_path_factory.mktemp("hostile")
    for dtype in ("float16", "int8"):
        build(folder / dtype, 24, plm=FakePLM(tap="norm_input"), dtype=dtype)
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    shutil.copytree(originals / "int8", tmp_path / "m")
    return tmp_path / "m"


def contents(folder):
    """Everything that a memory gives its readers."""
    memory = Memory.open(folder)
    verify(folder)
    head = memory.head()
    values = [*memory.head(torch.bfloat16).state_dict().values(), *head.state_dict().values()]
    for batch in memory.view().batches(50):
        values += [batch.representations, batch.targets, batch.steps, batch.source_lengths]
        values.append(head.logits(batch.representations))
    return values, repr(memory.manifest.plm), memory.manifest.task, memory.manifest.template


def equal(mine, other):
    return all(torch.equal(a, b) for a, b in zip(mine[0], other[0], strict=True)) and mine[1:] == other[1:]


def refused(read):
    """The message with which reading fails; None where it does not. What is no error of ours is let through."""
    message = None
    try:
        read()
    except PemaError as error:
        message = str(error)
    assert message is None or message.isprintable()
    return message


MANIFEST = [
    ("plm.d", 10**9, r"plm.d=1000000000 is too large: it must be at most 1048576"),
    ("plm.d", 0, "plm.d=0 is too small"),
    ("plm.d", True, "plm.d=True must be a whole number"),
    ("plm.d", 8.0, "plm.d=8.0 must be a whole number"),
    ("plm.d", 9, r"is not the head of fake: its \(V, d, d_tap\) are \(101, 8, 8\), expected \(101, 9, 8\)"),
    ("plm.d_tap", 1 << 20, r"shards\[0\] cannot have [\d,]+ bytes with"),
    ("plm.vocabulary_size", 10**13, "plm.vocabulary_size=10000000000000 is too large"),
    ("plm.vocabulary_size", 50, "is not the head of fake"),
    ("plm.name", "\x1b[2Jfake", r"plm.name='\\x1b\[2Jfake' must be one line of printable"),
    ("plm.name", "", "plm.name='' must be one line"),
    ("plm.tap", "logits", "unknown plm.tap 'logits'"),
    ("plm.eos_token_ids", [10**13], r"plm.eos_token_ids\[0\]=10000000000000 is too large"),
    ("plm.colour", "red", "unknown setting 'plm.colour' of PLMDescription"),
    ("plm", None, "plm is None, not an object"),
    ("task", {"a": 1}, "task=an object of 1 items must be a text"),
    ("task", "a\x1bb", r"task='a\\x1bb' must be one line"),
    ("template", "\x1b]0;title\x07", "template=.* contains control characters"),
    ("template", "\ud800", "cannot be read as JSON"),
    ("contexts", ["teacher"], "unknown contexts a list of 1 items"),
    ("dtype", "int4", "unknown dtype 'int4': use float32, "),
    ("inputs", "x", "inputs='x' must be a list"),
    ("inputs", [], r"is incomplete \(24 of 0 examples\)"),
    ("inputs.0.examples", HUGE, r"inputs\[0\].examples=1000000000000000000000000000000 is too large"),
    ("inputs.0.sha256", "A" * 64, r"inputs\[0\].sha256=.* does not match the pattern"),
    ("head", [], "head lists no files"),
    ("head", lambda head: head[::-1], "head lists 'head/head.safetensors', 'head/head.json'"),
    ("head.0.file", "../outside", r"head lists '../outside'"),
    ("shards.0.file", "../outside", r"shards\[0\].file='../outside' must be 'shard-00000.safetensors'"),
    ("shards.0.file", "/etc/passwd", r"shards\[0\].file='/etc/passwd' must be"),
    ("shards", lambda shards: shards[:1] * 4, r"shards\[1\].file='shard-00000.safetensors' must be"),
    ("shards.0.bytes", -5, r"shards\[0\].bytes=-5 is too small"),
    ("shards.0.pairs", 10**12, r"shards\[0\] cannot have|too large"),
    ("shards.0.examples", 0, r"shards\[0\].examples=0 is too small"),
    ("shards.0.examples", 10**9, r"shards\[0\] cannot have"),
    ("shards.0", {}, r"'shards\[0\].file' is missing"),
    ("shards", {"0": 1}, "shards=an object of 1 items must be a list"),
    ("complete", "yes", "complete='yes' must be true or false"),
    ("complete", 1, "complete=1 must be true or false"),
    ("version", "1", "format version '1'"),
    ("version", [1], "format version a list of 1 items"),
    ("format", {"a": "\x1b"}, "has format an object of 1 items"),
    ("extra", 1, "unknown setting 'extra' of Manifest"),
    ("digest", "0" * 64, None),
]


@pytest.mark.parametrize(("place", "value", "words"), MANIFEST, ids=[f"{k}-{m[0]}" for k, m in enumerate(MANIFEST)])
def test_an_impossible_manifest_is_refused_at_opening(folder, originals, place, value, words):
    values = read(folder / "manifest.json")
    edit(values, place, value)
    sign_manifest(folder, values)
    if words is None:  # signing puts the right one there
        assert equal(contents(folder), contents(originals / "int8"))
        return
    with pytest.raises(PemaError, match=words) as caught:
        Memory.open(folder)
    assert "manifest.json" in str(caught.value) or "head" in str(caught.value) or "incomplete" in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(PemaError, match=words):
        verify(folder)


TEXTS = [
    (lambda text: text.replace('"dtype": "int8"', f'"dtype": {BOTTOMLESS}'), "nested too deeply"),
    (lambda text: text.replace('"dtype": "int8"', '"dtype": NaN'), "NaN is not a JSON number"),
    (lambda text: text.replace('"dtype": "int8"', '"dtype": "int8",\n  "dtype": "float16"'), "'dtype' occurs twice"),
    (lambda text: text.replace('"d": 8', '"d": ' + "8" * 5000), "Exceeds the limit"),
    (lambda text: text.replace('"d": 8', '"d": 1e999'), "1e999 is too large a number"),
    (lambda text: text[:100], "cannot be read as JSON"),
    (lambda text: "[]", "contains a JSON list"),
]


@pytest.mark.parametrize(("change", "words"), TEXTS)
def test_a_manifest_that_is_no_strict_json_is_refused(folder, change, words):
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    assert change(text) != text
    (folder / "manifest.json").write_text(change(text), encoding="utf-8")
    with pytest.raises(PemaError, match=words):
        Memory.open(folder)


@pytest.mark.parametrize(
    "file", ["manifest.json", "head/head.json", "head/head.safetensors", "shard-00001.safetensors"]
)
@pytest.mark.parametrize("kind", [hostile.device, hostile.pipe, hostile.sparse])
def test_files_without_end_are_not_waited_for(folder, file, kind):
    kind(folder / file)
    for read_ in (Memory.open, verify):
        with pytest.raises(PemaError, match=r"not a regular file|more than|is missing|bytes, expected"):
            read_(folder)


def tensors(**changes):
    def change(values):
        for name, make in changes.items():
            values[name.replace("_", ".") if name.startswith("norm") else name] = make(values)

    return change


def without(name):
    return lambda values: {key: value for key, value in values.items() if key != name}


def spoilt(name, value):
    def change(values):
        values[name].view(-1)[3] = value

    return change


HEAD_TENSORS = [
    (tensors(weight=lambda v: v["weight"][:50]), r"\(V, d, d_tap\) are \(50, 8, 8\)"),
    (tensors(weight=lambda v: v["weight"][:, :4]), r"norm.weight has shape \(8,\), expected \(4,\)"),
    (tensors(weight=lambda v: v["weight"].flatten()), r"its weight has shape \(808,\)"),
    (tensors(weight=lambda v: torch.zeros(0, 8)), r"its weight has shape \(0, 8\)"),
    (without("weight"), r"has no tensor weight \(W_hd\)"),
    (tensors(bias=lambda v: torch.zeros(100)), r"its bias has shape \(100,\), expected \(101,\)"),
    (tensors(bias=lambda v: torch.full((101,), float("inf"))), "its bias contains NaN or infinity"),
    (tensors(projection=lambda v: torch.zeros(8, 5)), r"its norm.weight has shape"),
    (tensors(projection=lambda v: torch.zeros(7, 8)), r"its projection has shape \(7, 8\)"),
    (tensors(other=lambda v: torch.zeros(1)), "has an unknown tensor 'other' for these"),
    (tensors(weight=lambda v: v["weight"].int()), "its weight is not floating-point"),
    (spoilt("weight", float("nan")), "its weight contains NaN or infinity"),
    (spoilt("norm.weight", float("-inf")), "its norm.weight contains NaN or infinity"),
    (spoilt("weight", 0.25), "does not match its fingerprint"),
    (tensors(norm_weight=lambda v: v["norm.weight"] * 2), "does not match its fingerprint"),
]


@pytest.mark.parametrize(("change", "words"), HEAD_TENSORS)
def test_an_impossible_head_is_refused(folder, change, words):
    change_tensors(folder / "head" / "head.safetensors", change)
    sign_head(folder / "head", read(folder / "head" / "head.json"))
    sign_memory(folder)
    with pytest.raises(PemaError, match=words):
        contents(folder)
    assert refused(lambda: verify(folder))
    for dtype in (None, torch.bfloat16):
        assert refused(lambda dtype=dtype: Memory.open(folder).head(dtype))


HEAD_SETTINGS = [
    ("settings", None, "settings is None, not an object"),
    ("settings.scale", "2", "settings.scale='2' must be a number"),
    ("settings.scale", 0, "settings.scale=0.0 is too small: it must be more than 0"),
    ("settings.scale", -1.0, "settings.scale=-1.0 is too small"),
    ("settings.scale", HUGE, "settings.scale=1000000000000000000000000000000 must be a number"),
    ("settings.soft_cap", 0.0, "settings.soft_cap=0.0 is too small"),
    ("settings.soft_cap", [1], "settings.soft_cap=a list of 1 items must be a number"),
    ("settings.norm", "rms", "settings.norm is 'rms', not an object"),
    ("settings.norm", None, "has an unknown tensor 'norm.weight' for these settings"),
    ("settings.norm.kind", "batch", "unknown settings.norm.kind 'batch': use layer or rms"),
    ("settings.norm.eps", -1.0, "settings.norm.eps=-1.0 is too small"),
    ("settings.norm.eps", True, "settings.norm.eps=True must be a number"),
    ("settings.norm.momentum", 1, "unknown setting 'settings.norm.momentum'"),
    ("settings.colour", 1, "unknown setting 'settings.colour'"),
    ("settings.scale", 2.0, "does not match its fingerprint"),
    ("fingerprint", 5, "fingerprint=5 must be a text"),
    ("fingerprint", "masked-0", r"head is not the head of fake \(its fingerprint differs\)"),
    ("format", 99, "has format 99"),
    ("format", "\x1b", r"has format '\\x1b'"),
    ("extra", 1, "unknown setting 'extra'"),
]


@pytest.mark.parametrize(("place", "value", "words"), HEAD_SETTINGS)
def test_impossible_settings_of_a_head_are_refused(folder, place, value, words):
    content = read(folder / "head" / "head.json")
    edit(content, place, value)
    sign_head(folder / "head", content)
    sign_memory(folder)
    for read_ in (verify, contents):
        with pytest.raises(PemaError, match=words):
            read_(folder)


def header(name, key, value):
    def change(values):
        values[name][key] = value

    return change


def overlapping(values):
    values["source_lengths"]["data_offsets"] = values["targets"]["data_offsets"][:1] * 2
    start = values["targets"]["data_offsets"][0]
    values["source_lengths"]["data_offsets"] = [start, start + 4 * values["source_lengths"]["shape"][0]]


def floating(values):
    for value in values.values():
        value["data_offsets"] = [float(number) for number in value["data_offsets"]]


HEADERS = [
    (header("targets", "data_offsets", [0.0, 4.0]), "are not a list of integers"),
    (
        lambda v: [v[n].update(data_offsets=[float(x) for x in v[n]["data_offsets"]]) for n in v] and None,
        "not a list of integers",
    ),
    (overlapping, "the offsets of '[a-z_]+' in it are wrong"),
    (header("targets", "data_offsets", [-4, 0]), "not a list of integers"),
    (header("targets", "shape", [1 << 61]), "the offsets of 'targets' in it are wrong"),
    (header("targets", "shape", [1 << 63]), "not a list of integers"),
    (header("targets", "dtype", "F32"), "its tensors do not match the manifest"),
    (header("targets", "dtype", ["I32"]), "'targets' in it has an unknown type"),
    (lambda v: v.pop("targets") and None, "in it are wrong"),
    (lambda v: v.update(extra=dict(v["targets"])), "in it are wrong"),
    (lambda v: v.update({"more": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}), "do not match the manifest"),
    (lambda v: v.update(__metadata__=[1]), "the metadata in its header is not text"),
    (lambda v: v.update(targets=3), "does not describe 'targets'"),
    (lambda v: BOTTOMLESS.encode(), "nested too deeply"),
    (lambda v: b'{"a": 1, "a": 2}', "'a' occurs twice"),
    (lambda v: b"[]", "contains a JSON list"),
]


@pytest.mark.parametrize(("change", "words"), HEADERS)
def test_an_impossible_header_of_a_shard_is_refused_at_opening(folder, change, words):
    change_header(folder / "shard-00001.safetensors", change)
    sign_memory(folder)
    with pytest.raises(PemaError, match=rf"shard-00001.safetensors is damaged \(.*{words}|shards\[1\] cannot have"):
        Memory.open(folder)


@pytest.mark.parametrize("length", [0, 1, 1 << 30, (1 << 64) - 1])
def test_an_impossible_length_of_a_header_is_refused(folder, length):
    change_header(folder / "shard-00001.safetensors", lambda v: None, length)
    sign_memory(folder)
    with pytest.raises(PemaError, match=r"shard-00001.safetensors is damaged"):
        Memory.open(folder)


SHARDS = [
    (spoilt("source_lengths", 0), r"a source length is outside 1 to 64"),
    (spoilt("source_lengths", -7), r"a source length is outside 1 to 64"),
    (spoilt("source_lengths", 65), r"a source length is outside 1 to 64"),
    (spoilt("targets", 101), "a target is outside the vocabulary of 101"),
    (spoilt("targets", -1), "a target is outside the vocabulary"),
    (spoilt("example_offsets", 10**9), "its example offsets do not increase"),
    (spoilt("scales", float("nan")), "NaN or infinity"),
    (spoilt("scales", -1.0), "one of its scales is negative"),
    (spoilt("channel_scales", 0.0), "its channel scales are not positive"),
    (spoilt("channel_scales", float("inf")), "its channel scales are not positive"),
]


@pytest.mark.parametrize(("change", "words"), SHARDS)
def test_impossible_contents_of_a_shard_are_found(folder, tmp_path, change, words):
    change_tensors(folder / "shard-00001.safetensors", change)
    sign_memory(folder)
    with pytest.raises(PemaError, match=rf"shard-00001.safetensors has implausible content \(.*{words}"):
        verify(folder)
    refused(lambda: list(Memory.open(folder).view().batches(7)))
    refused(lambda: sample(folder, tmp_path / "s", 60))


def test_nan_in_a_floating_shard_is_found(originals, tmp_path):
    shutil.copytree(originals / "float16", tmp_path / "m")
    change_tensors(tmp_path / "m" / "shard-00000.safetensors", spoilt("representations", float("nan")))
    sign_memory(tmp_path / "m")
    with pytest.raises(PemaError, match=r"has implausible content \(it contains NaN or infinity\)"):
        verify(tmp_path / "m")


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_signed_change_of_the_json_is_refused_or_harmless_at_length(originals, tmp_path_factory, data):
    change_json(originals, tmp_path_factory, data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_signed_change_of_the_json_is_refused_or_harmless(originals, tmp_path_factory, data):
    change_json(originals, tmp_path_factory, data)


def change_json(originals, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any") / "m"
    shutil.copytree(originals / "int8", folder)
    file = data.draw(st.sampled_from(["manifest.json", "head/head.json"]))
    values = read(folder / file)
    place = data.draw(st.sampled_from(sorted(places_of(values))))
    edit(values, place, data.draw(st.sampled_from(ODD)))
    if file == "manifest.json":
        sign_manifest(folder, values)
    else:
        sign_head(folder / "head", values)
        sign_memory(folder)
    if refused(lambda: contents(folder)) is None:
        assert equal_but_names(contents(folder), contents(originals / "int8"))
    shutil.rmtree(folder)


def places_of(values):
    return set(hostile.places(values)) - {"digest", "checksum"}


def equal_but_names(mine, other):
    """The representations, targets and head are the original's; a name or a template may be another's."""
    return all(torch.equal(a, b) for a, b in zip(mine[0], other[0], strict=True))


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_any_signed_byte_of_a_head_is_refused_or_harmless(originals, tmp_path_factory, where, value):
    folder = tmp_path_factory.mktemp("byte") / "m"
    shutil.copytree(originals / "int8", folder)
    path = folder / "head" / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] = value
    path.write_bytes(bytes(data))
    sign_head(folder / "head", read(folder / "head" / "head.json"))
    sign_memory(folder)
    if refused(lambda: contents(folder)) is None:
        assert equal(contents(folder), contents(originals / "int8"))
    shutil.rmtree(folder)


def test_a_head_of_another_party_is_held_to_its_fingerprint():
    head = Head(torch.eye(4), torch.ones(4))
    assert torch.equal(Head.of(head.state_dict(), head.settings, head.fingerprint).weight, head.weight)
    for wrong, words in (
        (
            (head.state_dict() | {"weight": 2 * torch.eye(4)}, head.settings, head.fingerprint),
            "does not match its f",
        ),
        ((head.state_dict(), head.settings | {"scale": 2.0}, head.fingerprint), "does not match its fingerprint"),
        ((head.state_dict(), head.settings | {"scale": "1"}, head.fingerprint), "cannot be used: settings.scale='1'"),
        ((head.state_dict(), None, head.fingerprint), "settings is None, not an object"),
        (({}, head.settings, head.fingerprint), "cannot be used: it has no tensor weight"),
    ):
        with pytest.raises(PemaError, match=words):
            Head.of(*wrong)
