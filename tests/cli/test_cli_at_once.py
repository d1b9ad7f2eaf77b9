"""Help and refusals are printed before the slow imports of torch and transformers."""

import os
import re
import subprocess
import sys

import pytest

WRAPPER = """
import sys
from pema.cli import main
try:
    main()
except SystemExit as stop:
    print("exit", stop.code)
print("imported", *sorted({"torch", "transformers"} & set(sys.modules)))
"""


def words_of(text):
    """The words of a help page or an error, without the boxes around them."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def run(tmp_path):
    """Run `pema ...` in a process of its own; returns the exit code, the output and what was imported."""
    (tmp_path / "two.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "one.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "bad.toml").write_text("[x\n", encoding="utf-8")
    for name, top, method, *_ in COMPARISONS:
        text = f'{top}\n[data]\nname = "support"\n[[methods]]\nlabel = "X"\n{method}\n'
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    def run(*arguments):
        command = [sys.executable, "-c", WRAPPER, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=OFFLINE)
        *out, code, imported = done.stdout.splitlines()
        text = words_of(" ".join(out) + done.stderr)
        return int(code.removeprefix("exit ")), text, imported.removeprefix("imported").split()

    return run


PAIR = ("--source", "two.txt", "--target", "two.txt")
BUILD = ("build", "--plm", "embedded", "--task", "qa", *PAIR, "-o")
SERVE = ("serve", "embedded", "--insecure-network", "--host", "203.0.113.7")
EVALUATE = ("evaluate", "--task", "translation", "--hypotheses", "two.txt", "--references")


COMPARISONS = [
    ("method", "", 'method = "pemma"', 2, "unknown method 'pemma'"),
    (
        "setting",
        "",
        'method = "pema"\nsettings = {rnak = 3}',
        2,
        "X: unknown setting 'rnak' of pema: did you mean 'rank",
    ),
    ("type", "", 'method = "pema"\nsettings = {rank = "a"}', 2, "X: rank='a' must be a whole number."),
    ("range", "", 'method = "lora"\ngrid = {rank = [0]}', 2, "X: lora: rank=0 is too small"),
    ("knn", "", 'method = "knn-lm"\nsettings = {k = 0}', 2, "X: knn-lm: k=0 is too small"),
    ("prompt", "", 'method = "few-shot"\nsettings = {k = 1.5}', 2, "X: few-shot: k=1.5 must be a whole number."),
    ("prompts", "", 'method = "few-shot"\nsettings = {k = 9999}', 2, "X: few-shot: k=9999 demonstrations need as many"),
    ("sources", "", 'method = "plm"\nsettings = {examples = 9999}', 2, "X: examples=9,999 is more than the"),
    ("offsite", "", 'method = "offsite"\nsettings = {keep = 2.0}', 2, "X: offsite: keep=2.0 is too large"),
    ("full", "", 'method = "full"\nsettings = {epochs = 0}', 2, "X: full: epochs=0 is too small"),
    ("alone", "", 'method = "plm"\nsettings = {a = 0}', 2, "X: unknown setting 'a' of plm: it has none."),
    ("plm", 'plm = "smolm2"', 'method = "plm"', 1, "smolm2 cannot be loaded as a causal language model: "),
    ("style", 'metrics = ["style_accuracy:/no/where"]', 'method = "plm"', 1, "the folder /no/where does not exist"),
    ("no-model", 'metrics = ["style_accuracy:"]', 'method = "plm"', 2, "'style_accuracy:' names no classifier"),
]
"""Files of comparisons with an error: name, first line, method, exit code and message."""

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}

VERBS = [
    *((verb,) for verb in ("audit", "build", "compare", "demo", "demonstrate", "evaluate", "generate", "inspect")),
    *((verb,) for verb in ("release", "report", "serve", "serve-key", "sweep", "train")),
    *(("memory", verb) for verb in ("info", "merge", "sample", "verify")),
]


@pytest.mark.parametrize("verb", [(), ("memory",)])
def test_help_names_all_verbs_without_torch(run, verb):
    code, text, imported = run(*verb, "--help")
    assert (code, imported) == (0, [])
    assert all(each[-1] in text for each in VERBS if each[:-1] == verb)


@pytest.mark.parametrize("verb", VERBS, ids="-".join)
def test_help_has_an_example_and_the_result_as_json_without_torch(run, verb):
    code, text, imported = run(*verb, "--help")
    assert (code, imported) == (0, [])
    assert f"Example: pema {' '.join(verb)}" in text
    assert "--json" in text or verb == ("serve",)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("frobnicate",), 2, "No such command"),
        (("train", "m", "-o", "a", "--colour"), 2, "No such option"),
        (("train", "m", "-o", "a", "--rank", 0), 2, "--rank=0 is too small"),
        (("train", "m", "-o", "a", "--preset", "bset"), 2, "unknown preset 'bset'"),
        (("train", "nowhere", "-o", "a"), 1, "nowhere is not a memory"),
        ((*BUILD, "m", "--limit", 0), 2, "--limit=0 is too small"),
        ((*BUILD, "full"), 2, "full contains files but no memory"),
        ((*BUILD, "one.txt"), 2, "one.txt is a file: choose a folder"),
        ((*BUILD, "empty", "--append"), 2, "empty is not a memory, so nothing can be appended"),
        (("build", "--plm", "p", "--task", "q", *PAIR, "-o", "m"), 2, "unknown task 'q'"),
        (("build", "--plm", "p", "--task", "qa", "--data", "no.jsonl", "-o", "m"), 1, "no.jsonl does not exist"),
        (("generate", "nowhere", "--plm", "p", "--input", "two.txt", "-o", "o"), 1, "nowhere is not a folder with an"),
        (("generate", "empty", "--plm", "p", "--input", "two.txt", "-o", "o"), 1, "empty contains no adapter"),
        (("generate", "empty", "--plm", "p", "--input", "no.txt", "-o", "o"), 1, "no.txt does not exist"),
        (("inspect", "nowhere", "--plm", "p", "--text", "a", "-o", "o"), 1, "nowhere is not a folder with an"),
        ((*EVALUATE, "one.txt"), 1, "not aligned: 2 hypotheses, 1 references"),
        ((*EVALUATE, "two.txt", "--metric", "blue"), 2, "unknown metric 'blue'"),
        ((*EVALUATE, "two.txt"), 0, ""),
        (("memory", "info", "nowhere"), 1, "nowhere is not a memory"),
        (("memory", "verify", "nowhere"), 1, "nowhere is not a memory"),
        (("memory", "merge", "empty", "nowhere", "-o", "full"), 2, "full exists already"),
        (("memory", "merge", "empty", "nowhere", "-o", "m"), 1, "empty is not a memory"),
        (("memory", "sample", "empty", "-o", "full", "--pairs", 3), 2, "full exists already"),
        (("memory", "sample", "empty", "-o", "m", "--pairs", 3), 1, "empty is not a memory"),
        (("audit", "nowhere", "--members", "m", "--non-members", "n"), 1, "nowhere is not a folder with an adapter"),
        (("serve", "p", "--policy", "bad.toml"), 2, "the policy bad.toml is not TOML"),
        ((*SERVE, "--workers", 2), 2, "cannot listen on 203.0.113.7"),  # the process in front of workers
        (("serve", "p", "--port", 65536), 2, "--port=65536 is too large"),
        (("release", "p", "-o", "h", "--mask", "mirror"), 2, "unknown --mask 'mirror'"),
        ((*BUILD, "m", "--plm", "empty"), 1, "the folder empty contains no config.json"),
        (("release", "empty", "-o", "h"), 1, "the folder empty contains no config.json"),
        (("serve", "empty"), 1, "the folder empty contains no config.json"),
        (("release", "two.txt", "-o", "h"), 1, "two.txt is not a PLM"),
        (("compare", "bad.toml"), 2, "bad.toml is not TOML"),
        (("sweep", "no.toml"), 1, "no.toml cannot be read"),
        *((("compare", f"{name}.toml"), code, words) for name, _, _, code, words in COMPARISONS),
        ((*BUILD, "m", "--plm", "smolm2"), 1, "smolm2 cannot be loaded as a causal language model: "),
        (("serve", "org/nothing"), 1, "org/nothing cannot be loaded as a causal language model: "),
        (
            (*EVALUATE, "two.txt", "--metric", "style_accuracy:org/no"),
            1,
            "org/no cannot be loaded as a text",
        ),
        (("demo", "--report", "page.pdf"), 2, "unknown suffix '.pdf' of page.pdf"),
        (("report", "nowhere", "-o", "page.html"), 1, "nowhere is not a folder"),
    ],
)
def test_bad_arguments_are_refused_without_torch(run, arguments, code, words):
    actual, error, imported = run(*arguments)
    assert (actual, imported) == (code, [])
    assert words in error


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["frobnicate"]], ids=" ".join)
def test_python_m_pema_is_the_same_command(run, arguments):
    done = subprocess.run([sys.executable, "-m", "pema", *arguments], capture_output=True, text=True)
    code, text, _ = run(*arguments)
    assert done.returncode == code
    assert words_of(done.stdout + done.stderr) == text


def test_the_package_is_imported_without_torch():
    code = "import sys, pema; print(*sorted({'torch', 'transformers'} & set(sys.modules)), len(dir(pema)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 40
