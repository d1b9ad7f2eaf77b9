"""Headers of safetensors files: read as the library reads them, and refused if they are misleading."""

import math
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pema.errors import DataError
from pema.files import writing
from pema.tensors import BYTES, Place, is_finite, read_header, save_tensors

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TYPES += [torch.int8, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.sampled_from(TYPES), shapes), max_size=5))
def test_a_header_gives_the_location_of_every_tensor(tmp_path_factory, kinds):
    kinds = {name.encode("utf-8", "ignore").decode() or "x": kind for name, kind in kinds.items()}
    kinds.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("header") / "it"
    tensors = {name: (torch.rand(shape) * 9).to(dtype) for name, (dtype, shape) in kinds.items()}
    save_file(tensors, path, {"a": "b"})
    header = read_header(path)
    assert header.texts == {"a": "b"}
    assert set(header.places) == set(tensors)
    data = path.read_bytes()
    for name, place in header.places.items():
        assert place.shape == tuple(tensors[name].shape)
        assert BYTES[place.dtype] == tensors[name].element_size()
        assert data[place.start : place.stop] == tensors[name].view(-1).view(torch.uint8).numpy().tobytes() or not len(
            tensors[name].view(-1)
        )


@settings(max_examples=150, deadline=None)
@given(where=st.integers(0, 400), value=st.integers(0, 255))
def test_what_the_library_reads_otherwise_is_refused(tmp_path_factory, where, value):
    """With any byte changed: the same tensors as the library's own, or a DataError."""
    path = tmp_path_factory.mktemp("byte") / "it"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4)}, path, {"text": "t"})
    data = bytearray(path.read_bytes())
    data[where % len(data)] = value
    path.write_bytes(bytes(data))
    try:
        places = read_header(path).places
    except DataError:
        return
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(places)
        for name, place in places.items():
            assert tuple(opened.get_slice(name).get_shape()) == place.shape
            assert opened.get_slice(name).get_dtype() == place.dtype


def test_a_file_that_is_none_is_refused(tmp_path):
    for data, words in ((b"", "longer than the file"), (b"\xff" * 8, "longer than the file"), (b"1" * 7, "longer")):
        (tmp_path / "it").write_bytes(data)
        with pytest.raises(DataError, match=words):
            read_header(tmp_path / "it")
    with pytest.raises(DataError, match="No such file"):
        read_header(tmp_path / "nothing")


@given(st.lists(st.floats(width=16), max_size=20), st.sampled_from(TYPES[:4]))
def test_finite_is_what_each_entry_is(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    assert is_finite(tensor) == all(math.isfinite(value) for value in tensor.double().tolist())


def test_a_single_nan_among_many_is_found():
    x = torch.zeros(3, 300_001, dtype=torch.bfloat16)
    assert is_finite(x)
    for place in (0, 450_000, x.numel() - 1):
        for value in (math.nan, math.inf, -math.inf):
            spoilt = x.clone()
            spoilt.view(-1)[place] = value
            assert not is_finite(spoilt)
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.tensor([1, 2]))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with writing(tmp_path / "it") as temporary:
            save_tensors({"a": torch.zeros(3)}, temporary)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == mode
    assert read_header(tmp_path / "it").places["a"] == Place("F32", (3,), 64, 76)
