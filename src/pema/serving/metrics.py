"""Metrics for Prometheus. They contain the names of keys, and nothing that a client sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from pema.serving.record import Record
from pema.serving.usage import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_POWERS = tuple(float(1 << n) for n in range(0, 16))


class Metrics:
    """The counters of one server.

    Attributes:
        usage: of each key, per day.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.usage = Usage()
        labels = ("endpoint",)
        self._requests = Counter(
            "pema_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "pema_request_seconds", "Time to the end of the answer.", labels, buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter("pema_tokens", "Requested tokens, steps included.", labels, registry=self.registry)
        self._representations = Counter("pema_representations", "Sent representations.", labels, registry=self.registry)
        self._key_requests = Counter("pema_key_requests", "Requests by key.", ("key",), registry=self.registry)
        self._key_tokens = Counter(
            "pema_key_tokens", "Requested tokens by key, as quotas count them.", ("key",), registry=self.registry
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
        """Read these whenever metrics are requested."""
        for name, text, read in (
            ("pema_queue_requests", "Requests that wait for the PLM.", queue),
            ("pema_sessions", "Live decoding sessions.", sessions),
            ("pema_session_bytes", "Memory of live sessions.", session_bytes),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def request(self, record: Record, status: int, seconds: float) -> None:
        """Count an answered request; the name of an unknown key is not in its record."""
        self._requests.labels(record.endpoint, str(status)).inc()
        self._seconds.labels(record.endpoint).observe(seconds)
        self._tokens.labels(record.endpoint).inc(record.tokens)
        self._representations.labels(record.endpoint).inc(record.representations)
        if record.key is not None:
            self._key_requests.labels(record.key).inc()
            self._key_tokens.labels(record.key).inc(record.tokens)
            self.usage.count(record.key, record.tokens)

    def batch(self, requests: int, tokens: int) -> None:
        """Count a call of the PLM."""
        self._batch_requests.observe(requests)
        self._batch_tokens.observe(tokens)

    def eviction(self, reason: str) -> None:
        """Count a session that was closed for its client."""
        self._evictions.labels(reason).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                empty = Metric(family.name, family.documentation, family.type)
                merged = families.setdefault(family.name, empty)
                for sample in family.samples:
                    merged.add_sample(sample.name, {"worker": worker} | sample.labels, sample.value)
        yield from families.values()


def merged(texts: Mapping[str, str]) -> bytes:
    """Return the metrics of several workers, given by the worker's name, as one text in which each has its label."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)
