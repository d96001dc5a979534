"""Prometheus metrics of a server: requests, times, personas. No user's id and no text is in any of them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The metrics of one server, in a registry that no other server shares."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "personaplug_requests", "Requests, by route and status.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "personaplug_request_seconds",
            "From a request's arrival to the first byte of the reply: of a stream, to its first event.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.personas = Counter(
            "personaplug_personas",
            "Replies, by what was applied (user, population, plain) and whether it came from the cache.",
            ("applied", "cached"),
            registry=registry,
        )
        self.running = Gauge("personaplug_running_requests", "Requests to /v1/ that are running.", registry=registry)
        self.closed_connections = Counter(
            "personaplug_closed_connections",
            "Connections that were closed because they took too much, by reason.",
            ("reason",),
            registry=registry,
        )
        self.cached_users = Gauge("personaplug_cached_users", "Users in the persona cache.", registry=registry)
        self.cached_bytes = Gauge("personaplug_cached_bytes", "Bytes in the persona cache.", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)
