"""vLLM's own servers with the tiny model, started for the test that needs them."""

import contextlib
import os
import signal
import socket
import subprocess
import time

import httpx2

ARGUMENTS = {
    "pooling": ["--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task": "token_embed"}'],
    "completions": ["--max-logprobs", "-1"],
}
COMMON = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
SMALL = ["--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 24)]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # no warming up
    "TORCHDYNAMO_DISABLE": "1",  # no compiling
}
PATIENCE = 1800.0
"""Seconds that a server may take to start."""


@contextlib.contextmanager
def servers(python, folder, logs):
    """Start both servers with an environment's Python; give their addresses, and end them."""
    processes, urls = {}, {}
    try:
        for name, arguments in ARGUMENTS.items():
            port = free_port()
            urls[name] = f"http://127.0.0.1:{port}"
            command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
            with (logs / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [*command, *COMMON, *SMALL, *arguments],
                    stdout=log,
                    stderr=log,
                    env=os.environ | SETTINGS,
                    start_new_session=True,
                )
        for name, process in processes.items():
            wait(urls[name], process, logs / f"{name}.log")
        yield urls
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


def wait(url, process, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", timeout=10.0).is_success:
                return
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-4000:]
        time.sleep(1.0)
    raise AssertionError(f"{url} did not start in {PATIENCE:.0f} s")


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
