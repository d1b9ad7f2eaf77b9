"""A memory on the Hugging Face hub, through the hub client's own filesystem."""

import os
import subprocess
import sys
from pathlib import Path

from fake_plm import build, files, some_examples
from hub_server import REPOSITORY, hub_server


def test_a_memory_makes_the_round_trip(tmp_path):
    memory = build(tmp_path / "memory", some_examples(12), examples_per_shard=4).path
    here = Path(__file__).parent
    with hub_server() as server:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_testing",
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, str(here / "publishing_process.py"), str(memory), f"hf://{REPOSITORY}/data/memory"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert files(Path(done.stdout)) == files(memory)
    assert {path.removeprefix("data/memory/") for path in server.commits} == set(files(memory))
    assert server.commits[-1] == "data/memory/manifest.json"
