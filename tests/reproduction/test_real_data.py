"""The real data: what is written is what the configs read, example for example."""

import gzip
import json
import tomllib
from collections import Counter
from dataclasses import replace

import pytest

from pema.cli.demonstrate import demonstrate
from pema.errors import DataError
from pema.experiments.config import read_config
from pema.experiments.data import SHIPPED
from pema.tasks.example import Example, one_target_each
from pema.tasks.readers import read_examples, read_lines
from reproduction.data import real
from reproduction.paths import CONFIGS


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
        lines(cocoa / f"{part}.informal.de", [f"{part} {i}: kannst du\tkommen?" for i in range(size)])
        for register, word in (("formal", "Sie"), ("informal", "du")):
            lines(cocoa / f"{part}.{register}.annotated.de", [f"{i} können [F]{word}[/F]" for i in range(size)])
    for part, size in {"train": 1500, "val": 250, "test_2016_flickr": 400}.items():
        for language in ("en", "de"):
            lines(folder / "multi30k-en-de" / f"{part}.{language}.gz", [f"{language} {part} {i}" for i in range(size)])
    for part, size in {"dev": 60, "test": 7}.items():
        rows = [
            json.dumps({"source": f"name[{part} {i}]", "targets": [f"{part} {i}.", f"It is {i}."]}) for i in range(size)
        ]
        lines(folder / "e2e-nlg" / f"{part}.jsonl.gz", rows)
    several = [{"source": f"fact {i}", "targets": [f"text {i}-{n}" for n in range(2)]} for i in range(120)]
    single = [{"source": f"message {i}", "target": "ab"[i % 2]} for i in range(40)]
    for part in ("train", "dev", "test"):
        rows = [json.dumps(row | {"seen": i % 2 == 0}) for i, row in enumerate(several)]
        lines(folder / "webnlg-2017" / f"{part}.jsonl.gz", rows)
        lines(folder / "asset" / f"{part}.jsonl.gz", map(json.dumps, several))
        for name in ("nl2bash", "clinc150"):
            lines(folder / name / f"{part}.jsonl.gz", map(json.dumps, single))
    return folder


def test_dev_and_train_of_cocoa_share_nothing_and_the_annotations_go_along(given):
    data = real.cocoa(given)
    assert (len(data.train), len(data.dev), len(data.test)) == (342, 58, 20)
    assert not {e.source for e in data.train} & {e.source for e in data.dev}
    formal, informal = data.annotated["dev"]
    numbers = [e.source.split(":")[0].split()[-1] for e in data.dev]
    assert formal == [f"{i} können [F]Sie[/F]" for i in numbers]
    assert informal == [f"{i} können [F]du[/F]" for i in numbers]


def test_the_other_register_is_the_wanted_one(given):
    formal, informal = real.cocoa(given), real.cocoa(given, "informal")
    assert [e.source for e in formal.test] == [e.source for e in informal.test]
    assert informal.test[0].target.endswith("kannst du\tkommen?")
    assert formal.annotated["test"] == tuple(reversed(informal.annotated["test"]))


def test_parts_of_multi30k(given):
    data = real.multi30k(given)
    assert [len(part) for part in (data.train, data.dev, data.test)] == [1000, 50, 200]
    assert (data.train[0].source, data.train[0].target) == ("en train 0", "de train 0")


def test_as_many_texts_of_a_restaurant_as_wanted(given):
    one, every = real.e2e(given, 1), real.e2e(given)
    assert [e.source for e in one.train] == [e.source for e in every.train]
    assert not any(e.alternatives for e in one.train)
    assert one.dev == every.dev


def test_seen_and_unseen_categories_of_webnlg_share_their_training(given):
    seen, unseen = real.webnlg(given, seen=True), real.webnlg(given, seen=False)
    assert (seen.train, seen.dev) == (unseen.train, unseen.dev)
    assert {e.source[-1] for e in seen.test} <= set("02468")
    assert {e.source[-1] for e in unseen.test} <= set("13579")
    assert all(len(e.references) == 2 for e in (*seen.test, *unseen.test))


def test_every_intent_has_as_many_messages(given):
    data = real.clinc(given)
    for part, count in (("train", 7), ("dev", 1), ("test", 3)):
        assert Counter(e.target for e in getattr(data, part)) == {"a": count, "b": count}


def test_texts_of_asset_take_turns(given):
    data = real.asset(given)
    assert {e.target[-1] for e in (*data.train, *data.dev)} == {"0", "1"}
    assert not {e.source for e in data.train} & {e.source for e in data.dev}
    assert all(len(e.references) == 2 for e in data.test)


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


BASE = {"e2e-nlg-rounds": "e2e-nlg-2-texts", "multi30k-small-lm": "multi30k"}


def show(folder, config):
    """Write the data of a comparison with demonstrations, by the command that its config names."""
    name = config.stem.removesuffix("-shots")
    template = tomllib.loads(config.read_text(encoding="utf-8"))["template"]
    (folder / config.stem).mkdir()
    for part in ("train", "dev", "test"):
        files = {key: str(folder / name / f"{value}.jsonl") for key, value in (("pool", "train"), ("data", part))}
        output = folder / config.stem / f"{part}.jsonl"
        demonstrate("data-to-text", files["pool"], output, data=files["data"], template=template)


def test_the_command_writes_what_the_comparisons_name(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data", str(given), "-o", str(tmp_path)])
    real.main()
    assert "multi30k: 1000 train, 50 dev, 200 test" in capsys.readouterr().out
    made = {data.name: data for data in real.every(given)}
    for config in sorted((CONFIGS / "compare").glob("*.toml")):
        if config.stem.endswith("-shots"):
            show(tmp_path, config)
        data = read_config(config, "compare", tmp_path).data
        if data.name in SHIPPED:
            continue
        if config.stem.endswith("-shots"):
            wanted = made[data.name.removesuffix("-shots")]
            assert [each.source for each in data.test] == [each.source for each in wanted.test]
            assert all(len(each.history) == 6 for each in data.test)
            continue
        # Some comparisons were run on the data of another one.
        wanted = made[BASE.get(data.name, data.name.removesuffix("-rounds"))]
        whole = replace(wanted, train=tuple(one_target_each(wanted.train)))
        assert data.digest() == whole.digest(), config
        assert data.annotated.get("test") == wanted.annotated.get("test")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="cocoa-mt-en-de"):
        real.cocoa(tmp_path)
