"""The table of the server's load with one process and with two workers."""

from __future__ import annotations

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "server_load.jsonl", "python -m reproduction.experiments.server_load"
CLIENTS, WORKERS = (1, 4, 16), (1, 2)
KINDS = {"represent": "`represent`, 8 texts a request", "session": "sessions of one row, 17 representations each"}


def server_load() -> str:
    """Return a table with one row per kind of request, number of workers and of clients."""
    runs = read_runs(FILE)
    columns = (
        "requests",
        "workers",
        "clients",
        "representations/s",
        "p50",
        "p99",
        "workers' ms",
        "router's ms",
        "clients' ms",
    )
    text = head([*columns, "cores used"])
    for kind, name in KINDS.items():
        for workers in WORKERS:
            for clients in CLIENTS:
                one = runs[str(workers)]["loads"][kind][str(clients)]
                cells = [name, str(workers), str(clients), f"{one['representations_per_second']:,.0f}"]
                cells += [f"{one['p50_ms']:,.3g} ms", f"{one['p99_ms']:,.3g} ms", f"{one['workers_ms']:.3g}"]
                cells += [f"{one['router_ms']:.3g}" if "router_ms" in one else "", f"{one['clients_ms']:.3g}"]
                text += row([*cells, f"{one['cores']:.2g}"])
    loads = " and ".join(f"{runs[str(workers)]['load_average']:g}" for workers in WORKERS)
    text += f"\nProcessor time is per representation; load average of the machine: {loads}. "
    return text + source(signature_of(runs["1"]), COMMAND)
