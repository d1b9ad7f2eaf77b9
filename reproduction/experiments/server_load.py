"""`pema serve` with one process and with two workers under load: rates, latency, and the processor time of each part.

    python -m reproduction.experiments.server_load

Clients are threads of this process, each with its own connection, which send requests one after the other for a fixed
time: `represent` requests of 8 texts of the demo, or sessions of one row and 16 steps. All requests are counted against
a quota in a file. Each worker has one thread of torch. Rates and latency depend on what else the machine does; the
processor time of a request does not, and says how many cores a rate needs. Results go to
`reproduction/results/server_load.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from pema.memory.encoding import Tokens
from pema.owner.client.connection import KEY
from pema.owner.client.remote import RemotePLM
from pema.owner.local import LocalPLM
from pema.serving.keys import digest, new_key
from pema.signature import signature
from reproduction.benchmarks.clients import load
from reproduction.benchmarks.inputs import examples, requested, task
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.timing import significant
from reproduction.lines import put_run
from reproduction.tables.server_load import CLIENTS, FILE, WORKERS

SEQUENCES, STEPS = 8, 16
PATIENCE = 600.0
"""Maximum seconds until all workers are ready."""

ENDPOINTS = '["plm", "represent", "sessions", "metrics"]'


@dataclass(frozen=True)
class Served:
    """A running server: its address, and the numbers of its processes by their part."""

    url: str
    parts: dict[str, list[int]]

    def seconds(self) -> dict[str, float]:
        """Return the processor seconds of each part so far."""
        return {part: sum(map(_processor_seconds, numbers)) for part, numbers in self.parts.items()}


@contextlib.contextmanager
def serving(plm: str, workers: int) -> Iterator[Served]:
    """Run a server with a quota in a file; yield it when all of its workers are ready."""
    with tempfile.TemporaryDirectory(prefix="pema-load-") as name:
        folder, key = Path(name), new_key()
        lines = ['quota_file = "quotas.sqlite"', "[[keys]]", 'name = "load"', f'sha256 = "{digest(key)}"']
        lines += [f"endpoints = {ENDPOINTS}", "tokens_per_day = 1_000_000_000"]
        (folder / "policy.toml").write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pema", "serve", plm, "--port", "0", "--workers", str(workers)]
        with (folder / "out").open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                [*command, "--policy", str(folder / "policy.toml")],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            os.environ[KEY] = key
            url = _ready(process, folder / "out", key, workers)
            children = _children(process.pid)
            parts = {"router": [process.pid], "workers": children} if workers > 1 else {"workers": [process.pid]}
            yield Served(url, parts)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def under_load(
    served: Served, request: Callable[[RemotePLM, int], int], clients: int, seconds: float
) -> dict[str, Any]:
    """Measure rate, latency and processor time of a number of clients that send requests continuously."""
    plms = [RemotePLM(served.url) for _ in range(clients)]
    before, own = served.seconds(), time.process_time()
    measured = load(lambda number: functools.partial(request, plms[number]), clients, seconds)
    spent = {part: value - before[part] for part, value in served.seconds().items()} | {
        "clients": time.process_time() - own
    }
    return {
        "requests": len(measured.latencies),
        "representations_per_second": measured.per_second(measured.representations),
        "p50_ms": measured.latency_ms(50),
        "p99_ms": measured.latency_ms(99),
        **{f"{part}_ms": significant(1e3 * value / measured.representations) for part, value in spent.items()},
        "cores": measured.per_second(sum(spent.values())),
    }


def measure(plm_name: str, workers: int, seconds: float) -> dict[str, Any]:
    """Measure a server with a number of workers, for each kind of request and number of clients."""
    plm, options = LocalPLM.load(plm_name), Options()
    tokens = Tokens.encode(plm, task(options).template, examples(options))
    sequences, starts = requested(tokens)

    def represent(remote: RemotePLM, k: int) -> int:
        first = SEQUENCES * k % (len(sequences) - SEQUENCES)
        part = slice(first, first + SEQUENCES)
        return sum(len(each.representations) for each in remote.represent(sequences[part], starts[part]))

    def decode(remote: RemotePLM, k: int) -> int:
        session = remote.open_session([sequences[k % len(sequences)]])
        for token in range(5, 5 + STEPS):
            session.advance([token])
        session.close()
        return STEPS + 1

    with serving(plm_name, workers) as served:
        return {
            name: {str(clients): under_load(served, request, clients, seconds) for clients in CLIENTS}
            for name, request in (("represent", represent), ("session", decode))
        }


def main() -> None:
    """Measure each number of workers, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plm", default="embedded", help="name of the PLM")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    args = parser.parse_args()
    for workers in WORKERS:
        before = os.getloadavg()[0]
        loads = measure(args.plm, workers, args.seconds)
        config = {"plm": args.plm, "workers": workers, "seconds": args.seconds}
        result = {"loads": loads, "load_average": round((before + os.getloadavg()[0]) / 2, 1)}
        put_run(FILE, str(workers), result | {"signature": signature(config, 0)})


def _ready(process: subprocess.Popen[bytes], out: Path, key: str, workers: int) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        lines = out.read_text(encoding="utf-8").splitlines()
        if lines:
            url = lines[0].split()[-1]
            with contextlib.suppress(httpx2.HTTPError):
                answer = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
                if answer.is_success and (workers == 1 or f'worker="{workers - 1}"' in answer.text):
                    return url
    raise SystemExit("the server does not become ready")


def _children(number: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text(encoding="ascii").split()]


def _processor_seconds(number: int) -> float:
    fields = Path(f"/proc/{number}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
