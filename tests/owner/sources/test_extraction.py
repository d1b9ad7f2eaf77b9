"""LM head and tokenizer of a GGUF file, read without its layers."""

from pathlib import Path

import pytest
import torch

from gguf_files import build_llama, rounded, write_gguf
from pema.owner.local import LocalPLM
from pema.owner.sources import conversion, extraction
from pema.owner.sources.extraction import read_extracted
from pema.owner.sources.gguf import converted

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_the_head_is_that_of_the_converted_file_and_its_rows_are_exact(tmp_path, kind, tied, monkeypatch):
    monkeypatch.setattr(extraction, "ROWS", 100)  # in four parts
    model = build_llama(tied=tied)
    file = write_gguf(tmp_path / "tiny.gguf", kind, model=model)
    folder, _, weights = converted("tiny", lambda: [file], head_only=True)
    about, parts = read_extracted(Path(folder))
    plm = LocalPLM.load(file, dtype="auto")
    assert torch.equal(parts["weight"], plm.model.get_output_embeddings().weight)
    assert parts["weight"].dtype == plm.model.dtype
    assert torch.equal(parts["norm.weight"].to(plm.model.dtype), plm.model.model.norm.weight)
    assert weights == plm.description.weights
    values = model.get_output_embeddings().weight.detach().numpy()
    exact = torch.from_numpy(values if kind == "F32" else rounded(values, kind))
    assert torch.equal(about.rows(file, [319, 0, 7]), exact[[319, 0, 7]])
    assert (about.architecture, about.max_length, about.ends) == ("llama", 128, (2,))
    assert about.eps == pytest.approx(2.0**-20)
    assert about.parameters == sum(p.numel() for p in model.parameters())


def test_the_layers_are_not_read_and_the_second_start_reads_nothing(tmp_path, cache, monkeypatch, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    monkeypatch.setattr(conversion, "_model", lambda file: pytest.fail("the layers were read"))
    first = converted("tiny", lambda: [file], head_only=True)
    assert "reading the LM head and the tokenizer in the GGUF file of tiny, once" in capsys.readouterr().err
    monkeypatch.setattr(extraction, "extract", lambda *_: pytest.fail("it was read again"))
    assert converted("tiny", lambda: [file], head_only=True) == first
    assert [path.name for path in cache.iterdir()] == [Path(first[0]).name]


def test_a_damaged_copy_is_read_again(tmp_path, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    folder = Path(converted("tiny", lambda: [file], head_only=True)[0])
    content = (folder / extraction.TENSORS).read_bytes()
    (folder / extraction.TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    converted("tiny", lambda: [file], head_only=True)
    assert "is damaged: it is converted again" in capsys.readouterr().err
    assert (folder / extraction.TENSORS).read_bytes() == content
