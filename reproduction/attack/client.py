"""Attacks of a server on its client, in a separate process: `python -m reproduction.attack.client FOLDER OUT`.

FOLDER is the checkout whose client is attacked; the hostile answers come from the tests of this checkout.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent.parent.parent


def hostile_answers() -> ModuleType:
    """Return the answers of the tests' hostile server."""
    path = HERE / "tests" / "serving" / "hostile_server.py"
    spec = importlib.util.spec_from_file_location("hostile_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hostile(client: Any, server: ModuleType) -> dict[str, Any]:  # noqa: ANN401
    """Count the hostile answers that are refused by name, accepted, or raise a bare exception."""
    from pema.errors import PemaError

    outcomes: dict[str, list[str]] = {"refused": [], "taken": [], "bare": []}
    slowest = 0.0
    for name, change in server.ANSWERS.items():
        began = time.monotonic()
        try:
            server.use(client, change)
        except PemaError as error:
            # A message with terminal control sequences is not a proper refusal.
            outcomes["refused" if str(error).isprintable() else "bare"].append(name)
        except Exception:
            outcomes["bare"].append(name)
        else:
            outcomes["taken"].append(name)
        slowest = max(slowest, time.monotonic() - began)
    counts = {what: len(names) for what, names in outcomes.items()}
    figures = f"{counts['refused']} refused by name, {counts['taken']} taken for good, {counts['bare']} bare exceptions"
    return {"held": counts["refused"], "fell": counts["taken"] + counts["bare"], "figures": figures}


def code(client: Any, server: ModuleType) -> dict[str, Any]:  # noqa: ANN401
    """Attack with a tokenizer that contains code, and a user who answers every question with y."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "ran"
        brought = (
            f"open({str(mark)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Tokenizer\n"
            "Tokenizer = type('Tokenizer', (Tokenizer,), {})\n"
        )

        def change(files: dict[str, str]) -> dict[str, str]:
            settings = json.loads(files["tokenizer_config.json"])
            settings |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "EvilTokenizer"}
            return files | {"tokenizer_config.json": json.dumps(settings), "evil.py": brought}

        connection = server.Connection(server.URL, transport=server.Changing(client, server.tokenizer(change)))
        asked = mock.Mock(return_value="y")
        with mock.patch("builtins.input", asked), mock.patch("transformers.dynamic_module_utils.signal", mock.Mock()):
            try:
                _ = server.RemotePLM(server.URL, connection=connection).tokenizer
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        ran = mark.exists()
    figures = "the code of the server " + ("runs" if ran else "does not run") + f", {asked.call_count} questions asked"
    return {"held": int(not ran), "fell": int(ran), "figures": figures}


def certificate(_client: Any, server: ModuleType) -> dict[str, Any]:  # noqa: ANN401
    """Attack with an untrusted certificate."""
    import ssl

    import trustme

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with server.raw_server(b"", tls=context) as url:
        began = time.monotonic()
        try:
            server.Connection(url, patience=20.0).get("/v1/plm")
        except Exception as error:
            reason = type(error).__name__
        seconds = time.monotonic() - began
    return {"held": int(seconds < 5), "fell": int(seconds >= 5), "figures": f"{reason} after {seconds:.0f} s of 20"}


ATTACKS = {
    "Hostile answers of a server": hostile,
    "Code in a tokenizer's files": code,
    "A certificate that is not trusted": certificate,
}


def main() -> None:
    """Attack the client of a checkout, and write the results."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path[:0] = [str(folder / part) for part in ("tests/serving", "tests")]
    served, tiny = (importlib.import_module(name) for name in ("served", "tiny"))

    from pema import LocalPLM
    from pema.serving.policy import Limits

    server = hostile_answers()
    plm = LocalPLM(tiny.build_model("llama"), tiny.build_tokenizer())
    # Older checkouts have fewer limits.
    limits = {name: 100_000 for name in ("sessions", "heads_per_hour") if name in Limits.model_fields}
    results = {}
    for name, attack in ATTACKS.items():
        # Connections that an attack leaves open must not prevent the next attack.
        with served.served(plm, **limits) as client:
            results[name] = attack(client, server)
    out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
