"""Interrupted comparisons: remaining files and messages."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_lifeline import is_running, wait_until
from tests.tiny import build_model, build_tokenizer

CONFIG = """
plm = "{plm}"
[data]
name = "made"
train = {{ data = "train.tsv" }}
dev = {{ data = "train.tsv" }}
test = {{ data = "train.tsv" }}
[budget]
epochs = 1000000
patience = 1000000
[[methods]]
label = "endless"
method = "pema"
settings = {{ rank = 16, learning_rate = 1e-9, epochs = 1000000 }}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    build_model(seed=3).save_pretrained(folder / "plm")
    build_tokenizer().save_pretrained(folder / "plm")
    rows = "".join(f"the house {i}\tdas Haus {i}\n" for i in range(20))
    (folder / "train.tsv").write_text(rows, encoding="utf-8")
    (folder / "endless.toml").write_text(CONFIG.format(plm=folder / "plm"), encoding="utf-8")
    return folder / "endless.toml"


def children(number):
    paths = Path(f"/proc/{number}/task").glob("*/children")
    return [int(each) for path in paths for each in path.read_text(encoding="ascii").split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_leaves_no_training_process_and_lists_what_is_kept(config, tmp_path, number):
    arguments = ["compare", str(config), "-o", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    command = [sys.executable, "-c", f"import sys; from pema.cli import main; sys.argv[1:] = {arguments}; main()"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: list((tmp_path / "work" / "trained").glob("pema-*.partial")), 200)
        trainings = children(process.pid)
        assert len(trainings) == 1
        process.send_signal(number)
        said = process.stderr.read()
        code = process.wait(30)
    assert wait_until(lambda: not any(map(is_running, trainings)))
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        return
    assert code == 128 + number
    last = said.splitlines()[-1]
    assert last.startswith(f"pema: terminated; finished runs are kept in {tmp_path / 'results' / 'endless'}, ")
    assert last.endswith("the same command continues.")
