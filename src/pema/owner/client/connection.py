"""The connection to a PLM owner's server: one pool, retries with back-off, limits, clear errors.

The server is untrusted: the size of its answers is limited, and nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import math
import random
import secrets
import ssl
import time
from collections.abc import Callable
from typing import Any

import httpx2

from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.api_keys import api_key
from pema.owner.wire import IDENTITY, ROUTE

logger = logging.getLogger(__name__)

KEY = "PEMA_API_KEY"
"""Environment variable with the API key; a command line option would be visible in the list of processes."""

SMALL_ANSWER = 1 << 20
"""Maximum bytes of an answer whose size does not follow from the request."""

_AGAIN = (429, 502, 503, 504)
_GATEWAY = (502, 504)
"""Answers of a proxy whose replica has ended or does not answer."""
SESSIONS = "/v1/sessions/"
"""Beginning of the paths of open sessions."""

_QUOTAS = ("quota_spent", "too_many_requests")
_QUOTA_PAUSE = 90.0
"""Maximum seconds that a request waits for a quota at a time: enough for one per minute."""
_QUOTA_PATIENCE = 10.0
"""Maximum of all these waits, as a multiple of the patience."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_ERROR_BYTES = 1 << 16
_SLOWEST = 1 << 14
"""Minimum bytes per second of an answer after the timeout has passed."""


class LostSessionError(OwnerError):
    """A decoding session that no longer exists, because it was closed or has gone with the server's replica.

    Attributes:
        unknown: whether the replica that answered never had it.
    """

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


def any_route() -> str:
    """Return a route at random: a try after one that failed may reach another replica."""
    return secrets.token_hex(8)


class Connection:
    """A connection to one server.

    Requests that fail in transit, or are answered with 429, 502, 503 or 504, are retried with growing pauses until
    `patience` (seconds) has passed: every request of the protocol can be repeated.

    Attributes:
        url: the server's address, without a trailing slash.
        plm: identity of the PLM that has to answer (see `wire.identity`); None for any.
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
        require_private(self.url)
        key = api_key(KEY, key)
        self.plm: str | None = None
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._patience, self._timeout = patience, timeout
        self._client = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            transport=transport,
            # A redirect could carry the prompts elsewhere.
            follow_redirects=False,
        )

    def get(self, path: str, *, most: int = SMALL_ANSWER) -> Any:  # noqa: ANN401
        """Get the JSON at `path`, of at most `most` bytes."""
        where = f"GET {self.url}{path}"
        try:
            return json.loads(self.request("GET", path, most=most))
        except (ValueError, RecursionError) as error:
            raise OwnerError(
                f"{where} answered with something that is not JSON: check that a pema server runs there."
            ) from error

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        most: int = SMALL_ANSWER,
        route: Callable[[], str] = any_route,
    ) -> bytes:
        """Send a request and return the body of the answer.

        Args:
            method: its method.
            path: its path.
            body: its body, for JSON.
            most: maximum bytes of the answer.
            route: gives the route of each try, constant in a session, so that a proxy may send its requests to one
                replica; see `wire.ROUTE`.

        Raises:
            OwnerError: the server cannot be reached, refuses, or sends more; the message names the request and the
                answer.
            DataError: the server does not accept the content of the request.
            MismatchError: the server has another PLM than it had.
            LostSessionError: the decoding session no longer exists.
        """
        in_session = path.startswith(SESSIONS)
        where = f"{method} {self.url}{path}"
        started, pause, attempts, waited = time.monotonic(), _FIRST_PAUSE, 0, 0.0
        while True:
            attempts += 1
            wait = pause * random.uniform(0.5, 1.0)
            headers = {ROUTE: route()} | ({IDENTITY: self.plm} if self.plm else {})
            try:
                with self._client.stream(method, path, json=body, headers=headers) as response:
                    bound = most if response.is_success else _ERROR_BYTES
                    content = self._read(response, bound, where)
            except httpx2.TransportError as error:
                _require_passing(error, where)
                reason = f"it cannot be reached ({type(error).__name__}: {_plain(str(error))})"
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise OwnerError(
                    f"{where} got no usable answer ({type(error).__name__}: {_plain(str(error))})."
                ) from error
            else:
                if response.status_code not in _AGAIN:
                    _require_success(response.status_code, content, where)
                    return content
                code, reason = _said(content)
                if in_session and (response.status_code in _GATEWAY or code == "draining"):
                    raise LostSessionError(f"{where}: the server answered {response.status_code}: {reason}")
                with contextlib.suppress(KeyError, ValueError):
                    wait = max(wait, float(response.headers["retry-after"]))
                if code in _QUOTAS:
                    if wait > _QUOTA_PAUSE or waited + wait > _QUOTA_PATIENCE * self._patience:
                        raise OwnerError(
                            f"{where}: {reason} The quota allows more in {_duration(wait)}: run the same command again "
                            "then. A build keeps every answer that it got, and continues."
                        )
                    # The server works and says when to come back, so patience with failures is not used up.
                    waited, started = waited + wait, started + wait
            if time.monotonic() + wait - started > self._patience:
                raise OwnerError(
                    f"{where} failed after {attempts} tries in {time.monotonic() - started:.0f} s: {reason}. Check the "
                    "address and the server, then run the same command again: a build resumes where it stopped."
                )
            logger.warning("%s: %s; retrying in %.1f s.", where, reason, wait)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _read(self, response: httpx2.Response, most: int, where: str) -> bytes:
        """Read a body that is neither larger than `most` nor slower than `_SLOWEST`."""
        # A compressed body of one megabyte can expand to a gigabyte.
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise OwnerError(f"{where} was answered in the encoding {_plain(encoding)!r}, which was not requested.")
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
            raise OwnerError(f"{where} was answered with {int(declared):,} bytes, expected at most {most:,}.")
        content, began = bytearray(), time.monotonic()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > most:
                raise OwnerError(f"{where} was answered with more than {most:,} bytes, the expected maximum.")
            if time.monotonic() - began > self._timeout + len(content) / _SLOWEST:
                raise OwnerError(
                    f"{where} was answered too slowly: {len(content):,} bytes in {time.monotonic() - began:.0f} s."
                )
        return bytes(content)

    def close(self) -> None:
        """Close the connection pool."""
        self._client.close()


def _require_passing(error: httpx2.TransportError, where: str) -> None:
    """Raise immediately for errors that a retry cannot fix."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise OwnerError(
                f"{where}: the server's certificate is not trusted ({cause.verify_message}). Check the address, or "
                "set SSL_CERT_FILE to the certificate of the authority that signed it."
            ) from error
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise OwnerError(
                f"{where}: a secure connection cannot be established ({cause.reason or type(cause).__name__}). "
                "Check that the server speaks https at this port."
            ) from error
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        raise OwnerError(f"{where} cannot be sent: {_plain(str(error))}.") from error


def _require_success(status: int, content: bytes, where: str) -> None:
    if 200 <= status < 300:
        return
    code, reason = _said(content)
    message = f"{where}: the server refused with {status}: {reason}"
    if status == 412 and code == "another_plm":
        raise MismatchError(
            f"{where}: the server now has another PLM than it had at the beginning, or shows it to this key in another "
            "form: run the same command again, which says whether what exists fits the new one."
        )
    if status in (404, 410) and code in ("session_expired", "unknown_session"):
        raise LostSessionError(message, unknown=code == "unknown_session")
    if status in (401, 403):
        remedy = f" Set {KEY} to a key that the owner gave you." if status == 401 else ""
        raise OwnerError(message + remedy)
    if status in (400, 413, 422):
        raise DataError(message)
    raise OwnerError(message)


def _said(content: bytes) -> tuple[str, str]:
    """Extract code and message from the body of an error, sanitised for a terminal."""
    try:
        error = json.loads(content)["error"]
        words = " ".join(filter(None, (str(error["message"]), str(error.get("remedy") or ""))))
        return _plain(str(error["code"])), _plain(words)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", f"{_plain(content[:200].decode('utf-8', 'replace'))!r}"


def _duration(seconds: float) -> str:
    """Format untrusted seconds, rounded up to minutes."""
    minutes = math.ceil(min(seconds, 31 * 86400.0) / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _plain(text: str, most: int = 600) -> str:
    """Sanitise untrusted text for a terminal, and limit its length."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])


def require_private(url: str) -> None:
    """Refuse an address that would transmit prompts and key unencrypted."""
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
            f"{url} is not https: prompts and key would be sent unencrypted. Use https, or a tunnel to this machine."
        )
