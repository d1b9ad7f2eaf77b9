"""The real data: what is written is what the configs read, example for example."""

import gzip
import json
from dataclasses import replace

import pytest

from pema.errors import DataError
from pema.experiments.config import read_config
from pema.tasks.example import Example
from pema.tasks.readers import read_examples, read_lines
from reproduction.data import real
from reproduction.studies import CONFIGS, STUDIES


def lines(path, some):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in some).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folders as the real ones are, with sentences made up."""
    folder = tmp_path_factory.mktemp("given")
    sizes = {"train.telephony": 200, "train.topical_chat": 200, "test.topical_chat": 20}
    for part, size in sizes.items():
        cocoa = folder / "cocoa-mt-en-de"
        lines(cocoa / f"{part}.en", [f"{part} {i}: can you\tcome?" for i in range(size)])
        lines(cocoa / f"{part}.formal.de", [f"{part} {i}: können Sie\tkommen?" for i in range(size)])
        for register, word in (("formal", "Sie"), ("informal", "du")):
            lines(cocoa / f"{part}.{register}.annotated.de", [f"{i} können [F]{word}[/F]" for i in range(size)])
    for part, size in {"train": 1500, "val": 250, "test_2016_flickr": 400}.items():
        for language in ("en", "de"):
            lines(folder / "multi30k-en-de" / f"{part}.{language}.gz", [f"{language} {part} {i}" for i in range(size)])
    for part, size in {"train": 20, "dev": 12, "test": 11}.items():
        rows = [json.dumps({"en": f"{part} {i}", "du": "sehr " * (60 * (i % 2)) + str(i)}) for i in range(size)]
        lines(folder / "wmt22-en-de" / f"{part}.jsonl.gz", rows)
    for part, size in {"dev": 60, "test": 7}.items():
        rows = [
            json.dumps({"source": f"name[{part} {i}]", "targets": [f"{part} {i}.", f"It is {i}."]}) for i in range(size)
        ]
        lines(folder / "e2e-nlg" / f"{part}.jsonl.gz", rows)
    return folder


def words(texts):
    """Stands for a tokenizer: one token a word, and one at the end."""
    return {"input_ids": [[*text.split(), "</s>"] for text in texts]}


def test_dev_and_train_of_cocoa_share_nothing_and_the_annotations_go_along(given):
    data = real.cocoa(given)
    assert (len(data.train), len(data.dev), len(data.test)) == (342, 58, 20)
    assert not {e.source for e in data.train} & {e.source for e in data.dev}
    formal, informal = data.annotated["dev"]
    numbers = [e.source.split(":")[0].split()[-1] for e in data.dev]
    assert formal == [f"{i} können [F]Sie[/F]" for i in numbers]
    assert informal == [f"{i} können [F]du[/F]" for i in numbers]


def test_parts_of_multi30k(given):
    some, every = real.multi30k(given), real.multi30k(given, None)
    assert [len(part) for part in (some.train, some.dev, some.test)] == [1000, 200, 300]
    assert len(every.train) == 1500
    assert every.train[:1000] == some.train
    assert real.multi30k(given, 1200).name == "multi30k-1200"


def test_long_sentences_of_wmt22_are_left_out(given, monkeypatch):
    monkeypatch.setattr(real, "LONGEST", 50)
    data = real.wmt22(given, words)
    assert [e.source for e in data.train] == [f"train {i}" for i in range(0, 20, 2)]


def test_the_restaurants_keep_their_texts_apart(given, tmp_path):
    data = real.e2e(given)
    assert [len(part) for part in (data.train, data.dev, data.test)] == [13, 47, 7]
    assert not {e.source for e in data.train} & {e.source for e in data.dev}
    assert all(len(e.references) == 2 for e in (*data.train, *data.test))
    assert not any(e.alternatives for e in data.dev)
    real.write(data, tmp_path)
    again = read_examples(data=tmp_path / "e2e-nlg" / "train.jsonl")
    assert [replace(e, where="") for e in again] == list(data.train)


def test_what_is_written_is_read_again(given, tmp_path):
    data = real.cocoa(given)
    real.write(data, tmp_path)
    folder = tmp_path / "cocoa-mt-formal"
    for part in ("train", "dev", "test"):
        found = [replace(e, where="") for e in read_examples(data=folder / f"{part}.jsonl")]
        assert found == [Example(e.source, e.target) for e in getattr(data, part)]
    for part in ("dev", "test"):
        for register, expected in zip(("formal", "informal"), data.annotated[part], strict=True):
            assert read_lines(folder / f"{part}.{register}.txt") == expected
    assert not (folder / "train.formal.txt").exists()
    assert str(given) not in (folder / "train.jsonl").read_text(encoding="utf-8")


def test_the_command_writes_what_the_configs_name(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data", str(given), "-o", str(tmp_path)])
    real.main()
    assert "multi30k: 1500 train, 200 dev, 300 test" in capsys.readouterr().out
    experiments = {
        name: read_config(CONFIGS / f"{name}.toml", study.kind, None if study.shipped else tmp_path)
        for name, study in STUDIES.items()
    }
    for name, made in (("ablations", real.cocoa(given)), ("memory-size", real.multi30k(given, None))):
        data = experiments[name].data
        assert data.digest() == made.digest()
        assert data.annotated.get("test") == made.annotated.get("test")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="cocoa-mt-en-de"):
        real.cocoa(tmp_path)
