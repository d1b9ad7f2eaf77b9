"""A connection to a PLM owner's server: one pool, retries with back-off, errors that say what to do."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import random
import time
from typing import Any

import httpx2

from pema.errors import ConfigError, DataError, OwnerError

logger = logging.getLogger(__name__)

KEY = "PEMA_API_KEY"
"""Environment variable that holds the API key: an option would show in the list of processes."""

_AGAIN = (429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0


class LostSessionError(OwnerError):
    """The server no longer knows a decoding session."""


class Connection:
    """Requests to one server.

    What fails on the way, or is answered with 429, 502, 503 or 504, is tried again with growing pauses until `patience`
    has passed: every request of the protocol can be repeated.

    Attributes:
        url: the server's address, without a slash at its end.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience: float = 60.0,
        timeout: float = 600.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        _require_private(self.url)
        key = key or os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._patience = patience
        self._client = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            transport=transport,
            # A redirect could carry the prompts elsewhere.
            follow_redirects=False,
        )

    def get(self, path: str) -> Any:  # noqa: ANN401
        """The JSON that lies at `path`."""
        return _json(self.request("GET", path), f"GET {self.url}{path}")

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        """Send one request and wait for its answer.

        Raises:
            OwnerError: the server cannot be reached, or refuses; the message names the request and what it said.
            DataError: the server does not accept what was sent.
            LostSessionError: the decoding session is gone.
        """
        where = f"{method} {self.url}{path}"
        started, pause, attempts = time.monotonic(), _FIRST_PAUSE, 0
        while True:
            attempts += 1
            wait = pause * random.uniform(0.5, 1.0)
            try:
                response = self._client.request(method, path, json=body)
            except httpx2.TransportError as error:
                reason = f"it cannot be reached ({type(error).__name__}: {error})"
            else:
                if response.status_code not in _AGAIN:
                    return _accept(response, where)
                reason = _said(response)[1]
                with contextlib.suppress(KeyError, ValueError):
                    wait = max(wait, float(response.headers["retry-after"]))
            if time.monotonic() + wait - started > self._patience:
                raise OwnerError(
                    f"{where} failed after {attempts} tries in {time.monotonic() - started:.0f} s: {reason}. Check the "
                    "address and the server, then run the same command again: a build goes on where it stopped."
                )
            logger.warning("%s: %s; trying again in %.1f s.", where, reason, wait)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Close the pool."""
        self._client.close()


def _accept(response: httpx2.Response, where: str) -> httpx2.Response:
    if response.is_success:
        return response
    code, said = _said(response)
    message = f"{where}: the server refused with {response.status_code}: {said}"
    if response.status_code in (404, 410) and code in ("session_expired", "unknown_session"):
        raise LostSessionError(message)
    if response.status_code in (401, 403):
        remedy = f" Set {KEY} to a key that the owner gave you." if response.status_code == 401 else ""
        raise OwnerError(message + remedy)
    if response.status_code in (400, 413, 422):
        raise DataError(message)
    raise OwnerError(message)


def _said(response: httpx2.Response) -> tuple[str, str]:
    """The code and the words of an error's body, whoever wrote it."""
    try:
        error = response.json()["error"]
        return str(error["code"]), " ".join(filter(None, (str(error["message"]), str(error.get("remedy") or ""))))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", f"{response.text[:200]!r}"


def _json(response: httpx2.Response, where: str) -> Any:  # noqa: ANN401
    try:
        return response.json()
    except json.JSONDecodeError as error:
        raise OwnerError(f"{where} answered with something that is no JSON: is a pema server there?") from error


def _require_private(url: str) -> None:
    """Refuse an address over which prompts and key would travel in the clear."""
    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise ConfigError(f"{url!r} is not the address of a server: {error}.") from error
    if parts.scheme == "https" and parts.host:
        return
    loopback = parts.host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(parts.host).is_loopback
    if parts.scheme != "http" or not loopback:
        raise ConfigError(
            f"{url} is not https: prompts and key would travel in the clear. Use https, or a tunnel to this machine."
        )
