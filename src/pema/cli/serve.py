"""`pema serve`: the PLM owner's server; `pema serve-key`: an API key for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pema.cli.options import AsJSON, LocalPLMName, integer, loading, require_plm, show
from pema.cli.settings import declared

if TYPE_CHECKING:
    from pema.serving.connections import Connections
    from pema.serving.policy import Policy
    from pema.serving.server import Address


@declared(loaded=loading("tap", "dtype", "device_map", "revision"))
def serve(
    plm: LocalPLMName,
    loaded: dict[str, Any],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, integer("--port", "Port; 0 selects a free one.", least=0, most=65535)] = 8000,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="TOML file: keys, limits, form of the head.", metavar="FILE"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate (PEM).", metavar="FILE")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key (PEM).", metavar="FILE")] = None,
    insecure_network: Annotated[
        bool,
        typer.Option("--insecure-network", help="Listen on a network without keys or TLS, behind a proxy with both."),
    ] = False,
    workers: Annotated[
        int, integer("--workers", "Number of processes that have the PLM; they share the GPUs.", least=1, most=256)
    ] = 1,
) -> None:
    """Serve representations of a frozen PLM to data owners over HTTP.

    Without a policy it listens on the loopback only, requires no key, and serves the plain head. On SIGHUP it rereads
    the policy; on SIGTERM it finishes the open requests and stops.

    Example: pema serve embedded --port 8000
    """
    from pema.errors import ConfigError
    from pema.extras import installs

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"pema serve needs the package {error.name}: {installs('serve')}.") from error
    from pema.serving.policy import Policy

    rules = Policy() if policy is None else Policy.read(policy)
    require_plm(plm, loaded.get("revision"))

    from pema.serving.connections import Connections
    from pema.serving.server import Address
    from pema.serving.server import serve as run

    address = Address(host, port, tls_cert, tls_key)
    address.check(rules, insecure=insecure_network)
    connections, local_only = Connections(rules.limits.connections), address.local_only(rules)
    if workers > 1:
        _serve_with_workers(workers, plm, loaded, policy, rules, address, connections, local_only)
        return

    from pema.owner.local import LocalPLM
    from pema.serving.app import create_app
    from pema.serving.logs import log_to_stderr
    from pema.serving.metrics import Metrics
    from pema.serving.service import Service
    from pema.serving.views import require_secrets

    require_secrets(rules)  # of several workers the first one does: this process would need torch for it

    def load(metrics: Metrics) -> Service:
        return Service(LocalPLM.load(plm, **loaded), rules, metrics)

    listener = address.listen()
    log_to_stderr()
    app = create_app(load, connections, policy=policy, local_only=local_only)
    run(app, app.state.lifecycle, app.state.reloader.request, address, listener, connections, plm)


def _serve_with_workers(
    workers: int,
    plm: str,
    loaded: Mapping[str, Any],
    policy: Path | None,
    rules: Policy,
    address: Address,
    connections: Connections,
    local_only: bool,
) -> None:
    import tempfile

    from pema.serving.logs import log_to_stderr
    from pema.serving.router import create_router
    from pema.serving.server import serve as run
    from pema.serving.store import Store
    from pema.serving.workers import Fleet, Plan, environments, visible_cores, visible_devices

    on_gpu = loaded.get("device_map") not in (None, "cpu")
    divided = environments(workers, visible_cores(), visible_devices() if on_gpu else [], os.environ)
    with tempfile.TemporaryDirectory(prefix="pema-serve-") as name:
        folder = Path(name)
        file = folder / "quotas.sqlite" if rules.quota_file is None else Path(rules.quota_file)
        store = Store(file)
        listener = address.listen()
        log_to_stderr()
        fleet = Fleet(Plan(plm, loaded, policy, file, folder, divided), store, rules, connections)
        app = create_router(fleet, connections, local_only=local_only)
        run(app, fleet, fleet.request_reread, address, listener, connections, plm)


def serve_key(
    name: Annotated[str, typer.Argument(help="Name of the key's owner in the server's logs.", metavar="NAME")],
    as_json: AsJSON = False,
) -> None:
    """Create an API key. It is printed once: the policy file contains its hash only.

    Example: pema serve-key acme
    """
    import json

    from pema.console import note
    from pema.serving.keys import digest, new_key

    key = new_key()
    if as_json:
        show({"key": key, "name": name, "sha256": digest(key)}, True)
        return
    show({"key": key}, False)
    show({"policy": f"\n[[keys]]\nname = {json.dumps(name)}\nsha256 = {json.dumps(digest(key))}"}, False)
    note(
        'Further rules of a key: tokens_per_day = N; head = "masked" or "none"; contexts = ["predicted"], which serves '
        'no targets (and needs "sessions" among the endpoints to generate, as by default). Then restart the server, '
        "or make it reread the policy: kill -HUP PID."
    )
