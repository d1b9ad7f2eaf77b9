"""Attacks on `pema serve --workers`: what its processes share, and what they must not."""

from __future__ import annotations

import stat
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from reproduction.attack.server import GOOD, KEYED, PATIENCE, Held, Server, opened, serving

WORKERS = ("--workers", "2")
MOST = 60
"""Tokens per day of the greedy key; a request takes 3."""


def quota_race(code: Path) -> Held:
    """Send requests of one key through both workers at once, kill a worker meanwhile, and start the server again."""
    policy = 'quota_file = "quotas.sqlite"\n' + KEYED.replace(
        'name = "greedy"\n', f'name = "greedy"\ntokens_per_day = {MOST}\n'
    )
    with tempfile.TemporaryDirectory() as folder:
        with serving(code, policy, *WORKERS, folder=Path(folder)) as server, server.client("greedy") as client:
            _wait_for_both(server)
            with ThreadPoolExecutor(24) as pool:
                statuses = [
                    pool.submit(lambda: client.post("/v1/represent", json=GOOD).status_code) for _ in range(120)
                ]
                killed = threading.Timer(0.1, server.workers()[1].kill)
                killed.start()
                counted = Counter(status.result() for status in statuses)
            killed.join()
        with serving(code, policy, folder=Path(folder)) as server, server.client("greedy") as client:
            again = sum(client.post("/v1/represent", json=GOOD).status_code == 200 for _ in range(10))
    spent = 3 * (counted[200] + again)
    figures = f"{spent} of {MOST} tokens given out to 24 clients at once, across a kill and a restart"
    return {"held": int(spent <= MOST), "fell": int(spent > MOST), "figures": figures}


def foreign_sessions(code: Path) -> Held:
    """Use the sessions of one key with another, with none, and under the name of the other worker."""
    held = tried = 0
    with serving(code, KEYED, *WORKERS) as server, server.client("quiet") as quiet, server.client("greedy") as greedy:
        _wait_for_both(server)
        paths = [opened(quiet, [[1, 20]]) for _ in range(4)]
        workers = {path.split("/")[-1].partition("-")[0] for path in paths}
        for path in paths:
            worker, _, secret = path.split("/")[-1].partition("-")
            elsewhere = [f"/v1/sessions/{other}-{secret}" for other in workers - {worker}]
            for client, place in (
                (greedy, path),
                (httpx2.Client(base_url=server.url), path),
                *((quiet, one) for one in elsewhere),
            ):
                tried += 1
                answer = client.post(f"{place}/advance", json={"step": 1, "tokens": [5]})
                held += answer.status_code in (401, 404)
            greedy.delete(path)
            tried += 1
            held += quiet.post(f"{path}/advance", json={"step": 1, "tokens": [5]}).status_code == 200
    figures = f"{held} of {tried} attempts at the sessions of another key, on {len(workers)} workers"
    return {"held": held, "fell": tried - held, "figures": figures}


def revoked_key(code: Path) -> Held:
    """Use a key after it was removed from the policy, until every worker refuses it."""
    with serving(code, KEYED, *WORKERS) as server, server.client("greedy") as client:
        _wait_for_both(server)
        paths = [opened(client, [[1, 20]]) for _ in range(4)]
        server.reread(KEYED.partition("[[keys]]")[0] + "[[keys]]" + KEYED.split("[[keys]]")[2])
        began, last = time.monotonic(), time.monotonic()
        while time.monotonic() - began < 5:
            for path in (*paths, "/v1/plm"):
                answer = (
                    client.get(path)
                    if path == "/v1/plm"
                    else client.post(f"{path}/advance", json={"step": 1, "tokens": [5]})
                )
                if answer.status_code != 401:
                    last = time.monotonic()
    seconds = last - began
    figures = f"refused by both workers after {seconds:.1f} s"
    return {"held": int(seconds < 2), "fell": int(seconds >= 2), "figures": figures}


def open_files(code: Path) -> Held:
    """Look for what other users of the machine may read or connect to."""
    with tempfile.TemporaryDirectory() as folder:
        policy = 'quota_file = "quotas.sqlite"\n' + KEYED
        with serving(code, policy, *WORKERS, folder=Path(folder)) as server:
            _wait_for_both(server)
            sockets = [Path(worker.socket) for worker in server.workers()]
            private = [*Path(folder).glob("quotas.sqlite*"), *{each.parent for each in sockets}]
            open_ = [path.name for path in private if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    held = len(private) - len(open_)
    figures = f"{held} of {len(private)} files and folders are for their owner only"
    return {"held": held, "fell": len(open_), "figures": figures}


def _wait_for_both(server: Server) -> None:
    """Wait until two workers have answered a request each."""
    deadline = time.monotonic() + 4 * PATIENCE
    with server.client("quiet") as client:
        names: set[str] = set()
        while len(names) < 2:
            if time.monotonic() > deadline:
                raise SystemExit("the second worker does not become ready")
            path = opened(client, [[1, 20]])
            names.add(path.split("/")[-1].partition("-")[0])
            client.delete(path)
            time.sleep(0.1)


ATTACKS = {
    "Quota races between workers, a kill and a restart": quota_race,
    "Sessions of another key, and under another worker's name": foreign_sessions,
    "A key that was removed, at every worker": revoked_key,
    "The quota file and the sockets of workers": open_files,
}
