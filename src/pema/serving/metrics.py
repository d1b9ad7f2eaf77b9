"""What the server counts, for Prometheus; nothing that a client sent, and no key's name."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_POWERS = tuple(float(1 << n) for n in range(0, 16))


class Metrics:
    """One server's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint",)
        self._requests = Counter(
            "pema_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "pema_request_seconds", "Time to the end of the answer.", labels, buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter(
            "pema_tokens", "Tokens that were asked for, steps among them.", labels, registry=self.registry
        )
        self._representations = Counter(
            "pema_representations", "Representations that were handed out.", labels, registry=self.registry
        )
        self._batch_requests = Histogram(
            "pema_batch_requests", "Requests in one call of the PLM.", buckets=_POWERS[:9], registry=self.registry
        )
        self._batch_tokens = Histogram(
            "pema_batch_tokens", "Tokens in one call of the PLM.", buckets=_POWERS, registry=self.registry
        )
        self._evictions = Counter(
            "pema_session_evictions", "Sessions that their client did not close.", ("reason",), registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def watch(self, queue: Callable[[], int], sessions: Callable[[], int], session_bytes: Callable[[], int]) -> None:
        """Read these whenever metrics are asked for."""
        for name, text, read in (
            ("pema_queue_requests", "Requests that wait for the PLM.", queue),
            ("pema_sessions", "Live decoding sessions.", sessions),
            ("pema_session_bytes", "What live sessions hold.", session_bytes),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def request(self, endpoint: str, status: int, seconds: float, tokens: int, representations: int) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)
        self._tokens.labels(endpoint).inc(tokens)
        self._representations.labels(endpoint).inc(representations)

    def batch(self, requests: int, tokens: int) -> None:
        """Count a call of the PLM."""
        self._batch_requests.observe(requests)
        self._batch_tokens.observe(tokens)

    def eviction(self, reason: str) -> None:
        """Count a session that was closed for its client."""
        self._evictions.labels(reason).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
