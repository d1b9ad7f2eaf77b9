"""A worker of a server: `python -m pema.serving.worker SETTINGS`, which `pema.serving.workers` starts."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from pema.console import printable, stderr
from pema.errors import ConfigError, PemaError
from pema.lifeline import end_with_parent
from pema.owner.local import LocalPLM
from pema.serving.app import create_app
from pema.serving.logs import log_to_stderr
from pema.serving.metrics import Metrics
from pema.serving.policy import Policy
from pema.serving.server import run
from pema.serving.service import Service
from pema.serving.store import Store


def work(given: dict[str, Any]) -> None:
    """Serve the PLM on a Unix socket until SIGTERM.

    Raises:
        PemaError: the PLM or the policy cannot be used.
    """
    path, rules = None if given["policy"] is None else Path(given["policy"]), Path(given["rules"])
    policy = Policy.model_validate_json(rules.read_bytes())
    rules.unlink()

    def load(metrics: Metrics) -> Service:
        plm = LocalPLM.load(given["plm"], **given["loaded"])
        return Service(plm, policy, metrics, Store(Path(given["store"])), given["name"])

    app = create_app(load, policy=path, number=given["number"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(given["socket"])
        listener.listen(2048)
        try:
            run(app, app.state.lifecycle, app.state.reloader.request, listener)
        finally:
            Path(given["socket"]).unlink()


def main() -> None:
    """Run a worker with the settings of the command line."""
    end_with_parent()
    given = json.loads(sys.argv[1])
    log_to_stderr({"worker": given["index"]})
    try:
        work(given)
    except PemaError as error:
        stderr.print(printable(f"pema: {error}"), markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
