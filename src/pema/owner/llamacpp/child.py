"""The server of llama.cpp in a process of its own: `python -m pema.owner.llamacpp.child SETTINGS`.

SETTINGS is a JSON object, see `process.Settings`. The process reads the API key from its standard input, so that no
list of processes shows it, writes its address to its standard error, and ends with its parent.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

from pema.lifeline import end_with_parent

READY = "pema: listening at "


def main() -> None:
    """Serve until the parent ends."""
    settings, key = json.loads(sys.argv[1]), sys.stdin.readline().strip()
    # The thread that opens a PLM may end before the PLM is used.
    end_with_parent(by_kernel=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    import xllamacpp

    server = xllamacpp.Server(parameters(xllamacpp, settings, key))
    # In one write, and on a line of its own: threads of the server write there too.
    sys.stderr.write(f"\n{READY}{server.listening_address}\n")
    sys.stderr.flush()
    threading.Event().wait()


def parameters(library: Any, settings: dict[str, Any], key: str) -> Any:  # noqa: ANN401
    """Return the parameters of the server: one vector a token as the LM head reads it, and the whole cache kept."""
    chosen = library.CommonParams()
    chosen.model.path = settings["file"]
    # All contexts share one memory, and each has a slot of its own: a context that takes the slot of another one with
    # the same beginning would be read again from where they differ.
    chosen.n_ctx = settings["tokens"]
    chosen.n_parallel = settings["slots"]
    chosen.kv_unified = True
    chosen.n_batch = chosen.n_ubatch = settings["batch"]
    chosen.cpuparams.n_threads = chosen.cpuparams_batch.n_threads = settings["threads"]
    chosen.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    chosen.embedding = True
    # With a sliding window, a state restored for a completion can be that of another text.
    chosen.swa_full = True
    chosen.warmup = False
    chosen.port = 0
    chosen.api_keys = [key]
    chosen.endpoint_slots = False
    further = {"fit_params": False, "cache_idle_slots": False, "cache_ram_mib": settings["cache_mib"]}
    for name, value in further.items():
        if hasattr(chosen, name):  # only newer versions have it
            setattr(chosen, name, value)
    return chosen


if __name__ == "__main__":
    main()
