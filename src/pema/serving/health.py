"""Check of a server's health from its own machine, for containers: `python -m pema.serving.health [PORT]`.

The exit code is 0 if the server is alive, loading or not, and 1 if it is not.
"""

from __future__ import annotations

import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

PATH, PORT = "/healthz", 8000
_SECONDS = 4.0


def healthy(port: int) -> bool:
    """Whether a server on this machine's loopback is alive, with TLS or without."""
    # Its certificate is for the name that clients use; nothing secret is sent.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # Plain HTTP first: at a port with TLS it fails silently, while a handshake at one without would be logged.
    for connection in (
        HTTPConnection("127.0.0.1", port, timeout=_SECONDS),
        HTTPSConnection("127.0.0.1", port, timeout=_SECONDS, context=context),
    ):
        try:
            connection.request("GET", PATH)
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            continue
        finally:
            connection.close()
    return False


if __name__ == "__main__":
    sys.exit(not healthy(int(sys.argv[1]) if len(sys.argv) > 1 else PORT))
