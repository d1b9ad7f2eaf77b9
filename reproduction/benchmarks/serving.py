"""The owner's server over loopback: representations per second, latency, bytes and memory, against the PLM in process.

The server is a separate process with one thread of torch, so that it and its clients have a core each on a machine with
two; the baseline also has one thread. Clients are threads of one process, each with its own connection; each sends the
same requests one after the other for a fixed time. Latency is that of complete requests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch

from pema.adapter.schedule import NoAdapter
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.encoding import Tokens
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.local import LocalPLM
from reproduction.benchmarks.clients import Request, load
from reproduction.benchmarks.inputs import examples, requested, task
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.timing import Run, alternate, paired_ratio, row, significant, timing

CLIENTS = (1, 4, 16)
SEQUENCES = 8
"""Number of sequences per request."""

BATCH_TOKENS = 8192


class CountingTransport(httpx2.HTTPTransport):
    """Transport that counts the bytes of bodies."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = self.requests = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request and count the bytes of both bodies."""
        response = super().handle_request(request)
        response.read()
        self.requests += 1
        self.sent += len(request.read())
        self.received += len(response.content)
        return response


@contextlib.contextmanager
def serving(plm: str) -> Iterator[str]:
    """Run a server; yield its address when it is ready."""
    command = [sys.executable, "-m", "pema", "serve", plm, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with httpx2.Client(base_url=url) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def run(options: Options, folder: Path) -> dict[str, Any]:
    """Measure a server under load, a build, generation and sessions."""
    torch.set_num_threads(1)
    plm = LocalPLM.load(options.plm)
    corpus = examples(options)
    tokens = Tokens.encode(plm, task(options).template, corpus)
    sequences, starts = requested(tokens)
    requests = [(sequences[i : i + SEQUENCES], starts[i : i + SEQUENCES]) for i in range(0, len(corpus), SEQUENCES)]
    bare = bare_rate(plm, sequences, starts)
    with serving(options.plm) as url:
        loads = [under_load(url, requests, count, bare, options.serve_seconds) for count in CLIENTS]
        building = build(plm, url, options, folder)
        generating = generation(plm, url, options)
        sessions = session_bytes(url, sequences)
    summary = [
        row(
            f"represent, {one['clients']} clients, p50 {one['p50_ms']:.3g} ms, p99 {one['p99_ms']:.3g} ms",
            one["representations_per_second"],
            "representations/s",
            "represent in the process, whole corpus at once",
            one["of_bare"],
            "",
        )
        for one in loads
    ]
    summary.append(row("build through the server", building["seconds"], "s", "local build", building["ratio"], ""))
    for one in generating:
        what = f"a token over loopback, batch {one['batch_size']}, {one['bytes_per_token_down']:.4g} bytes down"
        summary.append(row(what, one["remote_ms"], "ms/step", "local generate", one["ratio"], ""))
    return {
        "summary": summary,
        "plm": plm.description.name,
        "d": plm.description.d_tap,
        "bare_representations_per_second": bare,
        "sequences_per_request": SEQUENCES,
        "load": loads,
        "building": building,
        "generation": generating,
        "sessions": sessions,
    }


def bare_rate(plm: LocalPLM, sequences: list[list[int]], starts: list[int]) -> float:
    """Return the representations per second of `represent` on the whole corpus, in this process."""

    def once() -> None:
        for _ in plm.represent(sequences, starts, batch_tokens=BATCH_TOKENS):
            pass

    times = alternate({"bare": once}, 3)["bare"]
    count = sum(len(s) - start for s, start in zip(sequences, starts, strict=True))
    return significant(count / statistics.median(times))


def under_load(url: str, requests: list[Any], clients: int, bare: float, serve_seconds: float) -> dict[str, Any]:
    """Measure the rate and latency of a number of clients that send requests continuously."""

    def connect(_number: int) -> Request:
        plm = RemotePLM(url)

        def request(k: int) -> int:
            asked, starts = requests[k % len(requests)]
            return sum(len(r.representations) for r in plm.represent(asked, starts))

        return request

    measured = load(connect, clients, serve_seconds)
    return {
        "clients": clients,
        "requests": len(measured.latencies),
        "requests_per_second": measured.per_second(len(measured.latencies)),
        "representations_per_second": measured.per_second(measured.representations),
        "of_bare": measured.per_second(measured.representations / bare),
        "p50_ms": measured.latency_ms(50),
        "p99_ms": measured.latency_ms(99),
    }


def build(plm: LocalPLM, url: str, options: Options, folder: Path) -> dict[str, Any]:
    """Measure the build of a memory through the server against a build in the process."""
    corpus = examples(options)
    counting = CountingTransport()
    remote = RemotePLM(url, connection=Connection(url, transport=counting))

    def into(name: str, owner: Any) -> Run:  # noqa: ANN401
        def once() -> None:
            shutil.rmtree(folder / name, ignore_errors=True)
            build_memory(owner, corpus, task(options), folder / name, batch_tokens=BATCH_TOKENS)

        return once

    before = counting.requests, counting.sent, counting.received
    times = alternate({"local": into("served-local", plm), "remote": into("served-remote", remote)}, options.repeats)
    builds = options.repeats + 1
    return {
        "examples": len(corpus),
        "local": timing(times["local"]),
        "remote": timing(times["remote"]),
        "seconds": timing(times["remote"])["median_seconds"],
        "ratio": paired_ratio(times["remote"], times["local"]),
        "requests": (counting.requests - before[0]) // builds,
        "bytes_sent": (counting.sent - before[1]) // builds,
        "bytes_received": (counting.received - before[2]) // builds,
    }


def generation(plm: LocalPLM, url: str, options: Options) -> list[dict[str, Any]]:
    """Measure milliseconds per step and bytes per token of the PLM alone, greedy, over loopback against the process."""
    results = []
    for batch_size in options.batch_sizes:
        sources = [one.source for one in examples(options)[:batch_size]]
        counting = CountingTransport()
        remote = RemotePLM(url, connection=Connection(url, transport=counting))

        def texts(owner: Any, sources: list[str] = sources, size: int = batch_size) -> Run:  # noqa: ANN401
            return lambda: generate(
                owner,
                None,
                sources,
                task(options),
                NoAdapter(),
                batch_size=size,
                max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens,
            )

        times = alternate({"local": texts(plm), "remote": texts(remote)}, options.repeats)
        counting.sent = counting.received = counting.requests = 0
        texts(remote)()
        steps, generated = options.new_tokens, options.new_tokens * len(sources)
        milliseconds = {name: significant(1e3 * statistics.median(t) / steps) for name, t in times.items()}
        results.append(
            {
                "batch_size": batch_size,
                "local_ms": milliseconds["local"],
                "remote_ms": milliseconds["remote"],
                "ratio": paired_ratio(times["remote"], times["local"]),
                "requests": counting.requests,
                "bytes_per_token_up": significant(counting.sent / generated),
                "bytes_per_token_down": significant(counting.received / generated),
                "bytes_of_logits": plm.description.vocabulary_size * 2,
            }
        )
    return results


def session_bytes(url: str, sequences: list[list[int]]) -> dict[str, Any]:
    """Return the bytes of one session according to the server's metrics."""
    plm = RemotePLM(url)
    prompt = max(sequences, key=len)
    session = plm.open_session([prompt])
    lines = httpx2.get(url + "/metrics").text.splitlines()
    held = next(float(line.split()[-1]) for line in lines if line.startswith("pema_session_bytes"))
    session.close()
    return {"rows": 1, "tokens": len(prompt), "bytes": int(held), "bytes_per_token": significant(held / len(prompt))}


def parts(_options: Options, _folder: Path) -> dict[str, Run]:
    """Return no parts: the server is a separate process, whose memory is measured already."""
    return {}
