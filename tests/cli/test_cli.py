"""The command line, end to end in one process on a tiny PLM on disk."""

import json
import re
import subprocess
import sys

import pytest
import torch

from pema.cli import main
from pema.cli.settings import with_line_breaks
from pema.evaluation.evaluate import evaluate
from pema.evaluation.outputs import LINE_ENDS
from pema.files import read_json
from pema.memory import places
from pema.tasks.registry import get_task

TEXTS = [
    ("The house is small.", "Das Haus ist klein."),
    ("The dog is here.", "Der Hund ist hier."),
    ("Where is the house?", "Wo ist das Haus?"),
    ("The dog is small.", "Der Hund ist klein."),
    ("Here is the dog.", "Hier ist der Hund."),
    ("The house is here.", "Das Haus ist hier."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A folder with two PLMs and parallel files."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("plm", 0), ("other", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.en").write_text("".join(f"{s}\n" for s, _ in TEXTS), encoding="utf-8")
    (folder / "train.de").write_text("".join(f"{t}\n" for _, t in TEXTS), encoding="utf-8")
    rows = [json.dumps({"en": s, "du": t}, ensure_ascii=False) for s, t in TEXTS]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run `pema ...` in the folder; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pema", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def built(run, folder):
    """A memory of the parallel files."""
    if not (folder / "memory").exists():
        assert build(run)[0] == 0
    return folder / "memory"


@pytest.fixture
def trained(run, folder, built):
    """An adapter trained on that memory."""
    if not (folder / "adapter").exists():
        code, _, err = run("train", "memory", "-o", "adapter", "--preset", "paper", "--rank", 8, "--epochs", 2)
        assert code == 0, err
    return folder / "adapter"


def build(run, *more, plm="plm", output="memory", source="train.en", target="train.de"):
    inputs = ("--source", source, "--target", target)
    return run("build", "--plm", plm, "--task", "translation", *inputs, "-o", output, *more)


def test_from_texts_to_scores(run, folder, trained):
    code, out, _ = run("memory", "info", "memory", "--json")
    info = json.loads(out)
    assert code == 0
    assert (info["examples"], info["contexts"], info["plm"]) == (len(TEXTS), "teacher", "plm")

    assert run("memory", "verify", "memory")[0] == 0
    verified = json.loads(run("memory", "verify", "memory", "memory", "--json")[1])["verified"]
    assert [one["memory"] for one in verified] == ["memory", "memory"]
    for schedule in ("unrolling", "constant", "linear", "fitted"):
        code, _, err = run(
            *("generate", "adapter", "--plm", "plm", "--task", "translation", "--input", "train.en"),
            *("-o", f"{schedule}.de", "--schedule", schedule, "--max-new-tokens", 5),
        )
        assert code == 0, err
        assert len((folder / f"{schedule}.de").read_text(encoding="utf-8").splitlines()) == len(TEXTS)

    evaluated = run(
        *("evaluate", "--task", "translation", "--hypotheses", "train.de", "--references", "train.de", "--json")
    )
    scores = json.loads(evaluated[1])
    assert scores["bleu"]["value"] == pytest.approx(100)
    assert "version" in scores["bleu"]["signature"]
    evaluated = run(
        *("evaluate", "--task", "translation", "--hypotheses", "train.de", "--references", "train.de", "--json"),
        *("--metric", "bleu:char"),
    )
    assert "|tok:char|" in json.loads(evaluated[1])["bleu:char"]["signature"]


def test_without_the_adapter_it_is_the_plm(run, folder, trained):
    common = ("--plm", "plm", "--task", "translation", "--input", "train.en", "--max-new-tokens", 6)
    assert run("generate", "adapter", *common, "--no-adapter", "-o", "alone.de")[0] == 0
    assert run("generate", "adapter", *common, "--schedule", "constant", "--lambda-max", 0, "-o", "zero.de")[0] == 0
    assert (folder / "alone.de").read_bytes() == (folder / "zero.de").read_bytes()


def test_a_log_has_no_bars_of_other_libraries(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "pema", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)

    done = build(run, output=str(tmp_path / "memory"))
    assert "examples" in done.stdout
    assert "Loading weights" not in done.stderr


def test_an_adapter_generates_with_its_own_template_only(run, folder, trained):
    common = ("--plm", "plm", "--input", "train.en", "--max-new-tokens", 4, "--json")
    code, out, err = run("generate", "adapter", *common, "-o", "own.de")
    assert code == 0, err
    result = json.loads(out)
    assert {name: result.pop(name) for name in ("output", "lines")} == {"output": "own.de", "lines": len(TEXTS)}
    assert result.pop("cut") + result.pop("stopped") <= len(TEXTS)
    assert result == {"max_new_tokens": 4, "stop": ["\n"]}
    assert run("generate", "adapter", *common, "--task", "translation", "-o", "named.de")[0] == 0
    assert (folder / "own.de").read_bytes() == (folder / "named.de").read_bytes()
    for other in (("--task", "style"), ("--template", "English: {source} German:")):
        code, _, err = run("generate", "adapter", *common, *other, "-o", "other.de")
        assert code == 1
        assert f"the adapter was trained with the {other[0][2:]} '" in err
        assert not (folder / "other.de").exists()
        assert run("generate", "adapter", *common, *other, "--no-adapter", "-o", "alone.de")[0] == 0
        code, _, err = run("inspect", "adapter", "--plm", "plm", "--text", "a", *other, "-o", "page.html")
        assert code == 1
        assert f"the adapter was trained with the {other[0][2:]} '" in err


def test_texts_of_several_lines_go_through_the_command_line(run, folder, tiny_tokenizer):
    mails = ["Dear Ann,\nthank you.", "Hello,\nwe wait.", "Dear Bob,\nno."]
    rows = [{"source": f"{text}\n!", "target": f"{text}\nBye"} for text in mails]
    (folder / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run("build", "--plm", "plm", "--task", "style", "--data", "mails.jsonl", "-o", "mails")[0] == 0
    assert run("train", "mails", "-o", "mails-adapter", "--preset", "paper", "--rank", 8, "--epochs", 1)[0] == 0
    (folder / "sources.jsonl").write_text("".join(json.dumps({"source": row["source"]}) + "\n" for row in rows))
    generating = ("generate", "mails-adapter", "--plm", "plm", "--data", "sources.jsonl")
    code, out, err = run(*generating, "-o", "out.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["stop"] == ["\n\n"]
    # This random PLM writes lines if it is made to.
    (end,) = tiny_tokenizer()("\n", add_special_tokens=False)["input_ids"]
    lines = (*generating, "--stop", "", "--set", f"sequence_bias=[[[{end}], 30.0]]", "--set", "no_repeat_ngram_size=2")
    code, out, err = run(*lines, "-o", "out.jsonl", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["stop"] == []
    outputs = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["source"] for each in outputs] == [row["source"] for row in rows]
    assert sum(each["finish_reason"] == "length" for each in outputs) == result["cut"]
    assert all("\n" in each["text"] for each in outputs)
    # A text file of one text per line says what happens to the line breaks.
    code, _, err = run(*lines, "-o", "out.txt")
    assert "line breaks are written as \\n" in " ".join(err.split())
    plain = (folder / "out.txt").read_text(encoding="utf-8").splitlines()
    assert plain == [LINE_ENDS.sub(lambda match: repr(match[0])[1:-1], each["text"]) for each in outputs]
    code, out, err = run(
        *("evaluate", "--task", "style", "--hypotheses", "out.jsonl", "--references", "mails.jsonl", "--json")
    )
    assert code == 0, err
    references = [row["target"] for row in rows]
    expected = evaluate(get_task("style"), [each["text"] for each in outputs], references)
    assert json.loads(out)["bleu"]["value"] == pytest.approx(expected["bleu"].value)
    # A limit and stop strings of the user's own.
    stopping = ("--stop", r"\n", "--stop", "Ann", "--max-new-tokens", 9)
    code, out, _ = run(*generating, "-o", "out.jsonl", *stopping, "--json")
    ending = json.loads(out)
    assert (ending["max_new_tokens"], ending["stop"]) == (9, ["\n", "Ann"])
    texts = [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not any("\n" in text or "Ann" in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "o.txt"), "give the sources once: --input (a text file, one per line) or --data"),
        (("-o", "o.txt", "--input", "train.en", "--data", "train.jsonl"), "give the sources once"),
        (("-o", "o.txt", "--input", "train.jsonl"), "--input reads one text per line: give --data train.jsonl"),
        (
            ("-o", "o.json", "--input", "train.en"),
            "o.json: outputs are text (one per line) or JSON Lines",
        ),
        (("-o", "o.txt", "--input", "train.en", "--stop", "a", "--stop", ""), "--stop[1]='' is empty"),
    ],
)
def test_sources_and_outputs_that_cannot_be_meant(run, trained, arguments, words):
    code, _, err = run("generate", "adapter", "--plm", "plm", *arguments)
    assert code == 2
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("a\nb\na\n", "the label 'a' is given 2 times: give each label once"),
        ("a\n\nb\n", "label 2 is '': give a text that is not blank"),
    ],
)
def test_labels_that_cannot_be_chosen_are_refused(run, folder, trained, labels, words):
    (folder / "labels.txt").write_text(labels, encoding="utf-8")
    code, _, err = run(
        *("classify", "adapter", "--plm", "plm", "--labels", "labels.txt", "--input", "train.en", "-o", "o.txt")
    )
    assert code == 2
    assert words in " ".join(err.split())


def test_classify_says_what_it_wrote(run, folder, trained):
    (folder / "labels.txt").write_text("Haus\nHund\n", encoding="utf-8")
    common = ("--plm", "plm", "--labels", "labels.txt", "--data", "train.jsonl", "--source-field", "en", "--json")
    code, out, err = run("classify", "adapter", *common, "-o", "chosen.jsonl")
    assert code == 0, err
    assert json.loads(out) == {"output": "chosen.jsonl", "lines": len(TEXTS), "labels": 2}
    code, _, err = run("classify", "adapter", *common, "--task", "style", "-o", "o.txt")
    assert code == 1
    assert "the adapter was trained with the task 'translation', not with 'style'" in err


def test_backslash_n_in_a_template_is_a_line_break(run, folder, built):
    for template in (r"English: \n{source}\nGerman:", "English: \n{source}\nGerman:"):
        assert build(run, "--template", template, output="broken")[0] == 0
    assert read_json(folder / "broken" / "manifest.json")["template"] == "English: \n{source}\nGerman:"
    assert with_line_breaks(r"a\nb\\nc\d\\") == "a\nb\\nc\\d" + 2 * "\\"


def test_jsonl_gives_the_same_memory_as_parallel_files(run, folder, built):
    fields = ("--data", "train.jsonl", "--source-field", "en", "--target-field", "du")
    code, _, err = run("build", "--plm", "plm", "--task", "translation", *fields, "-o", "from-jsonl")
    assert code == 0, err
    for shard in built.glob("*.safetensors"):
        assert shard.read_bytes() == (folder / "from-jsonl" / shard.name).read_bytes()


def test_predicted_contexts_merge_sample_and_append(run, folder, built):
    assert build(run, "--contexts", "predicted", "--targets", "aligned", output="predicted")[0] == 0
    assert build(run, "--limit", 3, output="second")[0] == 0
    assert run("memory", "merge", "memory", "second", "-o", "merged", "--json")[0] == 0
    code, out, _ = run("memory", "sample", "merged", "-o", "sampled", "--pairs", 20, "--json")
    assert code == 0
    assert 0 < json.loads(out)["pairs"] <= 20
    code, out, _ = build(run, "--append", "--json", output="sampled")
    assert code == 0
    assert json.loads(out)["examples"] > len(TEXTS)
    code, _, err = run("memory", "merge", "memory", "predicted", "-o", "never")
    assert code == 1
    assert "contexts" in err


def test_release_writes_the_head(run, folder):
    code, out, _ = run("release", "plm", "-o", "head", "--json")
    assert code == 0
    assert json.loads(out)["width"] == 32
    assert any((folder / "head").glob("*.safetensors"))


def test_a_masked_head_is_released_again_and_built_with(run, folder):
    arguments = ("release", "plm", "--mask", "rotation", "--secret", "mask.key", "--json")
    code, out, err = run(*arguments, "-o", "masked")
    assert code == 0, err
    assert "mask.key contains a new secret" in err
    first = json.loads(out)
    assert first["mask"] == "rotation"
    code, out, err = run(*arguments, "-o", "masked-again")
    assert code == 0
    assert "new secret" not in err
    assert json.loads(out) == first | {"head": "masked-again"}
    for name in ("head.safetensors", "head.json"):
        assert (folder / "masked" / name).read_bytes() == (folder / "masked-again" / name).read_bytes()
    code, out, _ = run("release", "plm", "-o", "plain", "--json")
    assert code == 0
    plain = json.loads(out)
    assert plain["mask"] == "none"
    assert plain["head_fingerprint"] != first["head_fingerprint"]

    code, _, err = build(run, "--mask-secret", "mask.key", output="masked-memory")
    assert code == 0, err
    tensors = (folder / "masked-memory" / "head" / "head.safetensors").read_bytes()
    assert tensors == (folder / "masked" / "head.safetensors").read_bytes()
    code, _, err = run(
        "train", "masked-memory", "-o", "masked-adapter", "--preset", "paper", "--rank", 8, "--epochs", 1
    )
    assert code == 0, err
    generating = ("generate", "masked-adapter", "--plm", "plm", "--task", "translation", "--input", "train.en")
    code, _, err = run(*generating, "-o", "masked.de", "--mask-secret", "mask.key", "--max-new-tokens", 4)
    assert code == 0, err
    assert len((folder / "masked.de").read_text(encoding="utf-8").splitlines()) == len(TEXTS)
    code, _, err = run(*generating, "-o", "no.de")
    assert code == 1
    assert "another PLM" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--mask", "rotation"), 2, "--mask rotation needs --secret FILE"),
        (("--secret", "unused.key"), 2, "--secret is for a masked head: give --mask rotation too"),
        (
            ("--mask", "rotation", "--secret", "tap.key", "--tap", "norm_input"),
            2,
            "a masked head needs tap 'head_input'",
        ),
        (("--mask", "rotation", "--secret", "never/mask.key"), 2, "would be in never, which is given away"),
        (("--mask", "rotation", "--secret", "train.en"), 1, "expected 32 for a mask's secret"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(run, folder, arguments, code, words):
    found, _, err = run("release", "plm", "-o", "never", *arguments)
    assert found == code
    assert words in err
    assert not (folder / "never").exists()
    assert not (folder / "unused.key").exists()


def test_building_with_a_secret_that_does_not_exist_makes_none(run, folder):
    code, _, err = build(run, "--mask-secret", "nowhere.key", output="never")
    assert code == 1
    assert "nowhere.key does not exist" in err
    assert not (folder / "nowhere.key").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("build", "--plm", "plm"), 2, "Missing option"),
        (("frobnicate",), 2, "No such command"),
        (("train", "memory", "-o", "x", "--kappa", "3"), 2, "kappa"),
        (("train", "memory", "-o", "x", "--preset", "paper", "--rank", "99"), 2, "--rank 99 is larger than d = 32"),
        (("train", "memory", "-o", "x", "--vocabulary", "own"), 2, "--vocabulary own is an output matrix for an API's"),
        (("memory", "info", "nowhere"), 1, "nowhere"),
        (("release", "no-such-plm", "-o", "x"), 1, "no-such-plm"),
    ],
)
def test_exit_codes(run, built, arguments, code, words):
    found, _, err = run(*arguments)
    assert found == code
    assert words in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert "Traceback" not in err


def test_failure_is_one_line_and_debug_shows_the_rest(run, monkeypatch):
    code, out, err = run("memory", "info", "nowhere")
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(Exception, match="nowhere"):
        run("memory", "info", "nowhere", "--debug")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_lack_of_memory_has_a_remedy(run, monkeypatch, error):
    def full(path):
        raise error

    monkeypatch.setattr(places, "read_manifest", full)
    code, _, err = run("memory", "info", "memory")
    assert code == 1
    assert "not enough memory: use a smaller batch (--batch-size, --batch-tokens)" in err
    assert len(err.strip().splitlines()) == 1


def test_bad_input_is_named(run, folder):
    (folder / "short.de").write_text("Das Haus ist klein.\n", encoding="utf-8")
    (folder / "latin.de").write_bytes("Das Haus ist schön.\n".encode("latin-1") * len(TEXTS))
    (folder / "empty.de").write_bytes(b"")
    for name, words in (
        ("short.de", "short.de"),
        ("latin.de", "latin.de:1"),
        ("empty.de", "empty"),
        ("no.de", "no.de"),
    ):
        code, _, err = build(run, output="never", target=name)
        assert code == 1, name
        assert words in err
        assert not (folder / "never").exists()


def test_an_adapter_of_another_plm_is_refused(run, folder, trained):
    common = ("--task", "translation", "--input", "train.en", "-o", "never.de")
    code, _, err = run("generate", "adapter", "--plm", "other", *common)
    assert code == 1
    assert "another PLM" in err
    assert not (folder / "never.de").exists()


def test_a_tampered_memory_is_found(run, folder, built):
    import shutil

    shutil.copytree(built, folder / "tampered", dirs_exist_ok=True)
    shard = next((folder / "tampered").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, _, err = run("memory", "verify", "tampered")
    assert code == 1
    assert shard.name in err
    code, _, err = run("train", "tampered", "-o", "never")
    assert code == 1
    assert shard.name in err
    assert not (folder / "never").exists()


def test_references_may_be_several(run, folder):
    (folder / "refs.jsonl").write_text('{"targets": ["x", "das Haus"]}\n{"targets": ["ein Hund", "y"]}\n', "utf-8")
    (folder / "hyp.txt").write_text("das Haus\nein Hund\n", "utf-8")
    code, out, _ = run(
        *("evaluate", "--task", "qa", "--hypotheses", "hyp.txt", "--references", "refs.jsonl", "--json"),
    )
    assert code == 0
    assert json.loads(out)["exact_match"]["value"] == 100
    assert "|n:2|refs:4|" in json.loads(out)["exact_match"]["signature"]


def test_the_column_of_the_references_may_be_named(run, folder):
    (folder / "refs.csv").write_text("\ufeffMail;Antwort\nx;das Haus\ny;ein Hund\n", "utf-8")
    (folder / "hyp.txt").write_text("das Haus\nein Hund\n", "utf-8")
    command = ("evaluate", "--task", "qa", "--hypotheses", "hyp.txt", "--references", "refs.csv")
    code, out, _ = run(*command, "--target-field", "Antwort", "--json")
    assert code == 0
    assert json.loads(out)["exact_match"]["value"] == 100
    code, _, err = run(*command)
    assert code == 1
    assert "target_field" in err


def test_formal_and_informal_go_together(run):
    files = ("--hypotheses", "train.de", "--references", "train.de", "--formal", "train.de")
    code, _, err = run("evaluate", "--task", "translation", *files)
    assert code == 2
    assert "--informal" in err


def test_evaluate_says_on_how_many_texts_a_score_rests(run, folder):
    (folder / "hyp.txt").write_text("Sie da\nkomm\ngeh\n", "utf-8")
    (folder / "formal.txt").write_text("[F]Sie[/F]\n[F]Kommen[/F]\n[F]Gehen[/F]\n", "utf-8")
    (folder / "informal.txt").write_text("[F]du[/F]\n[F]komme[/F]\n[F]gehe[/F]\n", "utf-8")
    command = ("evaluate", "--task", "style", "--hypotheses", "hyp.txt", "--references", "hyp.txt")
    marks = ("--formal", "formal.txt", "--informal", "informal.txt")
    scores = json.loads(run(*command, *marks, "--json")[1])
    assert (scores["formality_accuracy"]["value"], scores["formality_accuracy"]["texts"]) == (1.0, 1)
    assert "texts" not in scores["bleu"]
    shown = run(*command, *marks)[1]
    assert "1.000  on 1 of 3 texts" in shown
    assert "100.00  chrF2" in shown
